"""The engine of the CPU: every op's numbers from the C++ ops of csrc/cpu/spectra.cpp.

Inputs are checked, and no matrix is empty. The engine of CUDA (`_cuda.py`) has the same functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..dispatch import FLOAT64_GRAM_MIN_RTOL, select_backend
from ._tolerances import effective_tolerances, svd_counts

_NEAR_RANK: Callable[..., Tensor] = torch.ops.bsgap._near_rank.default


def count_scalar(op: str, A: Tensor, atol: float | None, rtol: float | None, center: bool) -> Tensor:
    """Near-rank (*,) for one pair of tolerances."""
    absolute, relative = effective_tolerances(A, atol, rtol)
    static = absolute == 0  # then sigma_max does not matter: tau_rel is rtol
    *batch, m, n = A.shape
    plan = select_backend(op, A.dtype, m, n, rtol=relative if static else None)
    if plan.gram != "svd" and static:
        return _NEAR_RANK(A, relative, center, plan.gram == "float32")
    if plan.gram != "svd":
        counts, smallest_tau = torch.ops.bsgap._counts(A, None, absolute, relative, center, False)
        if bool((smallest_tau >= FLOAT64_GRAM_MIN_RTOL).all()):
            return counts.view(batch)
    pair = torch.tensor([[absolute, relative]], dtype=torch.float64)
    return svd_counts(A, pair, center)[..., 0]


def count_pairs(op: str, A: Tensor, pairs: Tensor, center: bool) -> Tensor:
    """Counts (*, t) for float64 threshold pairs (*, t, 2) that broadcast with the batch of A, t > 0."""
    batch = A.shape[:-2]
    t = pairs.shape[-2]
    plan = select_backend(op, A.dtype, A.shape[-2], A.shape[-1], rtol=None, thresholds=t)
    full = torch.broadcast_shapes(batch, pairs.shape[:-2])
    if full != batch:  # more thresholds than matrices: one Gram matrix serves all that share it
        return svd_counts(A, pairs, center)
    if plan.count == "eigenvalues":
        sigma = _gram_singular_values(A, center)
        tau = torch.maximum(pairs[..., 0], pairs[..., 1] * sigma[..., :1])
        counts = (sigma[..., None, :] > tau[..., None]).sum(-1)
        counts = counts.masked_fill(torch.isnan(sigma[..., :1]) | torch.isnan(tau), -1)
        unresolved = bool((tau < FLOAT64_GRAM_MIN_RTOL * sigma[..., :1]).any())
    else:
        shared = pairs.numel() == 2 * t
        flat = pairs.reshape(1, t, 2) if shared else pairs.expand(*batch, t, 2).reshape(-1, t, 2)
        flat_counts, smallest_tau = torch.ops.bsgap._counts(A, flat.contiguous(), 0.0, 0.0, center, False)
        counts = flat_counts.view(*batch, t)
        unresolved = bool((smallest_tau < FLOAT64_GRAM_MIN_RTOL).any())
    return svd_counts(A, pairs, center) if unresolved else counts


def _gram_singular_values(A: Tensor, center: bool) -> Tensor:
    """Singular values (*, k), descending, from the float64 Gram matrix; NaN for non-finite input."""
    gram, exponent = torch.ops.bsgap._small_gram(A, center)
    sigma = torch.linalg.eigvalsh(gram).flip(-1).clamp_min_(0).sqrt_()
    non_finite = exponent == torch.iinfo(torch.int32).min  # the mark that the private op leaves
    sigma = torch.ldexp(sigma, -exponent.masked_fill(non_finite, 0)[:, None])
    return sigma.masked_fill_(non_finite[:, None], torch.nan).view(*A.shape[:-2], min(A.shape[-2:]))


def count_grouped(
    op: str, As: Sequence[Tensor], atol: float | None, rtol: float | None, center: bool
) -> Tensor:
    """Near-rank (len(As),) of matrices (*, n_i), whose leading dimensions are all rows."""
    rows = [A.numel() // A.shape[-1] for A in As]
    tolerances = [effective_tolerances(A, atol, rtol, m) for A, m in zip(As, rows, strict=True)]
    static = tolerances[0][0] == 0
    plans = [
        select_backend(op, A.dtype, m, A.shape[-1], rtol=relative if static else None)
        for A, m, (_, relative) in zip(As, rows, tolerances, strict=True)
    ]
    from_grams = [i for i, plan in enumerate(plans) if plan.gram != "svd"]
    others = [i for i, plan in enumerate(plans) if plan.gram == "svd"]
    counts = torch.empty(len(As), dtype=torch.int64)
    if from_grams:
        found, smallest_tau = torch.ops.bsgap._grouped_counts(
            [As[i] for i in from_grams],
            tolerances[0][0],
            [tolerances[i][1] for i in from_grams],
            center,
            [plans[i].gram == "float32" for i in from_grams],
        )
        counts[from_grams] = found
        if not static:
            others += [
                i
                for i, tau in zip(from_grams, smallest_tau.tolist(), strict=True)
                if tau < FLOAT64_GRAM_MIN_RTOL
            ]
    for i in others:
        counts[i] = count_scalar(op, As[i].flatten(0, -2), atol, rtol, center)
    return counts


def intervals(
    op: str, A: Tensor, atol: float | None, rtol: float | None, center: bool, mode: str, seed: int
) -> tuple[Tensor, Tensor]:
    """Certified lower and upper bounds (*,) of the near-rank."""
    absolute, relative = effective_tolerances(A, atol, rtol)
    known = relative if absolute == 0 else None
    plan = select_backend(op, A.dtype, A.shape[-2], A.shape[-1], rtol=known, mode=mode)
    bounds: tuple[Tensor, Tensor] = torch.ops.bsgap._intervals.default(
        A, absolute, relative, center, plan.certificate == "probed", seed
    )
    return bounds


def summary(A: Tensor, center: bool) -> Tensor:
    """Spectral summary (*, columns)."""
    gram, exponent = torch.ops.bsgap._small_gram(A, center)
    columns: Tensor = torch.ops.bsgap._summarize(torch.linalg.eigvalsh(gram), exponent, *A.shape[-2:])
    return columns.view(*A.shape[:-2], -1)


# Operators without the frame of Python around them: after a training step all that a call touches is far from
# the processor.
_gram_counts: Callable[..., Tensor] = torch.ops.bsgap._gram_counts.default._op
accumulate_gram: Callable[..., None] = torch.ops.bsgap._accumulate_gram_.default._op
"""Adds what the rows of A give to a site's sums: AᵀA (n, n) or, one matrix with m < n, AAᵀ (m, m).

