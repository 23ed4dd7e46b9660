"""The report's own mathematics: t intervals against SciPy, the Marchenko–Pastur law against samples."""

from __future__ import annotations

import math

import pytest
import torch

from bsgap_kernels import near_rank
from bsgap_kernels.lab.report.null import marchenko_pastur_near_rank
from bsgap_kernels.lab.report.statistics import estimate, paired_difference, t_quantile


@pytest.mark.parametrize("degrees", [*range(1, 31), 99, 1000])
def test_quantiles_are_those_of_scipy(degrees):
    stats = pytest.importorskip("scipy.stats")
    assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-9)


def test_an_interval_by_hand():
    found = estimate([1.0, 2.0, 6.0])
    assert (found.mean, found.count) == (3.0, 3)
    # t(0.975, 2) = 4.3027 of every table; s = √7.
    assert found.half == pytest.approx(4.3027 * math.sqrt(7 / 3), rel=1e-4)
    assert (found.lower, found.upper) == (3 - found.half, 3 + found.half)


def test_one_value_has_no_interval_and_none_no_mean():
    assert estimate([0.5]).half is None
    assert not estimate([0.0]).covers_zero
    assert estimate([]) is None


def test_the_interval_covers_the_mean_as_often_as_it_says():
    generator = torch.Generator().manual_seed(5)
    samples = torch.randn(4000, 3, dtype=torch.float64, generator=generator) + 7
    covered = 0
    for row in samples.tolist():
        found = estimate(row)
        covered += found.lower <= 7 <= found.upper
    # Four standard deviations of a binomial of 4,000 at 0.95 are 55.
    assert abs(covered - 3800) <= 55


def test_differences_are_of_common_seeds():
    found = paired_difference({0: 1.0, 1: 5.0, 2: 2.0}, {1: 8.0, 2: 4.0, 9: 100.0})
    assert (found.mean, found.count) == (2.5, 2)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    assert paired_difference({0: 1.0, 1: 2.0}, {0: 2.0, 1: 1.0}).covers_zero


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "rtol", "atol"),
    [
        (512, 84, 0.4, None),
        (300, 300, 1e-2, None),
        (300, 300, 0.3, None),
        (100, 700, 0.55, None),
        (256, 400, 0.1, 12.0),
        (200, 50, 1e-2, None),
    ],
)
def test_the_law_is_what_gaussian_matrices_count(rows, columns, rtol, atol, center):
    matrices = torch.randn(24, rows, columns, generator=torch.Generator().manual_seed(rows + columns))
    counts = near_rank(matrices, rtol=rtol, atol=atol, center=center).double()
    predicted = marchenko_pastur_near_rank(rows, columns, rtol=rtol, atol=atol, center=center)
    # σ_max of a sample fluctuates about the edge by n^(-2/3), which moves the threshold: one count at most.
    assert abs(float(counts.mean()) - predicted) < 1.0
    if not center:
        assert 0 < predicted <= min(rows, columns)


def test_the_ends_of_the_law():
    assert marchenko_pastur_near_rank(512, 84, rtol=1e-2) == pytest.approx(84, abs=1e-9)
    assert marchenko_pastur_near_rank(64, 64, rtol=0) == pytest.approx(64, abs=1e-6)
    assert marchenko_pastur_near_rank(64, 64, rtol=1.0) == 0
    assert marchenko_pastur_near_rank(64, 64, rtol=0, atol=1e9) == 0
    assert marchenko_pastur_near_rank(0, 64, rtol=0.1) == 0
    assert marchenko_pastur_near_rank(1, 64, rtol=0.1, center=True) == 0
    # The bulk at a quarter of its edge, square: P(σ > s·edge) of the quarter circle law.
    s = 0.25
    share = 1 - 2 / math.pi * (math.asin(s) + s * math.sqrt(1 - s * s))
    assert marchenko_pastur_near_rank(1000, 1000, rtol=s) == pytest.approx(1000 * share, rel=1e-6)
