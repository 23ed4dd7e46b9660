"""near_rank_grouped: near-rank of a list of matrices of different shapes in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from . import _checks
from ._real_form import halved, real_form
from ._register import implement
from ._solvers import svd_counts
from ._tolerances import effective_tolerances, scalar_pair
from .near_rank import argument_problem, checked_tolerances, count

OP = "near_rank_grouped"


def near_rank_grouped(
    As: Sequence[Tensor],
    *,
    atol: float | None = None,
    rtol: float | None = None,
    center: bool = False,
    **refused: Any,
) -> Tensor:
    """near_rank of every matrix in a list.

    Shapes: each A (m_i, n_i), or (*, n_i) with every leading dimension an observation, so that
    `x.movedim(1, -1)` of a convolution's output x (B, C, H, W) is its `channel` unfolding; shapes and dtypes
    may differ; result (len(As),), int64. Tolerances, band, non-finite input and errors as `near_rank`; an
    empty list gives an empty result. Never requires grad.
    On a GPU one launch forms the Gram matrices of a dtype up to min(m, n) = 64 and few more the larger ones,
    reading NCHW and channels_last in place; one launch counts up to 128, and a sequence that does not depend
    on their number the larger ones. Nothing waits for the host.
    """
    _checks.refuse("near_rank_grouped", refused)
    if not isinstance(As, Sequence):
        raise TypeError(f"As must be a list of tensors, got {type(As).__name__}")
    for A in As:
        rows = A.shape[:-1].numel() if isinstance(A, Tensor) and A.dim() > 1 else None
        checked_tolerances(A, atol, rtol, center, rows)
    for name, value in (("atol", atol), ("rtol", rtol)):
        if isinstance(value, Tensor):
            raise TypeError(f"{name} must be a number or None for near_rank_grouped, got a tensor")
    _checks.raise_public(_problem(As, center, atol, rtol))
    atol, rtol = (None if value is None else float(value) for value in (atol, rtol))
    if not As:  # a call with no tensor has no device to be dispatched by
        return torch.zeros(0, dtype=torch.int64)
    return torch.ops.bsgap.near_rank_grouped(list(As), atol=atol, rtol=rtol, center=center)


def _problem(
    As: Sequence[Tensor], center: bool, atol: float | None, rtol: float | None
) -> _checks.Problem | None:
    for i, A in enumerate(As):
        wrong = argument_problem(A, center, atol, rtol)
        if wrong is not None:
            return wrong[0], f"As[{i}]: {wrong[1]}"
        if A.device != As[0].device:
            return ValueError, f"As[{i}] must be on the device of As[0] ({As[0].device}), got {A.device}"
    return None


def _kernel(
    As: Sequence[Tensor],
    *,
    atol: float | None = None,
    rtol: float | None = None,
    center: bool = False,
) -> Tensor:
    _checks.raise_raw("near_rank_grouped", _problem(As, center, atol, rtol))
    filled = [A for A in As if A.numel() > 0]
    if not filled:
        return As[0].new_zeros(len(As), dtype=torch.int64)
    found = _counts(filled, atol, rtol, center)
    for i, A in enumerate(filled if center else ()):
        rows, n = A.shape[:-1].numel(), A.shape[-1]
        if rows <= n:
            found[i : i + 1].clamp_(max=dispatch.largest_rank(rows, n, center))
    if len(filled) == len(As):
        return found
    zero = found.new_zeros(1)
    counts = iter(found.split(1))
    return torch.cat([next(counts) if A.numel() > 0 else zero for A in As])


def _counts(As: Sequence[Tensor], atol: float | None, rtol: float | None, center: bool) -> Tensor:
    """Near-rank (len(As),) of matrices that are not empty: in one call what our kernels count."""
    rows = [A.shape[:-1].numel() for A in As]
    tolerances = [effective_tolerances(A, atol, rtol, m) for A, m in zip(As, rows, strict=True)]
    absolute = tolerances[0][0]
    Bs = [real_form(A, 0) for A in As]
    plans = [
        dispatch.plan_of(OP, B, relative if absolute == 0 else None, center, rows=B.shape[:-1].numel())
        for B, (_, relative) in zip(Bs, tolerances, strict=True)
    ]
    together = [i for i, plan in enumerate(plans) if plan.count == "kernels"]
    counts: dict[int, Tensor] = {}
    if together:
        found, smallest_tau = torch.ops.bsgap._grouped_counts(
            [Bs[i] for i in together],
            absolute,
            [tolerances[i][1] for i in together],
            center,
            [plans[i].gram == "float32" for i in together],
        )
        counts = {i: halved(own, As[i]) for i, own in zip(together, found.split(1), strict=True)}
        if absolute > 0:  # then tau / sigma_max depends on the values
            for i, tau in zip(together, smallest_tau.split(1), strict=False):
                if not dispatch.resolved(OP, Bs[i], tau, Bs[i].shape[:-1].numel()):
                    pair = scalar_pair(As[i], *tolerances[i])
                    counts[i] = svd_counts(OP, As[i].flatten(0, -2), pair, center)
        elif len(together) == len(As) and not any(A.is_complex() for A in As):
            return found
    for i in set(range(len(As))) - set(counts):
        counts[i] = count(OP, As[i].flatten(0, -2), *tolerances[i], center).view(1)
    return torch.cat([counts[i] for i in range(len(As))])


def _fake(
    As: Sequence[Tensor], *, atol: float | None = None, rtol: float | None = None, center: bool = False
) -> Tensor:
    _checks.raise_raw("near_rank_grouped", _problem(As, center, atol, rtol))
    return As[0].new_empty((len(As),), dtype=torch.int64)


implement("near_rank_grouped", _kernel, _fake, differentiable=False)