Takes gram, totals, sums, A, first, last, features_side, center, float32_gram, fresh. Dimensions [first, last)
of A are features, all others rows. Of gram the lower triangle counts. totals: rows, a bound of ‖Δgram‖₂
(infinite after float32 sums) but for the additions, additions. sums (n,): column sums, or None. center: with
AAᵀ only. fresh: what was there is forgotten. Gradients of A are not recorded.
"""


def count_sums(
    grams: Sequence[Tensor],
    totals: Sequence[Tensor],
    atol: float,
    rtol: float,
    certify: bool,
    spectrum: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Count, lower and upper bound (-1 unless certified) and rows, float64 (N, 4), of what was added up.

    With `spectrum` also the eigenvalues of each Gram matrix, ascending, NaN where it is not finite.
    """
    numbers = _gram_counts(grams, totals, atol, rtol, certify)
    return numbers, [_eigenvalues(gram) for gram in grams] if spectrum else []


def _eigenvalues(gram: Tensor) -> Tensor:
    if not math.isfinite(float(gram.diagonal().sum())):  # a solver would raise
        return gram.new_full((gram.shape[0],), torch.nan)
    return torch.linalg.eigvalsh(gram)


def feature_gram(A: Tensor, center: bool) -> Tensor:
    """AᵀA (*, n, n) in float64, about the column means if centred; NaN for non-finite input."""
    n = A.shape[-1]
    return torch.ops.bsgap._feature_gram(A, center).view(*A.shape[:-2], n, n)


def shifted_gram(A: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Column sums (n,) and Gram matrix (n, n) of A - shift, A (m, n), in float64."""
    sums, gram = torch.ops.bsgap._shifted_gram(A, shift)
    return sums, gram
