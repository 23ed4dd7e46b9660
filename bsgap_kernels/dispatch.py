"""Which computation serves a call: a pure function of what is known before looking at a value.

`BSGAP_PRINT_CONFIG=1` prints every distinct choice once, on standard error.

A Gram matrix known to a relative error eta moves a singular value by at most a share
d = eta / (2 tau_rel^2) around tau (docs/certificates.md). Sums of c roundings with the unit u give
eta <= gamma_c = c u / (1 - c u) where no entry is negative; the limits below keep d under 1 % then, but for
what CUDA_FLOAT32_GRAM_MIN_RTOL says of 16-bit input. For entries of both signs eta is measured
(benchmarks/gram_error.py).
"""

from __future__ import annotations

import functools
import math
import os
import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from . import _native
from ._core import PROBED_MIN_SIDE, TRIDIAGONAL_SIDE, gram_roundings

Device = Literal["cpu", "cuda"]

FLOAT32_GRAM_MIN_RTOL = 8.3e-3
"""On a CPU float32 sums err by at most 23 · 2⁻²⁴ of |A|ᵀ|A| (FLOAT32_SUM_ROUNDINGS of the core). Where no
entry is negative, as after a ReLU, |A|ᵀ|A| = AᵀA, so that eta ≤ 1.4e-6 and d < 1 % from here on."""
CUDA_FLOAT32_GRAM_MIN_RTOL = 9.95e-3
"""The same on the tensor cores of Hopper and Blackwell, which truncate: by a published model of them, not yet
measured here (docs/certificates.md). 64 products of float32 input lose at most 16.6 · 2⁻²³ of |A|ᵀ|A|. 256
products of 16-bit input lose 16 · 2⁻²³ to 16 truncations, and up to 80 · 2⁻²³ in all (d < 4.9 %) where most
are far below the sum they are added to."""
SUMMED_GRAM_MIN_RTOL = 1e-5
"""The least rtol of Gram matrices that were summed up elsewhere: 0.5 % at 9,000 roundings."""
MAX_FACTORISATIONS = 8
"""More thresholds than this on a side past the tridiagonal regime: take all eigenvalues instead. Measured on
a CPU, like the sides of the core (benchmarks/results/crossovers-*.json)."""
CUDA_PROBED_MIN_SIDE = 424
"""From here two float64 products with nine probes take less arithmetic than a float64 Gram matrix on the
float64 tensor cores of an H200 (67 TFLOP/s, against 790 in bfloat16; not measured)."""


@dataclass(frozen=True)
class Plan:
    """The computations of one call.

    gram: accumulation of the Gram matrix, None where none is formed. count: our kernels or a solver of torch,
    "eigvalsh" without a Gram matrix where A itself is Hermitian.
    """

    op: str
    device: Device
    gram: Literal["float32", "float64"] | None
    count: Literal["kernels", "eigvalsh", "svdvals"]
    certificate: Literal["none", "rigorous", "probed"] = "none"


@functools.lru_cache(maxsize=4096)
def float64_gram_min_rtol(m: int, n: int, device: Device = "cpu") -> float:
    """The least rtol for which a float64 Gram matrix is taken: there its sums keep d under 0.5 %.

    The other half of 1 % is for the count's own rounding, which is measured. c grows with the chunks of rows.
    """
    side, depth = sorted((m, n))
    # On a GPU as `gram_roundings` in triton/config.py, for any of its plans.
    c = gram_roundings(depth, side) if device == "cpu" else min(128, depth) + math.ceil(depth / 8) + 34
    unit = c * 2.0**-53
    return math.sqrt(100 * unit / (1 - unit))


def largest_rank(m: int, n: int, center: bool = False) -> int:
    """The most singular values above a threshold that an m x n matrix can have: centring takes one row's."""
    return max(0, min(m - 1 if center else m, n))


def default_rtol(dtype: torch.dtype, m: int, n: int) -> float:
    """torch.linalg.matrix_rank's default, eps * max(m, n); the 16-bit formats take float32's eps."""
    eps = torch.finfo(torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32).eps
    return eps * max(m, n)


