"""Paper model: the shortest time of each of our ops on a CPU whose ceilings are known.

    floor = max(bytes of the input / read rate, flops of the Gram matrix / rate) + flops of the count / rate

with rates of multiply-adds, each of two flops, and k = min(m, n), for each matrix:

- Gram matrix: a triangle, max(m, n) k (k + 1), at the rate of the accumulation that the plan picks;
  probes of a certificate: A and its transpose times 9 vectors, 2 * 2 m n 9 in float64.
- near_rank and the tracker: the tridiagonal form, 4/3 k^3, up to the side where the plan takes it; above, two
  LDL^T of k^3/3 each, one for the largest eigenvalue and one for the threshold.
- near_rank_interval: three LDL^T, one for the largest eigenvalue and one for each end.

The counts run in float64. It is the floor of the algorithms that the plan takes, not of the problem: up to
the tridiagonal side near_rank is charged more for its count than an interval is. Left out: latency, Lanczos
products and bisection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .._core import TRIDIAGONAL_SIDE
from ..dispatch import select_backend
from .contenders import INTERVAL, NEAR_RANK, PROBED, TRACKER

PROBES = 9
MODES = {NEAR_RANK: None, INTERVAL: "rigorous", PROBED: "probed", TRACKER: None}
"""Our contenders and the certificate that each of them asks for."""


@dataclass(frozen=True)
class Rates:
    """Bytes per second of memory, and floating-point operations per second, of all threads together."""

    read: float
    float32: float
    float64: float

    @staticmethod
    def of_ceilings(ceilings: dict[str, Any]) -> Rates:
        """From what measure_ceilings found."""
        return Rates(ceilings["read_bytes_per_s"], ceilings["fp32_flops"], ceilings["fp64_flops"])


@dataclass(frozen=True)
class Floor:
    """Shortest times in seconds; reading and multiplying overlap."""

    read: float
    gram_math: float
    count: float

    @property
    def total(self) -> float:
        """Gram matrix, then count."""
        return max(self.read, self.gram_math) + self.count

    def milliseconds(self) -> dict[str, float]:
        """As it goes into a result."""
        parts = {**asdict(self), "total": self.total}
        return {name: round(seconds * 1e3, 6) for name, seconds in parts.items()}


def gram_flops(m: int, n: int) -> float:
    """A triangle of the Gram matrix of the smaller side."""
    k = min(m, n)
    return float(max(m, n)) * k * (k + 1)


def ldlt_flops(k: int) -> float:
    """One factorisation."""
    return k**3 / 3


def tridiagonal_flops(k: int) -> float:
    """Householder's reduction of one matrix."""
    return 4 * k**3 / 3


def count_flops(contender: str, k: int) -> float:
    """The count of one matrix, in float64."""
    if MODES[contender] is not None:
        return 3 * ldlt_flops(k)
    return tridiagonal_flops(k) if k <= TRIDIAGONAL_SIDE else 2 * ldlt_flops(k)


def floor(
    contender: str, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, rtol: float, rates: Rates
) -> Floor | None:
    """Floor of one of our contenders on matrices (*, m, n), served together.

    None for what is not ours, and where singular values are computed.
    """
    if contender not in MODES:
        return None
    read = gram_math = count = 0.0
    for shape in shapes:
        m, n = shape[-2:]
        number = torch.Size(shape[:-2]).numel()
        plan = select_backend("near_rank", dtype, m, n, rtol=rtol, mode=MODES[contender])
        if plan.gram is None:
            return None
        read += number * m * n * dtype.itemsize / rates.read
        gram_math += number * gram_flops(m, n) / (rates.float32 if plan.gram == "float32" else rates.float64)
        if plan.certificate == "probed":
            gram_math += number * 4.0 * m * n * PROBES / rates.float64
        count += number * count_flops(contender, min(m, n)) / rates.float64
    return Floor(read, gram_math, count)
