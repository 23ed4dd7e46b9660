"""torch.linalg.matrix_rank's rules for atol and rtol, and counts by torch's solvers."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch


def effective_tolerances(
    A: Tensor, atol: float | None, rtol: float | None, m: int | None = None
) -> tuple[float, float]:
    """torch.linalg.matrix_rank's rules: rtol defaults to eps * max(m, n), or to 0 where atol > 0.

    m: the number of rows, if it is not A.shape[-2].
    """
    atol_value = 0.0 if atol is None else float(atol)
    if rtol is None:
        rows = A.shape[-2] if m is None else m
        rtol_value = 0.0 if atol_value > 0 else dispatch.default_rtol(A.dtype, rows, A.shape[-1])
    else:
        rtol_value = float(rtol)
    return atol_value, rtol_value


def _on_device(value: Tensor, device: torch.device) -> Tensor:
    """In float64. A scalar on the CPU travels as a kernel's parameter: a copy would wait for the GPU."""
    if value.device.type == "cpu" and device.type != "cpu":
        return torch.full((), float(value), dtype=torch.float64, device=device)
    return value.to(device, torch.float64)


def threshold_pairs(A: Tensor, atol: Tensor | None, rtol: Tensor | None) -> Tensor:
    """(atol, rtol) pairs in float64, shape (*, 2), by the same rules for tensors."""
    absolute = (
        torch.zeros((), dtype=torch.float64, device=A.device) if atol is None else _on_device(atol, A.device)
    )
    if rtol is None:
        default = torch.full(
            (), dispatch.default_rtol(A.dtype, *A.shape[-2:]), dtype=torch.float64, device=A.device
        )
        relative = default if atol is None else torch.where(absolute > 0, torch.zeros_like(default), default)
    else:
        relative = _on_device(rtol, A.device)
    return torch.stack(torch.broadcast_tensors(absolute, relative), -1)


def scalar_pair(A: Tensor, atol: float, rtol: float) -> Tensor:
    """(1, 2) float64 on A's device, by kernels that carry the values: a copy would wait for a GPU."""
    return torch.stack([torch.full((1,), x, dtype=torch.float64, device=A.device) for x in (atol, rtol)], -1)


def eigenvalue_counts(op: str, A: Tensor, pairs: Tensor, center: bool) -> Tensor:
    """Counts (*, t) from the eigenvalues of the float64 Gram matrix, or what resolves all pairs (*, t, 2)."""
    lam, exponent = torch.ops.bsgap._eigenvalues(A, center)
    finite = (exponent != torch.iinfo(torch.int32).min)[:, None]
    sigma = torch.ldexp(lam.flip(-1).clamp_min(0).sqrt(), -exponent[:, None].where(finite, 0))
    sigma = sigma.masked_fill(~finite, torch.nan).view(*A.shape[:-2], -1)
    counts, tau = _counts_above(sigma, pairs)
    return (
        counts
        if dispatch.resolved(op, A, (tau / sigma[..., :1]).nan_to_num(torch.inf))
        else svd_counts(op, A, pairs, center)
    )


def svd_counts(op: str, A: Tensor, pairs: Tensor, center: bool) -> Tensor:
    """Counts (*, t) from float64 singular values, -1 for non-finite; pairs (*, t, 2) broadcast."""
    if dispatch.device_kind(A) == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"bsgap::{op}: rtol lies below what a float64 Gram matrix resolves (8e-7), so singular values "
            "would be computed, which waits for the device: not possible while a CUDA graph is captured "
            f"(dtype {A.dtype}, shape {tuple(A.shape)}); pass a larger rtol"
        )
    wide = A.double()
    # A sum is finite only if every entry is; that of huge ones may overflow all the same.
    finite = torch.isfinite(wide.sum((-2, -1)))
    if A.device.type != "cpu" or not bool(finite.all()):
        finite = torch.isfinite(wide).all(-1).all(-1)
        wide = torch.where(finite[..., None, None], wide, torch.zeros((), dtype=torch.float64))
    if center:
        wide = wide - wide.mean(-2, keepdim=True)
    counts, _ = _counts_above(torch.linalg.svdvals(wide), pairs)
    return counts.masked_fill(~finite[..., None], -1)


def _counts_above(sigma: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and thresholds (*, t) from singular values (*, k), descending; -1 where one is NaN."""
    tau = torch.maximum(pairs[..., 0], pairs[..., 1] * sigma[..., :1])
    counts = (sigma[..., None, :] > tau[..., None]).sum(-1)
    return counts.masked_fill(torch.isnan(sigma[..., :1]) | torch.isnan(tau), -1), tau
