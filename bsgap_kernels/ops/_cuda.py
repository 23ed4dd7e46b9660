"""The engine of CUDA: Gram matrices from the Triton kernels, counts from the CUDA C++ kernels.

Inputs are checked, and no matrix is empty. The engine of the CPU (`_cpu.py`) has the same functions.

Nothing here waits for the device or looks at a value, so every call can be captured in a CUDA graph, but for
two: `svd_counts` below what a float64 Gram matrix resolves, and everything in an installation without nvcc.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Plan, select_backend
from . import _cpu
from ._cuda_stages import (
    Precision,
    centred_gram_stage,
    count_stage,
    device_pairs,
    device_table,
    gram_stage,
    has_kernels,
    rows_of,
    summary_stage,
    unscaling,
    view_of,
)
from ._cuda_sums import accumulate_gram, count_sums
from ._tolerances import effective_tolerances, svd_counts

__all__ = [
    "accumulate_gram",
    "count_grouped",
    "count_pairs",
    "count_scalar",
    "count_sums",
    "feature_gram",
    "intervals",
    "shifted_gram",
    "summary",
]


def _plan(op: str, A: Tensor, rtol: float | None, center: bool, **options: Any) -> Plan:
    return select_backend(op, A.dtype, *A.shape[-2:], rtol=rtol, device="cuda", center=center, **options)


def _svd_counts(op: str, A: Tensor, pairs: Tensor, center: bool) -> Tensor:
    if A.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"bsgap::{op}: rtol lies below what a float64 Gram matrix resolves (8e-7), so singular values "
            "would be computed, which waits for the device: not possible while a CUDA graph is captured "
            f"(dtype {A.dtype}, shape {tuple(A.shape)}); pass a larger rtol"
        )
    return svd_counts(A, pairs, center)


def _one_pair(A: Tensor, atol: float, rtol: float) -> Tensor:
    return torch.tensor([[atol, rtol]], dtype=torch.float64, device=A.device)


def count_scalar(op: str, A: Tensor, atol: float | None, rtol: float | None, center: bool) -> Tensor:
    """Near-rank (*,) for one pair of tolerances."""
    absolute, relative = effective_tolerances(A, atol, rtol)
    plan = _plan(op, A, relative if absolute == 0 else None, center)
    if plan.gram == "svd":
        return _svd_counts(op, A, _one_pair(A, absolute, relative), center)[..., 0]
    found, _ = centred_gram_stage([A], plan.gram, center)
    return count_stage(found, absolute, relative).counts.view(A.shape[:-2])


def count_pairs(op: str, A: Tensor, pairs: Tensor, center: bool) -> Tensor:
    """Counts (*, t) for float64 threshold pairs (*, t, 2) that broadcast with the batch of A, t > 0."""
    t = pairs.shape[-2]
    batch = torch.broadcast_shapes(A.shape[:-2], pairs.shape[:-2])
    plan = _plan(op, A, None, center, thresholds=t)
    assert plan.gram != "svd"
    found, _ = centred_gram_stage([A.expand(*batch, *A.shape[-2:])], plan.gram, center)
    shared = pairs.numel() == 2 * t
    flat = pairs.reshape(1, t, 2) if shared else pairs.expand(*batch, t, 2).reshape(-1, t, 2)
    return count_stage(found, pairs=flat.contiguous()).counts.view(*batch, t)


def count_grouped(
    op: str, As: Sequence[Tensor], atol: float | None, rtol: float | None, center: bool
) -> Tensor:
    """Near-rank (len(As),) of matrices (*, n_i), whose leading dimensions are all rows.

    All that share a dtype and an accumulation go through the Gram stage and the count stage together.
    """
    rows = [A.shape[:-1].numel() for A in As]
    tolerances = [effective_tolerances(A, atol, rtol, m) for A, m in zip(As, rows, strict=True)]
    grams = [
        select_backend(
            op,
            A.dtype,
            m,
            A.shape[-1],
            rtol=t[1] if t[0] == 0 else None,
            device="cuda",
            center=center,
        ).gram
        for A, m, t in zip(As, rows, tolerances, strict=True)
    ]
    # float64 input is looked over for extreme values first: apart, so that only it pays.
    kinds = [(gram, A.dtype == torch.float64) for gram, A in zip(grams, As, strict=True)]
    members_of = {k: [i for i, own in enumerate(kinds) if own == k] for k in dict.fromkeys(kinds)}
    parts = []
    for (gram, _), members in members_of.items():
        chosen = [As[i] for i in members]
        if gram == "svd":
            counts = [
                _svd_counts(op, As[i].flatten(0, -2), _one_pair(As[i], *tolerances[i]), center)
                for i in members
            ]
            parts.append(torch.cat(counts))
            continue
        precision: Precision = "float32" if gram == "float32" else "float64"
        found, _ = centred_gram_stage(chosen, precision, center, batch=False)
        own = [tolerances[i] for i in members]
        same = all(pair == own[0] for pair in own)
        pairs = None if same else device_pairs(own, As[0].device)
        parts.append(count_stage(found, *own[0], pairs=pairs).counts[:, 0])
    if len(parts) == 1:
        return parts[0]
    order = [i for members in members_of.values() for i in members]
    places = sorted(range(len(As)), key=order.__getitem__)
    return torch.cat(parts).index_select(0, device_table(places, As[0].device))


def intervals(
    op: str, A: Tensor, atol: float | None, rtol: float | None, center: bool, mode: str, seed: int
) -> tuple[Tensor, Tensor]:
    """Certified lower and upper bounds (*,) of the near-rank."""
    absolute, relative = effective_tolerances(A, atol, rtol)
    plan = _plan(op, A, relative if absolute == 0 else None, center, mode=mode)
    if not has_kernels():
        lower, upper = _cpu.intervals(op, A.cpu(), atol, rtol, center, mode, seed)
        return lower.to(A.device), upper.to(A.device)
    assert plan.gram != "svd"
    if plan.certificate == "probed":
        from ..triton.gram import gram_set
        from ..triton.probe import probe_error

        view = view_of(A)
        found = gram_set([view], precision="float32", table_of=device_table)
        error: Tensor | None = probe_error(view, found, seed)
    else:
        found, error = centred_gram_stage([A], plan.gram, center)
    counted = count_stage(found, absolute, relative, gram_error=error, certify=True)
    return counted.lower.view(A.shape[:-2]), counted.upper.view(A.shape[:-2])


def summary(A: Tensor, center: bool) -> Tensor:
    """Spectral summary (*, columns)."""
    if not has_kernels():
        return _cpu.summary(A.cpu(), center).to(A.device)
    found, _ = centred_gram_stage([A], "float64", center)
    counted = count_stage(found, rtol=1.0, spectrum=True)
    return summary_stage(found, counted).view(*A.shape[:-2], -1)


def feature_gram(A: Tensor, center: bool) -> Tensor:
    """AᵀA (*, n, n) in float64, about the column means if centred; NaN for non-finite input."""
    found, _ = centred_gram_stage([A], "float64", center, features_side=True)
    (row,) = rows_of(found)
    G = row.grams
    # One non-finite entry spoils its row and column only; the result says NaN everywhere, as on a CPU.
    G += torch.where(torch.isfinite(G.diagonal(dim1=-2, dim2=-1).sum(-1)), 0.0, torch.nan)[:, None, None]
    back = unscaling(found)
    if back is not None:
        G *= back[:, None, None]  # twice: its square may not be representable
        G *= back[:, None, None]
    return G.view(*A.shape[:-2], A.shape[-1], A.shape[-1])


def shifted_gram(A: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Column sums (n,) and Gram matrix (n, n) of A - shift, A (m, n), in float64."""
    found = gram_stage([A], "float64", features_side=True, shift=shift)
    (row,) = rows_of(found)
    assert row.sums is not None
    sums, G = row.sums[0], row.grams[0]
    back = unscaling(found)
    return (sums, G) if back is None else (sums * back, G * back * back)
