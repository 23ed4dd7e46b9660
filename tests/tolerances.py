"""Every tolerance of the tests in one place, each with the reason for its size.

Counts have no tolerance: they are tested on matrices whose singular values keep a stated margin from the
threshold (``spectra.with_count``) or lie on it exactly (``spectra.hadamard_spectrum``).
"""

from __future__ import annotations

import torch

# Unit roundoff of the arithmetic that reads an input of this dtype. Halves are converted to float32 exactly,
# so what an op loses on them is float32's rounding, not their own: the oracle gets the same rounded input.
ROUNDOFF: dict[torch.dtype, float] = {
    torch.float16: 2.0**-24,
    torch.bfloat16: 2.0**-24,
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
}

# Factor on √(terms)·roundoff for a sum of products. Rounding errors of a sum behave like a random walk: the
# bound λ·√terms·roundoff fails with probability at most about 2·exp(−λ²/2) (Higham & Mary 2019, SIAM J. Sci.
# Comput. 41(5)), 3e-8 at λ = 6. 8 leaves a third of that again for the conversion of the result.
SUM_FACTOR = 8.0

# Factor for a whole metric: its sum, then one eigenvalue solve and one closing formula, each backward stable
# with a small constant. 4 sums' worth.
METRIC_FACTOR = 4.0

# float64 oracle against a closed form or against another float64 routine: LAPACK's singular values are within
# a modest multiple of eps·max(m, n)·σ_1; with max(m, n) ≤ 600 in the tests, 600 · 2^-52 ≈ 1.3e-13, times 8.
ORACLE_RTOL = 1e-12

# How far the tests keep singular values from a threshold, relative to it, where nothing else is tested. Far
# above what the cheapest Gram can blur at rtol ≥ 1e-2 (a relative band of 1e-3), and below any ratio that
# matters.
COUNT_MARGIN = 0.05

# Truth by float64 SVD is trusted where no singular value lies this close to the threshold, relative to σ_1: a
# thousand times LAPACK's error at 600 rows.
SVD_TRUTH_MARGIN = 1e-10

# Spills of a GPU kernel, as a share of the time of one round of an innermost loop if nothing ran beside
# anything else (triton/machine_code.py). Spilled words pass through the first-level cache while the round's
# loads from memory or its float64 products, which take the other seven eighths, are under way, so the loss is
# less; more than an eighth would not be told from a slower clock. Zero is no bound: a thread has at most 255
# registers, and what a version of the compiler does with them is its own choice.
MAX_SPILL_SHARE = 0.125


def sum_rtol(dtype: torch.dtype, terms: int) -> float:
    """Relative tolerance, to the sum of magnitudes, of a sum of ``terms`` products of the dtype."""
    return SUM_FACTOR * max(terms, 1) ** 0.5 * ROUNDOFF[dtype]


def worst_sum_rtol(dtype: torch.dtype, terms: int) -> float:
    """The same where roundings may agree: one of half an ulp for each term, of whatever sign.

    For sums of squares of 16-bit numbers, whose last digits are far from random, and for equal rows.
    """
    return max(terms, 1) * ROUNDOFF[dtype]


def metric_rtol(dtype: torch.dtype, rows: int, columns: int) -> float:
    """Relative tolerance of a float metric of a (rows, columns) matrix of the dtype."""
    return METRIC_FACTOR * sum_rtol(dtype, max(rows, columns))
