"""Which computation serves a call: a pure function of what is known before looking at a value.

`BSGAP_PRINT_CONFIG=1` prints every distinct choice once, on standard error.

A Gram matrix known to a relative error eta moves a singular value by at most a share
d = eta / (2 tau_rel^2) around tau (docs/certificates.md). The limits below keep d under 1 % for the
largest eta measured (benchmarks/gram_error.py).
"""

from __future__ import annotations

import functools
import os
import sys
from dataclasses import dataclass
from typing import Literal

import torch

from ._core import PROBED_MIN_RTOL, PROBED_MIN_SIDE, TRIDIAGONAL_SIDE

FLOAT32_GRAM_MIN_RTOL = 8.3e-3
"""On a CPU float32 sums err by at most 23 · 2⁻²⁴ of |A|ᵀ|A| (FLOAT32_SUM_ROUNDINGS of the core). Where no
entry is negative, as after a ReLU, |A|ᵀ|A| = AᵀA, so that eta ≤ 1.4e-6 and d < 1 % from here on."""
FLOAT64_GRAM_MIN_RTOL = 8e-7
"""eta of the float64 Gram: at most 4.6e-15, so d < 0.4 % here. Below, singular values are computed."""
MAX_FACTORISATIONS = 8
"""More thresholds than this on a side past the tridiagonal regime: take all eigenvalues instead. Measured on
a CPU, like the sides of the core (benchmarks/results/crossovers-*.json)."""
CUDA_TRIDIAGONAL_SIDE = 128
"""Up to this side a block's shared memory holds the matrix (kSmallSide in csrc/cuda/count.cuh)."""
CUDA_PROBED_MIN_SIDE = 424
"""From here two float64 products with nine probes take less arithmetic than a float64 Gram matrix on the
float64 tensor cores of an H200 (67 TFLOP/s, against 790 in bfloat16; not measured)."""


@dataclass(frozen=True)
class Plan:
    """What a call will run. `gram` is the accumulation of the Gram matrix, `svd` means none is formed."""

    op: str
    device: Literal["cpu", "cuda"]
    gram: Literal["float32", "float64", "svd"]
    count: Literal["tridiagonal", "ldlt", "eigenvalues", "svd"]
    certificate: Literal["none", "rigorous", "probed"] = "none"


def default_rtol(dtype: torch.dtype, m: int, n: int) -> float:
    """torch.linalg.matrix_rank's default, eps * max(m, n); the 16-bit formats take float32's eps."""
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return eps * max(m, n)


@functools.lru_cache(maxsize=4096)
def select_backend(
    op: str,
    dtype: torch.dtype,
    m: int,
    n: int,
    *,
    rtol: float | None,
    thresholds: int = 1,
    mode: str | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    center: bool = False,
) -> Plan:
    """The plan for one matrix shape. `rtol` is None where a threshold depends on values (atol, tensors)."""
    side = min(m, n)
    # On a GPU the mean is taken off in float64, whose products then stay in float64.
    cheap = (
        dtype != torch.float64
        and rtol is not None
        and rtol >= FLOAT32_GRAM_MIN_RTOL
        and not (center and device == "cuda")
    )
    plan: Plan
    if mode is not None:
        from_side = CUDA_PROBED_MIN_SIDE if device == "cuda" else PROBED_MIN_SIDE
        probed = mode == "probed" and cheap and side >= from_side and (rtol or 0) >= PROBED_MIN_RTOL
        certificate: Literal["probed", "rigorous"] = "probed" if probed else "rigorous"
        plan = Plan(op, device, "float32" if probed else "float64", "ldlt", certificate)
    elif rtol is not None and rtol < FLOAT64_GRAM_MIN_RTOL:
        plan = Plan(op, device, "svd", "svd")
    else:
        if side <= (CUDA_TRIDIAGONAL_SIDE if device == "cuda" else TRIDIAGONAL_SIDE):
            count: Literal["tridiagonal", "ldlt", "eigenvalues"] = "tridiagonal"
        else:
            count = "ldlt" if thresholds <= MAX_FACTORISATIONS else "eigenvalues"
        plan = Plan(op, device, "float32" if cheap and count != "eigenvalues" else "float64", count)
    if os.environ.get("BSGAP_PRINT_CONFIG") == "1":
        print(f"bsgap: {plan} for {dtype} {m}x{n}, rtol={rtol}, thresholds={thresholds}", file=sys.stderr)
    return plan
