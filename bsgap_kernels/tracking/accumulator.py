"""SpectralAccumulator: near-rank and other metrics of rows that come in chunks, steps and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bsgap_kernels.ops import _checks
from bsgap_kernels.tracking.hooks import local_rows
from bsgap_kernels.tracking.options import checked_question
from bsgap_kernels.tracking.records import ROWS, SiteRecord, ask, record_of
from bsgap_kernels.tracking.sums import Sums


class SpectralAccumulator:
    """Sums up AᵀA over chunks of rows; near-rank is that of all rows as one matrix.

        accumulator = SpectralAccumulator(rtol=1e-2)
        for A in chunks:                         # (rows, n)
            accumulator.update(A)
        accumulator.compute().near_rank

    Sums are kept in float64, so the result does not depend on the chunks but for rounding, whose bound grows
    with them and goes into the certificate: `lower` and `upper` hold for the rows as given. Squares have to
    fit float64: below about 1e-150 the certificate gets wide, above 1e154 the count is -1.

    Args:
        rtol, atol: the threshold is max(atol, rtol·σ_max).
        center: about the column means. Sums are kept about 0, so a mean of 1000 standard deviations costs
            6 of 16 digits, and the certificate says so.
        metrics: names of `METRICS`, or "all".
        certify: prove the count.
        decay: None adds up for ever. Between 0 and 1: an exponential window, each update first multiplies
            what is there by `decay` (a row of A counts with the square root of decay^age).

    Raises:
        ValueError, TypeError: an option out of range, or a chunk that does not fit the earlier ones.

    Cost: `update` a Gram matrix, 8·n² bytes held; `compute` a factorisation, or eigenvalues where the metrics
    need them. `update` never synchronises, `compute` does.
    """

    def __init__(
        self,
        *,
        rtol: float | Sequence[float] = 1e-2,
        atol: float | None = None,
        center: bool = False,
        metrics: Sequence[str] | str = ("near_rank",),
        certify: bool = True,
        decay: float | None = None,
    ) -> None:
        self.question = checked_question(rtol, atol, center, certify, metrics)
        if decay is not None:
            if not 0 < decay < 1:
                raise ValueError(f"decay: got {decay!r}, expected a number between 0 and 1, or None")
            if "feature_rank" in self.question.metrics:
                raise ValueError(
                    "metrics: feature_rank has no meaning in an exponential window, whose rows "
                    "weigh unequally"
                )
        self.decay = decay
        self.sums: Sums | None = None
        self.rows = 0

    def update(self, A: Tensor) -> SpectralAccumulator:
        """Add rows: A (*, n), leading dimensions observations; a DTensor by its placement. Returns self."""
        A = local_rows(A, "A")
        _checks.raise_public(_checks.matrix(A))
        sums = self._sums_for(A.shape[-1], A.device)
        if self.decay is not None:
            sums.fade(self.decay)
        with torch.no_grad():
            sums.add(A.detach())
        self.rows += A.shape[:-1].numel()
        return self

    def _sums_for(self, n: int, device: torch.device) -> Sums:
        if self.sums is None:
            self.sums = Sums.zeros(n, device, sums=self.question.sums, magnitudes=self.question.magnitudes)
        if n != self.sums.n:
            raise ValueError(f"A: got rows of {n} features after rows of {self.sums.n}")
        return self.sums

    def merge(self, other: SpectralAccumulator) -> SpectralAccumulator:
        """Add what another has accumulated, of other chunks, steps or ranks, about the same features."""
        if self._names() != other._names():
            raise ValueError(
                "other: accumulates for other metrics or another centring; give both the same options"
            )
        if other.sums is None:
            return self
        device = other.sums.gram.device if self.sums is None else self.sums.gram.device
        own = self._sums_for(other.sums.n, device)
        own.add_sums(other.sums.to(device))
        self.rows += other.rows
        return self

    def compute(self) -> SiteRecord:
        """Numbers of all rows so far; of none, near-rank 0 and shape (0, 0). Waits for the device."""
        if self.sums is None:
            return SiteRecord((0, 0), 0, 0, 0, 0.0, {}, 0.0)
        with torch.no_grad():
            numbers = ask([self.sums], self.question).map(Tensor.cpu)
        # The rows themselves, not their weight, bound the rank.
        numbers.counts[0, ROWS] = self.rows
        return record_of(0, numbers, self.sums.n, self.question, 0.0)

    def reset(self) -> None:
        """Forget everything."""
        self.sums, self.rows = None, 0

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers from which `load_state_dict` goes on, exactly."""
        if self.sums is None:
            return {"rows": 0}
        tensors = dict(zip(self._names(), self.sums.tensors(), strict=True))
        return {"rows": self.rows, **{name: tensor.clone() for name, tensor in tensors.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state; the options must be those it was saved with."""
        if set(state) not in ({"rows"}, {"rows", *self._names()}):
            raise ValueError(
                f"state: got {', '.join(sorted(state))}, expected rows, {', '.join(self._names())}: it was "
                "saved with other options"
            )
        self.reset()
        if "gram" not in state:
            return
        gram = state["gram"]
        sums = self._sums_for(gram.shape[0], gram.device)
        for own, name in zip(sums.tensors(), self._names(), strict=True):
            own.copy_(state[name])
        self.rows = int(state["rows"])

    def _names(self) -> list[str]:
        names = ["gram", "totals"]
        return names + ["sums"] * self.question.sums + ["magnitudes"] * self.question.magnitudes
