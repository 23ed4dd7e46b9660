"""What random-matrix theory predicts for the near-rank of a matrix of independent normal entries."""

from __future__ import annotations

import functools
import math

# Midpoints of the integral over the bulk; the integrand is smooth, and tests ask for 1e-6 of the result.
_NODES = 4000


@functools.cache
def marchenko_pastur_near_rank(
    rows: int, columns: int, *, rtol: float, atol: float | None = None, center: bool = False
) -> float:
    """Expected #{σ > max(atol, rtol·σ_max)} of a rows × columns matrix of standard normal entries.

    k·P(σ > τ) with k = min(rows, columns), β = k/max(rows, columns) and σ = √max·√x, where x has the
    Marchenko–Pastur density √((b − x)(x − a))/(2πβx) on [a, b] = [(1 − √β)², (1 + √β)²]; σ_max is the upper
    edge √rows + √columns. With x = 1 + β + 2√β·cos θ the integral is ∫ (2/π)·sin²θ/x dθ, without the poles
    of the density. `center` takes the column means out, which leaves a matrix of rows − 1 rows.

    The law holds for large matrices; at finite size the count of one matrix differs by O(1), most near the
    edges. Cost: 4,000 evaluations, no matrix. 0 for an empty matrix.
    Source: Marchenko and Pastur (1967), Mathematics of the USSR-Sbornik 1, 457.
    """
    rows -= int(center)
    small, large = min(rows, columns), max(rows, columns)
    if small <= 0:
        return 0.0
    root = math.sqrt(small / large)
    edge = math.sqrt(large) * (1 + root)
    threshold = max(rtol * edge, atol or 0.0)
    if threshold >= edge:
        return 0.0
    # cos θ at the threshold; everything left of it (θ larger) is not counted.
    cosine = (threshold * threshold / large - 1 - root * root) / (2 * root)
    end = math.pi if cosine <= -1 else math.acos(cosine)
    width = end / _NODES
    total = 0.0
    for index in range(_NODES):
        angle = (index + 0.5) * width
        total += math.sin(angle) ** 2 / (1 + root * root + 2 * root * math.cos(angle))
    return small * min(2 / math.pi * width * total, 1.0)
