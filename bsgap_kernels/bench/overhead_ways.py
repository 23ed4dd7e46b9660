"""Ways of tracking a model that are timed side by side: not at all, naive hooks, delve, and ours."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..tracking import RankTracker
from ..tracking.rows import Row
from ..tracking.sites import activation_of, unfold_activation

NONE, NAIVE, DELVE, OURS = "no tracking", "naive hooks", "delve", "RankTracker"
DEFAULTS = "RankTracker, all defaults"
"""Three thresholds, also about the mean, and the metrics that come with them; `OURS` counts once."""
INPUT = ":input"
"""What the tracker appends to a module's name where it reads the input."""
STEP_END = "(end of step)"
"""What a way does after the step, beside its sites."""


class Way(Protocol):
    """One way of tracking: hooks on a model, and what is done when a step ends."""

    steps: int
    """Steps in a row that make one sample: more than one where only some steps are tracked."""

    def attach(self, model: nn.Module) -> None:
        """Put hooks on the model."""

    def begin(self) -> None:
        """What goes before the steps of a sample, outside the timed part."""

    def end_step(self) -> None:
        """What follows the optimizer's step."""

    def fired(self) -> bool:
        """Whether its hooks were called at all; in a compiled model they may silently not be."""

    def close(self) -> None:
        """Take the hooks off for good."""


class Untracked:
    """No hooks at all."""

    steps = 1

    def attach(self, model: nn.Module) -> None:
        """Nothing."""

    def begin(self) -> None:
        """Nothing."""

    def end_step(self) -> None:
        """Nothing."""

    def fired(self) -> bool:
        """There is nothing to call."""
        return True

    def close(self) -> None:
        """Nothing."""


class Naive:
    """`torch.linalg.matrix_rank` of the unfolded activation in forward hooks, read by the host at once.

    With `singular_values` every hook also keeps the float64 singular values, from which a check can judge.
    """

    steps = 1

    def __init__(
        self,
        *,
        sites: Sequence[str],
        unfold: str,
        rtol: float,
        singular_values: bool = False,
    ) -> None:
        self._sites, self._unfold, self._rtol = sites, unfold, rtol
        self._keep = singular_values
        self._calls: dict[str, int] = {}
        self._handles: list[Any] = []
        self.counts: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, int]] = {}
        self.singular_values: dict[str, Tensor] = {}

    def attach(self, model: nn.Module) -> None:
        """A hook at every site of the tracker."""
        modules = {name or type(model).__name__: m for name, m in model.named_modules(remove_duplicate=False)}
        # The host reads the count, so compiled code ends here anyway; else this is compiled for every site.
        read = torch.compiler.disable(self._read)
        for name in dict.fromkeys(site.rpartition("#")[0] for site in self._sites):
            module = modules[name.removesuffix(INPUT)]
            if name.endswith(INPUT):
                hook = module.register_forward_pre_hook(lambda m, args, n=name: read(n, args[0]))
            else:
                hook = module.register_forward_hook(lambda m, args, output, n=name: read(n, output))
            self._handles.append(hook)

    def _read(self, name: str, output: Any) -> None:
        call = self._calls[name] = self._calls.get(name, -1) + 1
        site = f"{name}#{call}"
        with torch.no_grad():
            matrix = unfold_activation(activation_of(output, site).detach(), self._unfold)
            if matrix.dtype in (torch.float16, torch.bfloat16):
                matrix = matrix.float()  # matrix_rank takes no halves
            self.counts[site] = int(torch.linalg.matrix_rank(matrix, rtol=self._rtol))
            if self._keep:
                self.shapes[site] = (matrix.shape[0], matrix.shape[1])
                self.singular_values[site] = torch.linalg.svdvals(matrix.double()).cpu()

    def begin(self) -> None:
        """Nothing."""

    def end_step(self) -> None:
        """The next call of a module is its first again."""
        self._calls.clear()

    def fired(self) -> bool:
        """Whether anything was counted."""
        return bool(self.counts)

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class Ours:
    """RankTracker: what it counts is handed on to a sink that forgets it."""

    def __init__(self, options: Mapping[str, Any], *, steps: int = 1) -> None:
        self.steps = steps
        self._options = dict(options)
        self._tracker: RankTracker | None = None

    @property
    def tracker(self) -> RankTracker:
        """The tracker, once attached."""
        if self._tracker is None:
            raise RuntimeError("the tracker is not attached to a model")
        return self._tracker

    def attach(self, model: nn.Module) -> None:
        """A tracker on the model."""
        self._tracker = RankTracker(model, **{"verbose": False, "sinks": [_Forgetful()], **self._options})

    def begin(self) -> None:
        """Let the tracker's clock not take what other ways did since for a long step of its own."""
        with self.tracker.paused():
            self.tracker.step()

    def end_step(self) -> None:
        """End the tracker's step."""
        self.tracker.step()

    def fired(self) -> bool:
        """Whether any site was met."""
        return bool(self.tracker.sites())

    def counts(self) -> dict[str, int]:
        """End the step and wait for its counts."""
        return {site: record.near_rank for site, record in self.tracker.collect().items()}

    def close(self) -> None:
        """Close the tracker."""
        if self._tracker is not None:
            self._tracker.close()


