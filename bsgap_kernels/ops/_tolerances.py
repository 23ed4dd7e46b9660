"""torch.linalg.matrix_rank's rules for atol and rtol, and the dense fallback that both engines share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import default_rtol


def effective_tolerances(
    A: Tensor, atol: float | None, rtol: float | None, m: int | None = None
) -> tuple[float, float]:
    """torch.linalg.matrix_rank's rules: rtol defaults to eps * max(m, n), or to 0 where atol > 0.

    m: the number of rows, if it is not A.shape[-2].
    """
    atol_value = 0.0 if atol is None else float(atol)
    if rtol is None:
        rows = A.shape[-2] if m is None else m
        rtol_value = 0.0 if atol_value > 0 else default_rtol(A.dtype, rows, A.shape[-1])
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
        default = torch.full((), default_rtol(A.dtype, *A.shape[-2:]), dtype=torch.float64, device=A.device)
        relative = default if atol is None else torch.where(absolute > 0, torch.zeros_like(default), default)
    else:
        relative = _on_device(rtol, A.device)
    return torch.stack(torch.broadcast_tensors(absolute, relative), -1)


def svd_counts(A: Tensor, pairs: Tensor, center: bool) -> Tensor:
    """Counts (*, t) from float64 singular values, -1 for non-finite; pairs (*, t, 2) broadcast."""
    wide = A.double()
    # A sum is finite only if every entry is; that of huge ones may overflow all the same.
    finite = torch.isfinite(wide.sum((-2, -1)))
    if A.device.type != "cpu" or not bool(finite.all()):
        finite = torch.isfinite(wide).all(-1).all(-1)
        wide = torch.where(finite[..., None, None], wide, torch.zeros((), dtype=torch.float64))
    if center:
        wide = wide - wide.mean(-2, keepdim=True)
    sigma = torch.linalg.svdvals(wide)
    tau = torch.maximum(pairs[..., 0], pairs[..., 1] * sigma[..., :1])
    counts = (sigma[..., None, :] > tau[..., None]).sum(-1)
    return counts.masked_fill(~finite[..., None] | torch.isnan(tau), -1)