@functools.lru_cache(maxsize=4096)
def select_backend(
    op: str,
    dtype: torch.dtype,
    m: int,
    n: int,
    rtol: float | None,
    center: bool = False,
    device: Device = "cpu",
    *,
    thresholds: int = 1,
    mode: str | None = None,
    hermitian: bool = False,
) -> Plan:
    """The plan for one matrix shape. `rtol` is None where a threshold depends on values (atol, tensors)."""
    side = min(m, n)
    # On a GPU the mean is taken off in float64, whose products then stay in float64.
    cheap = dtype != torch.float64 and float32_sums_serve(rtol, device) and not (center and device == "cuda")
    plan: Plan
    if mode is not None:
        from_side = CUDA_PROBED_MIN_SIDE if device == "cuda" else PROBED_MIN_SIDE
        probed = mode == "probed" and cheap and side >= from_side
        certificate: Literal["probed", "rigorous"] = "probed" if probed else "rigorous"
        plan = Plan(op, device, "float32" if probed else "float64", "kernels", certificate)
    elif rtol is not None and rtol < float64_gram_min_rtol(m, n, device):
        plan = Plan(op, device, None, "eigvalsh" if hermitian else "svdvals")
    elif (device == "cuda" and not _native.has_cuda_kernels()) or (
        device == "cpu" and side > TRIDIAGONAL_SIDE and thresholds > MAX_FACTORISATIONS
    ):
        plan = Plan(op, device, "float64", "eigvalsh")
    else:
        plan = Plan(op, device, "float32" if cheap else "float64", "kernels")
    if os.environ.get("BSGAP_PRINT_CONFIG") == "1":
        print(f"bsgap: {plan} for {dtype} {m}x{n}, rtol={rtol}, thresholds={thresholds}", file=sys.stderr)
    return plan


def plan_of(
    op: str,
    A: Tensor,
    rtol: float | None,
    center: bool,
    rows: int | None = None,
    *,
    hermitian: bool = False,
    **options: Any,
) -> Plan:
    """`select_backend` for the matrices of A (*, m, n). rows: m, if it is not A.shape[-2]."""
    m, n = A.shape[-2:]
    return select_backend(
        op, A.dtype, rows or m, n, rtol, center, device_kind(A), hermitian=hermitian, **options
    )


@functools.lru_cache(maxsize=4096)
def plan_of_sums(
    op: str, dtype: torch.dtype, rtol: float, device: Device, *, exact: bool = False, certify: bool = False
) -> Plan:
    """The plan for Gram matrices that are added up as activations appear, and then counted at rtol.

    exact: more is asked than a count at rtol, such as bounds, eigenvalues, column sums or an absolute
    threshold. Then sums are float64.
    """
    cheap = dtype != torch.float64 and float32_sums_serve(rtol, device) and not (exact or certify)
    gram: Literal["float32", "float64"] = "float32" if cheap else "float64"
    plan = Plan(op, device, gram, "kernels", "rigorous" if certify else "none")
    if os.environ.get("BSGAP_PRINT_CONFIG") == "1":
        print(f"bsgap: {plan} for {dtype} added up, rtol={rtol}", file=sys.stderr)
    return plan


def device_kind(A: Tensor) -> Device:
    """Whose kernels serve the tensor. Tests run those of CUDA on the CPU."""
    return "cuda" if A.is_cuda else "cpu"


def float32_sums_serve(rtol: float | None, device: Device) -> bool:
    """Return true if counts at rtol may come from float32 sums, for input that is not float64."""
    return rtol is not None and rtol >= float32_min_rtol(device)


def float32_min_rtol(device: Device) -> float:
    """Return the least rtol at which counts may come from float32 sums."""
    return CUDA_FLOAT32_GRAM_MIN_RTOL if device == "cuda" else FLOAT32_GRAM_MIN_RTOL


def resolved(
    op: str, A: Tensor, smallest_tau: Tensor, rows: int | None = None, *, hermitian: bool = False
) -> bool:
    """Return false, and print the new plan, where a float64 Gram matrix did not resolve a threshold.

    smallest_tau (*,): the least threshold of each matrix of A, as a share of sigma_max. Not looked at on a
    GPU, where that would wait for the device. rows: m, if it is not A.shape[-2].
    """
    m, n = rows or A.shape[-2], A.shape[-1]
    if device_kind(A) == "cuda" or float(smallest_tau.min()) >= float64_gram_min_rtol(m, n):
        return True
    plan_of(op, A, 0.0, False, rows, hermitian=hermitian)  # prints it
    return False
