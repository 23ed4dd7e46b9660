"""NearRank: the near-rank of all rows a torchmetrics Metric was given, exact over chunks and ranks.

>>> import torch
>>> from bsgap_kernels.tracking.adapters.torchmetrics import NearRank
>>> metric = NearRank(num_features=4, rtol=1e-2)
>>> metric.update(torch.eye(4)[:2])
>>> metric.update(torch.eye(4)[2:3])
>>> metric.compute()
tensor(1., dtype=torch.float64)
>>> NearRank(num_features=4, metrics=("near_rank", "ratio"))(torch.ones(6, 4))
{'near_rank': tensor(1), 'ratio': tensor(0.2500, dtype=torch.float64)}

Needs `torchmetrics`: `pip install 'bsgap_kernels[torchmetrics]'`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...ops import _checks
from ..options import checked_question
from ..records import METRICS, SiteRecord, ask, record_of
from ..sums import Sums
from ._optional import need

if TYPE_CHECKING:
    from typing_extensions import Self

    class Metric(nn.Module):
        """What is used of torchmetrics.Metric."""

        def add_state(self, name: str, default: Tensor, dist_reduce_fx: str) -> None:
            """Declare a state."""

        def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> Self: ...

else:
    Metric = need("torchmetrics", "torchmetrics").Metric

_STATES = ("gram", "totals", "sums", "magnitudes")  # fields of Sums


class NearRank(Metric):
    """Near-rank, and what else the tracker records, of the rows of all updates together.

    The state is `Sums`: the Gram matrix AᵀA (n, n), the number of rows and what else the metrics need, in
    float64. It adds up: chunks and ranks of any sizes, empty ones too, give what all rows at once give, to
    float64 rounding. Singular values come from the Gram matrix: those below about 1e-8·σ_max are rounding.

    Args:
        num_features: n.
        rtol, atol: the near-rank counts the singular values above max(atol, rtol·σ_max).
        center: subtract the mean of all rows first.
        metrics: what `compute` returns: "ratio" (near-rank / min(rows, n)) or a name of `RankTracker`'s
            metrics gives a scalar, several give a dict. Counts are int64, others float64.
        options: of torchmetrics.Metric.

    Raises:
        ValueError, TypeError: an option out of range, or an update of another width than num_features.

    `update` costs one Gram matrix (m n² flops) and never synchronises; `compute` costs a factorisation, or
    eigenvalues where the metrics need them, and synchronises.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    gram: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        rtol: float = 1e-2,
        atol: float | None = None,
        center: bool = False,
        metrics: str | Sequence[str] = "ratio",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not isinstance(num_features, int) or num_features < 1:
            raise ValueError(f"num_features: got {num_features!r}, expected an integer of at least 1")
        names = [metrics] if isinstance(metrics, str) else list(metrics)
        for name in names:
            if name not in ("ratio", *METRICS):
                raise ValueError(f"metrics: got {name!r}, expected names of ratio, {', '.join(METRICS)}")
        self.num_features = num_features
        self.metrics = metrics if isinstance(metrics, str) else tuple(names)
        asked = [name for name in names if name != "ratio"]
        self.question = checked_question(rtol, atol, center, False, asked)
        empty = Sums.zeros(
            num_features,
            torch.device("cpu"),
            sums=self.question.sums,
            magnitudes=self.question.magnitudes,
        )
        self._held = [name for name in _STATES if getattr(empty, name) is not None]
        for name in self._held:
            self.add_state(name, getattr(empty, name), dist_reduce_fx="sum")

    def update(self, A: Tensor) -> None:
        """Add rows: A (*, n), leading dimensions rows, floating point."""
        _checks.raise_public(_checks.matrix(A))
        if A.shape[-1] != self.num_features:
            raise ValueError(f"A: got shape {tuple(A.shape)}, expected (*, {self.num_features})")
        self._state().add(A.detach())

    def compute(self) -> Tensor | dict[str, Tensor]:
        """The metrics asked for, of all rows so far; non-finite rows give a near-rank of -1 and NaN."""
        numbers = ask([self._state()], self.question).map(Tensor.cpu)
        record = record_of(0, numbers, self.num_features, self.question, 0.0)
        if isinstance(self.metrics, str):
            return self._value(record, self.metrics)
        return {name: self._value(record, name) for name in self.metrics}

    def _state(self) -> Sums:
        held: dict[str, Any] = {name: getattr(self, name) if name in self._held else None for name in _STATES}
        return Sums(self.num_features, True, **held)

    def _value(self, record: SiteRecord, name: str) -> Tensor:
        if name == "near_rank":
            return torch.tensor(record.near_rank, device=self.gram.device)
        # A count that the sums do not resolve is none.
        value = record.ratio if name == "ratio" else record.summary.get(name, math.nan)
        return torch.tensor(value, dtype=torch.float64, device=self.gram.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> Self:
        """Move the state with the module, in float64 whatever dtype the module is converted to."""
        super()._apply(fn, exclude_state=(*self._held, *exclude_state))
        for name in self._held:
            state = getattr(self, name)
            setattr(self, name, state.to(fn(state[:0]).device))
        return self
