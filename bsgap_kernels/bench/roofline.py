"""Paper model: what reading a model's activations and counting their near-rank costs at least on a GPU.

A floor is arithmetic: bytes over a bandwidth, operations over a rate, the larger one where they overlap.
Nothing here touches a device; `bsgap roofline` prints it and `bsgap bench --device cuda` divides by it.

Left out: latency. A factorisation of a small matrix is a chain of dependent steps, so the count stage of
small sides takes longer than its floor; reading a Gram matrix that fits the L2 cache counts as free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .devices import Device, Rates

TRIDIAGONAL_SIDE = 128
"""Largest side that a GPU tridiagonalises in one thread block."""
LAMBDA_MAX_MATVECS = 40
"""Float64 matrix-vector products that lambda_max is charged with: 40 reads of the Gram matrix."""
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
UNFOLDS = ("channel", "flatten", "pool")


@dataclass(frozen=True)
class Site:
    """An activation (batch, channels, *positions) as a model produces it; `rows` of a sequence: tokens."""

    name: str
    channels: int
    positions: int = 1

    def matrix(self, batch: int, unfold: str) -> tuple[int, int]:
        """(m, n) of the unfolded activation."""
        if unfold == "channel":
            return batch * self.positions, self.channels
        return batch, self.channels * (self.positions if unfold == "flatten" else 1)

    def values(self, batch: int) -> int:
        """Entries that are read, whatever the unfolding makes of them."""
        return batch * self.channels * self.positions


@dataclass(frozen=True)
class Work:
    """What one matrix costs in bytes and operations (a multiply-add counts as two)."""

    m: int
    n: int
    dtype: str
    bytes_read: int
    gram_flops: float
    """Half of the Gram matrix on the smaller side: m n k."""
    lambda_max_flops: float
    lambda_max_bytes: float
    ldlt_flops: float
    """One factorisation, k^3/3: one threshold."""

    @property
    def k(self) -> int:
        """The side of the Gram matrix."""
        return min(self.m, self.n)


@dataclass(frozen=True)
class Floor:
    """Shortest times in seconds on one device."""

    read: float
    gram_math: float
    lambda_max: float
    ldlt: float

    @property
    def gram(self) -> float:
        """Reading and multiplying overlap: the longer one."""
        return max(self.read, self.gram_math)

    @property
    def count(self) -> float:
        """lambda_max and one factorisation, one after the other."""
        return self.lambda_max + self.ldlt

    @property
    def total(self) -> float:
        """Gram matrix, then count."""
        return self.gram + self.count

    @property
    def bound(self) -> str:
        """The largest part."""
        parts = {
            "memory": self.read if self.read >= self.gram_math else 0.0,
            "Gram math": self.gram_math if self.gram_math > self.read else 0.0,
            "lambda_max": self.lambda_max,
            "LDLt": self.ldlt,
        }
        return max(parts, key=lambda name: parts[name])

    def __add__(self, other: Floor) -> Floor:
        return Floor(
            self.read + other.read,
            self.gram_math + other.gram_math,
            self.lambda_max + other.lambda_max,
            self.ldlt + other.ldlt,
        )


def work(m: int, n: int, dtype: str, *, values: int | None = None) -> Work:
    """Bytes and operations of one m x n matrix; `values` are read where that is not m n (pooling)."""
    k = min(m, n)
    size = DTYPE_BYTES[dtype]
    # Up to TRIDIAGONAL_SIDE lambda_max comes by bisection from the tridiagonal form, 4/3 k^3 operations.
    tridiagonal = k <= TRIDIAGONAL_SIDE
    return Work(
        m=m,
        n=n,
        dtype=dtype,
        bytes_read=size * (m * n if values is None else values),
        gram_flops=float(m) * n * k,
        lambda_max_flops=4 / 3 * k**3 if tridiagonal else 2.0 * LAMBDA_MAX_MATVECS * k * k,
        lambda_max_bytes=0.0 if tridiagonal else 8.0 * LAMBDA_MAX_MATVECS * k * k,
        ldlt_flops=k**3 / 3,
    )


def gram_rate(dtype: str, rates: Rates) -> float:
    """Operations per second of the Gram matrix; a float32 product is one, or three of TF32."""
    if dtype == "float64":
        return max(rates.fp64, rates.fp64_tensor or 0.0)
    if dtype == "float32":
        return max(rates.fp32, rates.tf32 / 3)
    return rates.bf16


def floor(item: Work, rates: Rates, l2_bytes: int) -> Floor:
    """Shortest times of one matrix."""
    in_cache = 8 * item.k**2 <= l2_bytes
    matvec_bytes = 0.0 if in_cache else item.lambda_max_bytes
    return Floor(
        read=item.bytes_read / rates.bandwidth,
        gram_math=item.gram_flops / gram_rate(item.dtype, rates),
        lambda_max=max(matvec_bytes / rates.bandwidth, item.lambda_max_flops / rates.fp64),
        ldlt=item.ldlt_flops / max(rates.fp64, rates.fp64_tensor or 0.0),
    )


@dataclass(frozen=True)
class Line:
    """Layers of the same shape, `times` of them, named after the first."""

    name: str
    times: int
    work: Work
    floor: Floor
    """Of all `times` layers together."""


@dataclass(frozen=True)
class Roofline:
    """The floors of a model's layers on a device, in the order in which shapes first occur."""

    device: Device
    rates: Rates
    lines: tuple[Line, ...]

    @property
    def layers(self) -> int:
        """Number of matrices."""
        return sum(line.times for line in self.lines)

    @property
    def bytes_read(self) -> int:
        """Bytes of all activations."""
        return sum(line.times * line.work.bytes_read for line in self.lines)

    @property
    def floor(self) -> Floor:
        """Sums over the layers: they are served one after the other or share the device."""
        total = Floor(0.0, 0.0, 0.0, 0.0)
        for line in self.lines:
            total = total + line.floor
        return total

    @property
    def gram(self) -> float:
        """The Gram stage: layer by layer the longer of reading and multiplying."""
        return sum(line.floor.gram for line in self.lines)

    @property
    def total(self) -> float:
        """Gram stage, then count stage."""
        return self.gram + self.floor.count


def roofline(
    sites: Sequence[Site], batch: int, unfold: str, dtype: str, device: Device, rates: Rates
) -> Roofline:
    """The floors of a model; equal layers become one line, where the first of them stands."""
    lines: dict[Work, Line] = {}
    for site in sites:
        item = work(*site.matrix(batch, unfold), dtype, values=site.values(batch))
        once = floor(item, rates, device.l2_bytes)
        first = lines.get(item)
        if first is None:
            lines[item] = Line(site.name, 1, item, once)
        else:
            lines[item] = Line(first.name, first.times + 1, item, first.floor + once)
    return Roofline(device, rates, tuple(lines.values()))


def floor_of_shapes(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, rates: Rates, l2_bytes: int
) -> Floor:
    """Floor of a benchmark case, matrices (*, m, n): all reading overlaps all multiplying."""
    total = Floor(0.0, 0.0, 0.0, 0.0)
    name = str(dtype).removeprefix("torch.")
    for shape in shapes:
        once = floor(work(shape[-2], shape[-1], name), rates, l2_bytes)
        number = torch.Size(shape[:-2]).numel()
        total = total + Floor(
            number * once.read, number * once.gram_math, number * once.lambda_max, number * once.ldlt
        )
    return total
