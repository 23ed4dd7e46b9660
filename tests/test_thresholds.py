"""Thresholds at the edge of their range, in every path that counts: the rule is written beside each op.

τ = max(atol, rtol·σ_max). NaN gives -1; a negative τ lies below every singular value, which are min(m, n);
rtol ≥ 1 and an infinite τ lie above; everything else is #{σ > τ}.
"""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

import bsgap_kernels as bsgap

SHAPES = ((1, 1), (4, 4), (50, 30), (30, 50), (100, 128), (300, 200))
"""Sides of the tridiagonal form and of the factorisation, both orientations."""


def counts_by_every_path(A: Tensor, rtol: float) -> list[int]:
    """Near-rank of A at one rtol from each op that counts, and from few and many thresholds at once."""
    one, many = (torch.tensor([rtol] * t, dtype=torch.float64) for t in (1, 12))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [
            int(bsgap.near_rank(A, rtol=rtol)),
            int(bsgap.near_rank(A, rtol=torch.tensor(rtol, dtype=torch.float64))),
            int(bsgap.near_rank(A.expand(2, *A.shape), rtol=one.expand(3, 1))[2, 1]),
            *bsgap.near_rank_grouped([A, A[:1]], rtol=rtol).tolist()[:1],
            int(bsgap.near_rank_ratio(A, rtol=rtol) * min(A.shape)),
            *(int(bound) for bound in bsgap.near_rank_interval(A, rtol=rtol)),
            *bsgap.singular_value_counts(A, one).tolist(),
            *bsgap.singular_value_counts(A, many).tolist(),
        ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rtol", [1.0, math.nextafter(1.0, 2.0), 1.5, 1e300])
def test_no_singular_value_exceeds_the_largest(
    shape: tuple[int, int], dtype: torch.dtype, rtol: float
) -> None:
    A = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    assert set(counts_by_every_path(A, rtol)) == {0}
    assert set(counts_by_every_path(torch.zeros_like(A), rtol)) == {0}
