"""near_rank_ratio: near-rank over the most that it can be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import largest_rank
from . import _checks
from ._register import implement
from .near_rank import Tolerance, argument_problem, checked_tolerances, tensor_batch


def near_rank_ratio(
    A: Tensor, *, atol: Tolerance = None, rtol: Tolerance = None, center: bool = False, **refused: Any
) -> Tensor:
    """near_rank(A) over the most it can be, min(m, n) or min(m - 1, n) with `center`: between 0 and 1.

    Shapes, tolerances, cost and errors as `near_rank`; result float64. Non-finite input gives NaN, an
    empty matrix 0. Never requires grad.
    """
    _checks.refuse("near_rank_ratio", refused)
    atol, rtol = checked_tolerances(A, atol, rtol, center)
    if isinstance(atol, Tensor) or isinstance(rtol, Tensor):
        return torch.ops.bsgap.near_rank_ratio.tensor(A, atol=atol, rtol=rtol, center=center)
    return torch.ops.bsgap.near_rank_ratio.default(A, atol=atol, rtol=rtol, center=center)


def ratio(counts: Tensor, A: Tensor, center: bool) -> Tensor:
    """Counts of A as a share of `largest_rank`, NaN where the count is -1."""
    share = counts.double() / max(1, largest_rank(A.shape[-2], A.shape[-1], center))
    return share.masked_fill_(counts < 0, torch.nan)


def _kernel(
    A: Tensor, *, atol: float | None = None, rtol: float | None = None, center: bool = False
) -> Tensor:
    _checks.raise_raw("near_rank_ratio", argument_problem(A, center, atol, rtol))
    return ratio(torch.ops.bsgap.near_rank.default(A, atol=atol, rtol=rtol, center=center), A, center)


def _tensor_kernel(
    A: Tensor,
    *,
    atol: Tensor | None = None,
    rtol: Tensor | None = None,
    center: bool = False,
) -> Tensor:
    _checks.raise_raw("near_rank_ratio", argument_problem(A, center, atol, rtol))
    return ratio(torch.ops.bsgap.near_rank.tensor(A, atol=atol, rtol=rtol, center=center), A, center)


def _fake(A: Tensor, *, atol: float | None = None, rtol: float | None = None, center: bool = False) -> Tensor:
    _checks.raise_raw("near_rank_ratio", argument_problem(A, center, atol, rtol))
    return A.new_empty(A.shape[:-2], dtype=torch.float64)


def _fake_tensor(
    A: Tensor, *, atol: Tensor | None = None, rtol: Tensor | None = None, center: bool = False
) -> Tensor:
    _checks.raise_raw("near_rank_ratio", argument_problem(A, center, atol, rtol))
    return A.new_empty(tensor_batch(A, atol, rtol), dtype=torch.float64)


implement("near_rank_ratio", _kernel, _fake, differentiable=False)
implement("near_rank_ratio.tensor", _tensor_kernel, _fake_tensor, differentiable=False)
