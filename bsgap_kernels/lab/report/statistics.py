"""Means over seeds with Student's t intervals; an interval needs two seeds at least."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """Mean of `count` values; `half` is half the width of its 95 % interval, None with a single value."""

    mean: float
    half: float | None
    count: int

    @property
    def lower(self) -> float:
        """Lower end of the interval; the mean itself where there is none."""
        return self.mean - (self.half or 0.0)

    @property
    def upper(self) -> float:
        """Upper end of the interval; the mean itself where there is none."""
        return self.mean + (self.half or 0.0)

    @property
    def covers_zero(self) -> bool:
        """Whether 0 lies in the interval: no difference can be told from it. Never without an interval."""
        return self.half is not None and abs(self.mean) <= self.half


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and interval t(0.975, n − 1)·s/√n of finite `values`, s² with n − 1; None of no values.

    Independent values with a normal distribution are assumed, as for every t interval.
    """
    count = len(values)
    if count == 0:
        return None
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, None, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return Estimate(mean, t_quantile(count - 1) * deviation / math.sqrt(count), count)


def paired_difference(first: Mapping[int, float], last: Mapping[int, float]) -> Estimate | None:
    """Mean of last − first over the seeds that both have; None where they have none in common.

    Runs of one seed share initial weights and the order of the data, so they are compared with one another.
    """
    return estimate([last[seed] - first[seed] for seed in sorted(first) if seed in last])


@functools.cache
def t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """t with P(|T| ≤ t) = `confidence` for Student's t of `degrees` ≥ 1 degrees of freedom.

    Bisection on the angle arctan(t/√degrees), in which P is a finite sum (Abramowitz and Stegun, 26.7.3 and
    26.7.4); needs no SciPy.
    """
    low, high = 0.0, 0.5 * math.pi
    for _ in range(60):
        middle = 0.5 * (low + high)
        if _central_probability(middle, degrees) < confidence:
            low = middle
        else:
            high = middle
    return math.tan(low) * math.sqrt(degrees)


def _central_probability(angle: float, degrees: int) -> float:
    """P(|T| ≤ √degrees·tan(angle))."""
    cosine = math.cos(angle)
    odd = degrees % 2 == 1
    term, total = (cosine if odd else 1.0), 0.0
    # Powers of the cosine up to degrees − 2, each coefficient from the one before.
    for power in range(1 if odd else 0, degrees - 1, 2):
        total += term
        term *= cosine * cosine * (power + 1) / (power + 2)
    part = math.sin(angle) * total
    return 2 / math.pi * (angle + part) if odd else part
