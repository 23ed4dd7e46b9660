"""SpectralAccumulator: rows in any chunks give the numbers, and a proof, of the one matrix they make."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import spectra
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bsgap_kernels import reference
from bsgap_kernels.tracking import METRICS, SiteRecord, SpectralAccumulator
from bsgap_kernels.tracking.records import ABOUT_THE_MEAN
from bsgap_kernels.tracking.sums import Sums

RTOL = 1e-2


def accumulated(chunks: list[Tensor], **options: Any) -> SpectralAccumulator:
    accumulator = SpectralAccumulator(**options)
    for chunk in chunks:
        accumulator.update(chunk)
    return accumulator


def cut(A: Tensor, places: list[int]) -> list[Tensor]:
    """Rows of A in chunks that end at these places (repeated ones give empty chunks) and at the end."""
    ends = [0, *sorted(place % (len(A) + 1) for place in places), len(A)]
    return [A[a:b] for a, b in itertools.pairwise(ends)]


def count(A: Tensor, rtol: float = RTOL, atol: float = 0.0) -> int:
    """Near-rank by float64 singular values; the test is void if one lies at the threshold."""
    sigma = torch.linalg.svdvals(A.double())
    tau = max(atol, rtol * float(sigma[0]))
    assert ((sigma / tau - 1).abs() > 1e-5).all(), "a singular value lies at the threshold: another seed"
    return int((sigma > tau).sum())


def proves(record: SiteRecord, truth: int) -> None:
    assert (record.lower, record.near_rank, record.upper) == (truth, truth, truth)


# Chunks


@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from([(40, 12), (9, 30), (1, 5), (64, 64), (300, 7)]),
    places=st.lists(st.integers(0, 400), max_size=9),
    center=st.booleans(),
    seed=st.integers(0, 3),
)
def test_any_chunks_give_the_count_of_all_rows(
    shape: tuple[int, int], places: list[int], center: bool, seed: int
) -> None:
    A = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    A = A * torch.logspace(0, -3, shape[1], dtype=torch.float64)
    record = accumulated(cut(A, places), center=center).compute()
    if center and shape[0] == 1:
        assert (record.near_rank, record.lower) == (0, 0)
        return
    proves(record, count(A - A.mean(0) if center else A))
    assert record.shape == shape
    assert record.ratio == record.near_rank / min(shape[0] - center, shape[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n"), [(96, 24), (10, 24)])
def test_dtypes_and_fewer_rows_than_features(dtype: torch.dtype, m: int, n: int) -> None:
    truth = min(m, n) // 2
    A = spectra.with_count(m, n, truth, 0.1, margin=0.2, dtype=dtype, seed=3)
    proves(accumulated(cut(A, [1, 3, 3]), rtol=0.1).compute(), truth)


def test_leading_dimensions_are_rows() -> None:
    A = torch.randn(3, 4, 5, 6)
    record = accumulated([A, A[:, :, 0]]).compute()
    assert record.shape == (3 * 4 * 5 + 3 * 4, 6)
    proves(record, count(torch.cat([A.reshape(-1, 6), A[:, :, 0].reshape(-1, 6)])))


def test_strided_chunks() -> None:
    A = torch.randn(40, 50)
    record = accumulated([A.T[:, ::2], A[::2, 3:23], torch.randn(2, 20, 3, 5).permute(0, 2, 3, 1)]).compute()
    assert record.shape == (50 + 20 + 30, 20)


def test_nothing_and_nothing_but_zeros() -> None:
    assert SpectralAccumulator().compute().shape == (0, 0)
    for chunk, shape in (
        (torch.zeros(7, 3), (7, 3)),
        (torch.zeros(0, 3), (0, 3)),
        (torch.zeros(4, 0), (4, 0)),
    ):
        for options in ({}, {"atol": 1.0}, {"center": True}, {"decay": 0.5}):
            record = accumulated([chunk, chunk[:0]], **options).compute()
            assert record.shape == shape
            assert (record.near_rank, record.lower, record.ratio) == (0, 0, 0.0), options
            assert record.upper == 0 or options == {"center": True}


def test_a_single_non_finite_entry_says_so_until_reset() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        for decay in (None, 0.5):
            chunk = torch.ones(5, 3)
            chunk[2, 1] = bad
            metrics = [name for name in METRICS if decay is None or name != "feature_rank"]
            accumulator = accumulated(
                [torch.randn(9, 3), chunk, torch.randn(9, 3)], metrics=metrics, decay=decay
            )
            record = accumulator.compute()
            assert (record.near_rank, record.lower, record.upper) == (-1, -1, -1)
            assert math.isnan(record.ratio)
            for name, value in record.summary.items():
                assert value == -1 if name.startswith("centred_") else math.isnan(value), name
            accumulator.reset()
            proves(accumulator.update(torch.eye(3)).compute(), 3)


# Merging, windows, states


def test_merged_parts_are_the_whole() -> None:
    A = torch.randn(60, 8)
    parts = [accumulated([part], center=True) for part in A.split([10, 0, 49, 1])]
    whole = SpectralAccumulator(center=True)
    for part in parts:
        assert whole.merge(part) is whole
    proves(whole.compute(), count(A - A.mean(0)))
    assert whole.compute().shape == (60, 8)
    assert parts[0].compute().shape == (10, 8)


def test_an_exponential_window_weighs_rows_by_age() -> None:
    torch.manual_seed(0)
    chunks = [
        torch.randn(rows, 10, dtype=torch.float64) * torch.logspace(0, -2, 10) for rows in (9, 4, 0, 12)
    ]
    chunks[0] *= 50
    ages = torch.cat([torch.full((len(c),), 3.0 - i, dtype=torch.float64) for i, c in enumerate(chunks)])
    for decay in (0.9, 1e-3):
        w = decay**ages
        A = torch.cat(chunks)
        proves(accumulated(chunks, decay=decay).compute(), count(w.sqrt()[:, None] * A))
        mean = (w[:, None] * A).sum(0) / w.sum()
        record = accumulated(chunks, decay=decay, center=True, metrics=["sigma_max"]).compute()
        centred = w.sqrt()[:, None] * (A - mean)
        proves(record, count(centred))
        assert record.shape == (25, 10)
        assert record.summary["sigma_max"] == pytest.approx(
            float(torch.linalg.matrix_norm(centred, 2)), rel=1e-9
        )


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("shape", [(50, 20), (12, 20)])
def test_metrics_are_those_of_the_reference(center: bool, shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    A = torch.randn(shape, dtype=torch.float64) @ torch.diag(torch.logspace(0, -1.5, 20, dtype=torch.float64))
    A = (A + 0.1).relu()
    A[:, 3] = 0
    asked = [name for name in METRICS if not (center and name in ABOUT_THE_MEAN)]
    record = accumulated(cut(A, [5, 9]), center=center, metrics=asked).compute()
    others = ("near_rank", "saturation", "dormant_units", *ABOUT_THE_MEAN)
    expected = {name: getattr(reference, name) for name in METRICS if name not in others}
    if not center:
        assert record.summary.pop("mean_energy") == pytest.approx(float(reference.mean_energy(A)), rel=1e-6)
        counted = [record.summary.pop(f"centred_{name}") for name in ("near_rank", "lower", "upper")]
        assert counted == [int(reference.near_rank(A, rtol=RTOL, center=True))] * 3
    assert set(record.summary) == {*expected, "saturation", "dormant_units"}
    for name, metric in expected.items():
        value = float(metric(A, center=center))
        assert record.summary[name] == pytest.approx(value, rel=1e-6, nan_ok=True), name
    assert record.summary["saturation"] == pytest.approx(float(reference.saturation(A)))
    assert record.summary["dormant_units"] == float(reference.dormant_units(A))
    proves(record, count(A - A.mean(0) if center else A))


def test_a_state_goes_on_exactly() -> None:
    torch.manual_seed(2)
    chunks = list(torch.randn(40, 6).split(8))
    options = {"center": True, "metrics": ["near_rank", "dormant_units"], "decay": 0.8}
    first = accumulated(chunks[:3], **options)
    state = first.state_dict()
    second = SpectralAccumulator(**options)
    second.load_state_dict(state)
    for accumulator in (first, second):
        for chunk in chunks[3:]:
            accumulator.update(chunk)
    assert second.compute() == first.compute()
    for a, b in zip(first.sums.tensors(), second.sums.tensors(), strict=True):
        assert torch.equal(a, b)
    second.load_state_dict(SpectralAccumulator(**options).state_dict())
    assert second.compute().shape == (0, 0)


def test_errors_name_what_came() -> None:
    accumulator = accumulated([torch.randn(5, 3)])
    with pytest.raises(ValueError, match="A: got rows of 4 features after rows of 3"):
        accumulator.update(torch.randn(5, 4))
    with pytest.raises(ValueError, match="got rows of 4 features after rows of 3"):
        accumulator.merge(accumulated([torch.randn(5, 4)]))
    with pytest.raises(TypeError, match="A must be float64, float32, bfloat16 or float16, got torch.int64"):
        accumulator.update(torch.ones(5, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="A must have at least 2 dimensions"):
        accumulator.update(torch.ones(3))
    with pytest.raises(TypeError, match="A must be a torch.Tensor, got list"):
        accumulator.update([[1.0]])  # type: ignore[arg-type]
    for decay in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="decay: got .*, expected a number between 0 and 1, or None"):
            SpectralAccumulator(decay=decay)
    with pytest.raises(ValueError, match="feature_rank has no meaning in an exponential window"):
        SpectralAccumulator(decay=0.5, metrics=["feature_rank"])
    assert accumulator.compute().shape == (5, 3)


def test_accumulators_of_other_sums_do_not_mix() -> None:
    """As many sums, but of other things: columns here, absolute values there."""
    centred, dormant = SpectralAccumulator(center=True), SpectralAccumulator(metrics=["dormant_units"])
    centred.update(torch.randn(5, 3))
    dormant.update(torch.randn(5, 3))
    with pytest.raises(ValueError, match="other metrics or another centring"):
        centred.merge(dormant)
    with pytest.raises(ValueError, match="state: got .*, expected rows, gram, totals, sums"):
        centred.load_state_dict(dormant.state_dict())
    assert centred.compute().shape == (5, 3)


def test_gradients_are_not_kept() -> None:
    A = torch.randn(6, 4, requires_grad=True)
    accumulator = accumulated([A * 2], metrics=["dormant_units"])
    assert all(tensor.grad_fn is None for tensor in accumulator.sums.tensors())
    with torch.inference_mode():
        accumulator.update(torch.randn(6, 4))
    accumulator.update(A)
    assert accumulator.compute().shape == (18, 4)


# Certificates: each matrix has a spectrum that is known exactly


@pytest.mark.parametrize("decay", [None, 0.5], ids=["sum", "window"])
def test_a_thousand_chunks_of_an_ill_conditioned_matrix(decay: float | None) -> None:
    """σ straddles τ ever more closely: counts are proven while float64 resolves that, and never wrong.

    Chunk i is 2^e_i times one matrix with orthogonal columns, so that all have its σ, times a number.
    """
    tau, proven = 2.0**-14, []
    for bits in range(4, 34, 3):
        near = tau * 2.0**-bits
        sigma = [1.0, 0.5, tau + near, tau + near, tau - near, tau - near, tau / 4, 0.0]
        A = spectra.hadamard_spectrum(sigma, 8)
        accumulator = SpectralAccumulator(rtol=tau, decay=decay)
        for i in range(1000):
            accumulator.update(A * 2.0 ** (i % 7))
        record = accumulator.compute()
        assert record.lower <= 4 <= record.upper, f"{record} at 2^-{bits}"
        proven.append(record.lower == record.upper)
    assert proven[0]
    assert not proven[-1]


@pytest.mark.parametrize("way", ["chunks", "window", "merges"])
def test_additions_that_are_lost_are_in_the_certificate(way: str) -> None:
    """Each of many rows is less than half of the last digit of the sum: all of them vanish."""
    decay = 1 - 2.0**-40 if way == "window" else None
    accumulator = accumulated([torch.ones(1, 1, dtype=torch.float64)], rtol=0.0, decay=decay)
    small = torch.full((1, 1), 0.9 * 2.0**-27, dtype=torch.float64)
    other = accumulated([small])
    truth, weight = Fraction(1), Fraction(1 if decay is None else decay)
    for _ in range(1500):
        if way == "merges":
            accumulator.merge(other)
        else:
            accumulator.update(small)
        truth = truth * weight + Fraction(float(small)) ** 2
    computed = Fraction(float(accumulator.sums.gram))
    assert abs(truth / computed - 1) > Fraction(1, 10**14), "nothing was lost: no test"
    # A threshold between what there is and what was computed.
    asked = SpectralAccumulator(rtol=0.0, atol=math.sqrt((truth + computed) / 2))
    asked.load_state_dict(accumulator.state_dict())
    assert (asked.compute().lower, asked.compute().upper) == (0, 1)


def test_column_sums_of_many_rows_are_in_the_certificate() -> None:
    """Every 64 rows have less than half of the last digit of the sum of the rows before them to add.

    The rows are equal but for that, and centred nothing is left of them.
    """
    A = torch.ones(1 << 22, 1, dtype=torch.float64)
    A[::64] += 0.49 * 2.0**-35
    assert float((A - A.mean()).square().sum()) < 1e-12
    sums = Sums.zeros(1, torch.device("cpu"), sums=True)
    sums.add(A)
    lost = math.fsum(A.flatten().tolist()) - float(sums.sums)
    assert 1e-13 < lost / len(A) < 4.7e-13  # the bound: 4,379 roundings
    for atol in (2e-3, 1e-3, 3e-4):
        record = accumulated([A], center=True, rtol=0.0, atol=atol).compute()
        assert record.lower == 0, atol


def test_equal_rows_leave_nothing_about_their_mean() -> None:
    for dtype in (torch.float64, torch.float32):
        A = (3 + torch.rand(5, dtype=dtype)).expand(300, 5)
        record = accumulated(
            [A, A[:7]], center=True, metrics=["near_rank", "stable_rank", "saturation"]
        ).compute()
        assert (record.near_rank, record.lower) == (0, 0)
        assert record.summary == {"stable_rank": 0.0, "saturation": 0.0}
        A = A + 1e-3 * torch.randn(300, 5, dtype=dtype)
        proves(accumulated([A], center=True).compute(), 5)


@pytest.mark.parametrize("exponent", [-600, -534, -527, -510, -400, -200, 200, 400, 505, 600])
def test_scales(exponent: int) -> None:
    sigma = [1.0] + [2**-7 * (1 + 2**-10)] * 7 + [2**-7 * (1 - 2**-10)] * 8
    A = spectra.hadamard_spectrum(sigma, 16) * 2.0**exponent
    for options in ({}, {"decay": 0.5}):
        record = accumulated([A, A[:0], A], rtol=2**-7, **options).compute()
        if exponent > 520:  # squares beyond float64
            assert record.near_rank == -1
        elif abs(exponent) <= 505:
            proves(record, 8)
        else:
            assert record.lower <= 8 <= record.upper


def test_gram_matrices_that_underflow_are_in_the_certificate() -> None:
    """All n² entries of a rank-one Gram matrix are rounded down to the same subnormal number."""
    tiny = Fraction(1, 2**1074)
    for n in (4, 64):
        value = math.sqrt((2**20 + Fraction(49, 100)) * tiny * 2**1000) * 2.0**-500
        square = Fraction(value) ** 2 * n
        atol = math.sqrt((square - tiny * n / 4) * 2**1000) * 2.0**-500
        assert Fraction(atol) ** 2 < square
        A = torch.full((1, n), value, dtype=torch.float64)
        assert accumulated([A], rtol=0.0, atol=atol).compute().upper >= 1


def test_a_window_that_fades_away_is_not_taken_for_zero() -> None:
    accumulator = accumulated([torch.eye(4, dtype=torch.float64)], decay=0.5)
    for updates in (700, 300, 70, 10, 200):
        for _ in range(updates):
            accumulator.update(torch.zeros(0, 4))
        record = accumulator.compute()
        assert record.lower <= 4 <= record.upper
    assert float(accumulator.sums.gram.sum()) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "features_dim", "strides"),
    [
        ((3000, 5), 1, "rows"),
        ((3000, 5), 1, "columns"),
        ((301, 200), 1, "rows"),  # blocks of one Gram matrix
        ((4099, 130), 1, "columns"),  # slabs
        ((700, 600), 1, "rows"),
        ((7, 6, 24, 23), 1, "rows"),  # planes, six at once
        ((5, 16, 33, 7), 1, "rows"),  # planes in blocks
        ((5, 16, 33, 7), 1, "channels last"),
        ((40, 9, 130), 2, "rows"),
    ],
)
def test_column_sums_of_every_layout(
    shape: tuple[int, ...], features_dim: int, strides: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(4)
    A = (torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 1).to(dtype)
    if strides == "columns":
        A = A.mT.contiguous().mT
    elif strides == "channels last":
        A = A.contiguous(memory_format=torch.channels_last)
    rows = A.movedim(features_dim, -1).flatten(0, -2).double().numpy()
    for float32_sums in (False, True):
        sums = Sums.zeros(shape[features_dim], torch.device("cpu"), sums=True)
        for _ in range(2):
            sums.add(A, features_dim, features_dim + 1, float32_sums=float32_sums)
        assert sums.sums is not None
        exact = np.array([math.fsum(column) for column in rows.T.tolist()])
        allowed = 2 * (len(rows) + 8) * 2.0**-53 * np.abs(rows).sum(0)
        assert (np.abs(sums.sums.numpy() - 2 * exact) <= allowed).all()


def test_column_sums_of_a_scaled_matrix() -> None:
    A = torch.full((40, 3), 2.0**-600, dtype=torch.float64) * torch.arange(1, 4)
    sums = Sums.zeros(3, torch.device("cpu"), sums=True)
    sums.add(A)
    assert sums.sums is not None
    assert sums.sums.tolist() == (40 * A[0]).tolist()