class _Forgetful:
    """A sink that takes rows and keeps none."""

    def write(self, rows: Sequence[Row]) -> None:
        """Nothing is kept."""

    def flush(self) -> None:
        """Nothing is kept back."""

    def close(self) -> None:
        """Nothing is open."""


class Delve:
    """delve's SaturationTracker, asked for every layer's intrinsic dimensionality after every step.

    It reads convolutions and linear layers before the nonlinearity, and counts the eigenvalues of the
    covariance that hold 99 % of the variance: another number from the same kind of matrix. What it returns
    stays in memory; files would cost it more.
    """

    steps = 1
    METHODS: Mapping[str, str] = {"channel": "channelwise", "flatten": "flatten", "pool": "mean"}

    def __init__(self, *, unfold: str, device: torch.device) -> None:
        if unfold not in self.METHODS:
            raise ValueError(f"delve has no unfolding like {unfold}")
        self._unfold, self._device = unfold, device
        self._folder = tempfile.TemporaryDirectory()
        self._tracker: Any = None

    def attach(self, model: nn.Module) -> None:
        """delve's hooks on the model."""
        delve = importlib.import_module("delve")
        logging.getLogger("delve.logger").setLevel(logging.WARNING)  # else a line for every layer
        writer = _delve_writer(importlib.import_module("delve.writers").AbstractWriter)
        self._tracker = delve.SaturationTracker(
            self._folder.name,
            save_to=writer,
            modules=model,
            stats=["idim"],
            conv_method=self.METHODS[self._unfold],
            device=str(self._device),
        )

    def begin(self) -> None:
        """Nothing."""

    def end_step(self) -> None:
        """delve's reduction of the step."""
        self._tracker.add_saturations(save=False)

    def fired(self) -> bool:
        """Whether it saw any sample."""
        return bool(self._tracker.seen_samples["train"])

    def close(self) -> None:
        """Its hooks cannot be removed by it; `HookSet.forget` does."""
        self._folder.cleanup()


def delve_is_installed() -> bool:
    """Whether `import delve` finds anything (it may still fail on this torch, which is then a result)."""
    return importlib.util.find_spec("delve") is not None


def _delve_writer(base: Any) -> Any:
    """A writer that keeps the last values in memory, as a subclass of delve's own."""

    def keep(self: Any, *args: Any, **kwargs: Any) -> None:
        self.last = args, kwargs

    names = ("resume_from_saved_state", "add_scalar", "add_scalars", "save", "close")
    abstract = {*names, *base.__abstractmethods__}
    return type("MemoryWriter", (base,), dict.fromkeys(abstract, keep))()


def make_ways(
    names: Sequence[str],
    options: Mapping[str, Any],
    *,
    sites: Sequence[str],
    ours_steps: int,
    device: torch.device,
) -> dict[str, Callable[[], Way]]:
    """A maker of each way by name; `options` and `sites` are those of RankTracker."""
    naive = {"sites": sites, "unfold": options["unfold"], "rtol": options["rtol"]}
    makers: dict[str, Callable[[], Way]] = {
        NONE: Untracked,
        NAIVE: partial(Naive, **naive),
        DELVE: partial(Delve, unfold=options["unfold"], device=device),
        OURS: partial(Ours, {"metrics": ("near_rank",), **options}, steps=ours_steps),
        DEFAULTS: partial(Ours, {k: v for k, v in options.items() if k != "rtol"}, steps=ours_steps),
    }
    return {name: makers[name] for name in names}
