"""torch.linalg.matrix_rank's rules for atol and rtol."""

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
