"""What tests of the tracker share: small models, activations saved by plain hooks, float64 counts of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bsgap_kernels.tracking import SiteRecord
from bsgap_kernels.tracking.hooks import recomputing
from bsgap_kernels.tracking.sites import unfold_activation

RTOL = 0.1
MARGIN = 1e-3
"""No singular value may lie this close to the threshold, relative to it: float32 sums blur less."""


class Net(nn.Module):
    """Convolutions around one in-place ReLU that is called twice, then tanh between linear layers.

    The sites by channel are tall, the one of tanh is wide (8 rows, 24 features).
    """

    def __init__(self, checkpointed: bool | None = None) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.second = nn.Conv2d(6, 5, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Sequential(nn.Linear(5 * 25, 24), nn.Tanh(), nn.Linear(24, 3))
        self.reentrant = checkpointed

    def body(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        return self.act(self.second(x))

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.head(self.body(x).flatten(1))
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant).flatten(1))


SITES = ["act#0", "act#1", "head.1#0"]


def images(step: int, batch: int = 8) -> Tensor:
    """Another batch each step, channels of different strength."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(batch, 2, 5, 5, generator=generator)
    return x * torch.logspace(0, -1.2, batch)[:, None, None, None]


class Saved:
    """Outputs of modules of one step, by site, saved by hooks that have nothing to do with the tracker."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.activations: dict[str, list[Tensor]] = {}
        self._calls: Counter[str] = Counter()
        if not names:
            return
        model.register_forward_pre_hook(lambda module, args: None if recomputing() else self._calls.clear())
        for name in names:
            model.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name: self._save(name, output)
            )

    def _save(self, name: str, output: Tensor) -> None:
        if recomputing():
            return
        site = f"{name}#{self._calls[name]}"
        self._calls[name] += 1
        self.activations.setdefault(site, []).append(output.detach().clone())

    def take(self) -> dict[str, Tensor]:
        """What the step has saved, micro-batches together; the next step begins."""
        taken = {site: torch.cat(parts) for site, parts in self.activations.items()}
        self.activations.clear()
        return taken


def svd_count(A: Tensor, rtol: float = RTOL, *, center: bool = False) -> int:
    """The near-rank of a matrix by float64 singular values; void if one lies at the threshold."""
    A = A.double()
    if center:
        A = A - A.mean(0)
    sigma = torch.linalg.svdvals(A)
    tau = rtol * float(sigma[0])
    assert float((sigma / tau - 1).abs().min()) > MARGIN, "a singular value at the threshold: choose a seed"
    return int((sigma > tau).sum())


def assert_equal_to_svd(
    records: dict[str, SiteRecord],
    saved: dict[str, Tensor],
    rtol: float = RTOL,
    unfold: str = "auto",
) -> list[int]:
    """Every record is of the shape and near-rank of the activation that was saved; returns the counts."""
    assert sorted(records) == sorted(saved)
    counts = []
    for site, activation in saved.items():
        A = unfold_activation(activation, unfold)
        assert records[site].shape == tuple(A.shape), site
        counts.append(svd_count(A, rtol))
        assert records[site].near_rank == counts[-1], site
        assert records[site].ratio == counts[-1] / min(A.shape)
    return counts
