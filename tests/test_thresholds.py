"""Thresholds at the edge of their range, in every path that counts: the rule is written beside each op.

τ = max(atol, rtol·σ_max). NaN gives -1; a negative τ lies below every singular value, which are min(m, n);
rtol ≥ 1 and an infinite τ lie above; everything else is #{σ > τ}.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
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


INF, NAN = math.inf, math.nan


def expected(sigma: list[float], threshold: float, relative: bool) -> int:
    """The rule of this file, from singular values that are exact."""
    if math.isnan(threshold):
        return -1
    if threshold < 0:
        return len(sigma)
    if relative and threshold >= 1:
        return 0
    tau = threshold * max(sigma) if relative else threshold
    return sum(s > tau for s in sigma)


def with_sigma(shape: tuple[int, int], sigma: list[float], dtype: torch.dtype) -> Tensor:
    A = torch.zeros(shape, dtype=dtype)
    A[range(len(sigma)), range(len(sigma))] = torch.tensor(sigma, dtype=dtype)
    return A


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 4), (20, 70), (100, 80), (80, 100)])
@pytest.mark.parametrize("relative", [True, False])
def test_the_rule_of_thresholds(shape: tuple[int, int], dtype: torch.dtype, relative: bool) -> None:
    asked = [-INF, -1.0, -0.0, 0.0, 0.25, 0.99, 1.0, 2.0, INF, NAN]
    zeros = torch.zeros(shape, dtype=dtype)
    cases = [
        (zeros, [0.0] * min(shape), False),
        (zeros + 3, [0.0] * min(shape), True),  # equal rows
        (with_sigma(shape, [1.0, 0.5, 0.125], dtype), [1.0, 0.5, 0.125] + [0.0] * (min(shape) - 3), False),
    ]
    for A, sigma, center in cases:
        for together in ([t] for t in asked):
            for thresholds in (together, together * 2, together * 9, together + asked):
                found = bsgap.singular_value_counts(
                    A, torch.tensor(thresholds), relative=relative, center=center
                )
                # Without a gap a threshold of 0 asks for rounding: the singular values here are exact.
                assert found.tolist() == [expected(sigma, t, relative) for t in thresholds]


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (100, 80)])
def test_singular_values_beyond_the_largest_double(shape: tuple[int, int]) -> None:
    small = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).clamp(-1, 1)
    A = small * 1.7e308
    sigma = torch.linalg.svdvals(small)
    assert float(sigma[0]) > 2
    assert not math.isfinite(float(sigma[0]) * 1.7e308)
    for rtol in (1e-13, 1e-8, 1e-2, 0.3, 0.7):
        assert set(counts_by_every_path(A, rtol)) == {int((sigma > rtol * sigma[0]).sum())}
    for atol in (1e300, 1e307, 5e307, 1.5e308):
        count = int((sigma > atol / 1.7e308).sum())
        many = torch.full((12,), atol, dtype=torch.float64)
        assert int(bsgap.near_rank(A, atol=atol)) == count
        assert int(bsgap.near_rank(A, atol=torch.tensor(atol, dtype=torch.float64))) == count
        assert bsgap.near_rank_grouped([A], atol=atol).tolist() == [count]
        assert [int(bound) for bound in bsgap.near_rank_interval(A, atol=atol)] == [count, count]
        for thresholds in (many[:1], many):
            found = bsgap.singular_value_counts(A, thresholds, relative=False)
            assert found.tolist() == [count] * len(thresholds)
    centred = small - small.mean(0)
    assert int(bsgap.near_rank(A, rtol=1e-9, center=True)) == int(
        (torch.linalg.svdvals(centred) > 1e-9 * torch.linalg.svdvals(centred)[0]).sum()
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(50, 7), (5, 70), (300, 200), (2, 3), (1, 4)])
def test_equal_rows_have_no_rank_when_centred(shape: tuple[int, int], dtype: torch.dtype) -> None:
    # The mean of entries 0.1 is none of them in float64.
    A = torch.full(shape, 0.1, dtype=dtype)
    for rtol in (None, 0.0, 1e-12, 1e-9, 1e-2):
        tolerance = None if rtol is None else torch.tensor(rtol)
        assert int(bsgap.near_rank(A, rtol=rtol, center=True)) == 0
        assert int(bsgap.near_rank(A, rtol=tolerance, center=True)) == 0
        assert bsgap.near_rank_grouped([A], rtol=rtol, center=True).tolist() == [0]
        assert [int(bound) for bound in bsgap.near_rank_interval(A, rtol=rtol, center=True)] == [0, 0]
    assert float(bsgap.near_rank_ratio(A, center=True)) == 0


@pytest.mark.parametrize("mean", [0.0, 1e6, 2.0**52])
def test_the_covariance_beside_a_large_mean(mean: float) -> None:
    A = (torch.arange(1000, dtype=torch.float64) % 7)[:, None] * torch.tensor(
        [1.0, 2.0, -3.0]
    ).double() + mean
    exact = torch.cov((A - mean).mT)  # the subtraction is exact
    torch.testing.assert_close(bsgap.covariance(A), exact, rtol=1e-14, atol=0)
    torch.testing.assert_close(bsgap.gram(A, center=True), exact * 999, rtol=1e-14, atol=0)


@pytest.mark.parametrize("shape", [(6, 9), (9, 9), (9, 6), (80, 100), (1, 5)])
def test_centring_takes_one_from_the_largest_count(shape: tuple[int, int]) -> None:
    A = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    most = min(shape[0] - 1, shape[1])
    for rtol in (0.0, 1e-17, 1e-9, 1e-3):
        assert int(bsgap.near_rank(A, rtol=rtol, center=True)) == most
        assert int(bsgap.near_rank(A, rtol=torch.tensor(rtol, dtype=torch.float64), center=True)) == most
        assert bsgap.near_rank_grouped([A, A], rtol=rtol, center=True).tolist() == [most, most]
        assert float(bsgap.near_rank_ratio(A, rtol=rtol, center=True)) == (1 if most else 0)
        lower, upper = bsgap.near_rank_interval(A, rtol=rtol, center=True)
        assert 0 <= int(lower) <= most <= int(upper) <= most
        thresholds = torch.tensor([rtol, -1.0], dtype=torch.float64)
        assert bsgap.singular_value_counts(A, thresholds, center=True).tolist() == [most, min(shape)]
        accumulated = bsgap.SpectralAccumulator(rtol=max(rtol, 1e-3), center=True)
        record = accumulated.update(A.float()).compute()
        assert record.upper == most
        assert record.ratio == (1 if most else 0)


@pytest.mark.parametrize("number", [np.float64(0.25), np.float32(0.25), np.float16(0.25), np.int64(0), 0])
def test_scalars_of_numpy_are_numbers(number: float) -> None:
    A = torch.randn(9, 6, generator=torch.Generator().manual_seed(2))
    for option in ("rtol", "atol"):
        plain, given = {option: float(number)}, {option: number}
        assert bsgap.near_rank(A, **given) == bsgap.near_rank(A, **plain)
        assert bsgap.near_rank_ratio(A, **given) == bsgap.near_rank_ratio(A, **plain)
        assert bsgap.near_rank_interval(A, **given) == bsgap.near_rank_interval(A, **plain)
        assert bsgap.near_rank_grouped([A], **given) == bsgap.near_rank_grouped([A], **plain)
    mixed = bsgap.near_rank(A, atol=torch.tensor(0.1), rtol=number)
    assert mixed == bsgap.near_rank(A, atol=torch.tensor(0.1), rtol=float(number))


@pytest.mark.parametrize("flag", [True, np.bool_(True), torch.tensor(True)])
@pytest.mark.parametrize("option", ["rtol", "atol"])
def test_a_bool_is_no_tolerance(flag: object, option: str) -> None:
    A = torch.randn(4, 3)
    given: dict[str, Any] = {option: flag}
    for call in (bsgap.near_rank, bsgap.near_rank_ratio, bsgap.near_rank_interval):
        with pytest.raises(TypeError, match=f"{option} must be a "):
            call(A, **given)
    with pytest.raises(TypeError, match=f"{option} must be a "):
        bsgap.near_rank_grouped([A], **given)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensors_of_another_device_are_refused(shape: tuple[int, ...]) -> None:
    A, elsewhere = torch.randn(4, 3), torch.full(shape, 0.1, device="meta")
    for option in ("rtol", "atol"):
        given: dict[str, Any] = {option: elsewhere}
        for call in (bsgap.near_rank, bsgap.near_rank_ratio):
            with pytest.raises(ValueError, match=rf"{option} must be on the device of A \(cpu\), got meta"):
                call(A, **given)
        for op in (torch.ops.bsgap.near_rank, torch.ops.bsgap.near_rank_ratio):
            with pytest.raises(RuntimeError, match=rf"{option} must be on the device of A \(cpu\), got meta"):
                op(A, **given)
    if shape:
        with pytest.raises(ValueError, match="thresholds must be on the device of A"):
            bsgap.singular_value_counts(A, elsewhere)
    # A number on the CPU travels to any device, as it does in arithmetic.
    assert bsgap.near_rank(A.to("meta"), rtol=torch.tensor(0.1)).device.type == "meta"


def test_raw_ops_take_no_options_a_number_or_a_tensor() -> None:
    A = torch.randn(30, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    A[:, 7] = 0
    op = torch.ops.bsgap.near_rank
    assert int(op(A)) == int(op.default(A)) == int(op.tensor(A)) == 19
    assert int(op(A, rtol=0.5)) == int(op(A, rtol=torch.tensor(0.5))) == int(bsgap.near_rank(A, rtol=0.5))


def test_the_tracker_refuses_what_counts_nothing() -> None:
    for rtol in (1.0, 1.5):
        with pytest.raises(ValueError, match=r"rtol: got 1\.\d, expected less than 1"):
            bsgap.SpectralAccumulator(rtol=rtol)
