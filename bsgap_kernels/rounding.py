"""Floating-point model of every bound that Python forms: csrc/core/rounding.h says the same in C++."""

from __future__ import annotations

UNIT_ROUNDOFF = 2.0**-53

SMALLEST_SUBNORMAL = 2.0**-1074

UNDERFLOW = 2.0**-1020
"""More than an entry of a sum of Gram matrices loses when a product takes it below the normal numbers."""


def gamma(n: int) -> float:
    """n u / (1 - n u), rounded up: what n roundings of float64 do to a term at most."""
    nu = n * UNIT_ROUNDOFF
    return nu / (1 - nu) * (1 + 4 * UNIT_ROUNDOFF) if nu < 0.5 else float("inf")
