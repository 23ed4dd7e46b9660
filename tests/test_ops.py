"""Every op against its oracle: dtypes, strides, batches, extremes, non-finite input, tracing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import spectra
import torch
from tolerances import COUNT_MARGIN, metric_rtol, sum_rtol
from torch import Tensor

import bsgap_kernels as bsgap
from bsgap_kernels import reference
from bsgap_kernels.ops._tolerances import threshold_pairs

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (1, 9), (9, 1), (50, 7), (7, 50), (300, 70), (70, 300), (130, 130), (600, 97)]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


# Counts


@pytest.mark.parametrize(
    ("dtype", "rtol"),  # rounding to 16 bits fills the spectrum below its own precision
    [(d, r) for d in DTYPES for r in (0.3, 1e-2, 1e-5) if r >= 1e-2 or d.itemsize >= 4],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_counts_of_prescribed_spectra(shape: tuple[int, int], dtype: torch.dtype, rtol: float) -> None:
    k = min(shape)
    for count in {1, (k + 1) // 2, k}:
        A = spectra.with_count(*shape, count, rtol, margin=COUNT_MARGIN, dtype=torch.float64, seed=count)
        A = A.to(dtype)
        expected = int(reference.near_rank(A, rtol=rtol))
        if dtype == torch.float64:
            assert expected == count
        assert bsgap.near_rank(A, rtol=rtol).item() == expected
        assert bsgap.near_rank_ratio(A, rtol=rtol).item() == expected / k
        for mode in ("rigorous", "probed"):
            lower, upper = bsgap.near_rank_interval(A, rtol=rtol, mode=mode)
            assert lower <= expected <= upper


def test_results_are_contiguous() -> None:
    for batch in [(), (3,), (2, 3), (2, 0, 3)]:
        for A in (random(*batch, 5, 4), random(*batch, 4, 5).mT):
            near_rank, (lower, _) = bsgap.near_rank(A, rtol=1e-2), bsgap.near_rank_interval(A, rtol=1e-2)
            for counts in (near_rank, lower):
                assert (counts.shape, counts.stride()) == (batch, torch.empty(batch).stride())


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("count", [1, 3, 9])
@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (150, 90), (2, 3, 90, 80)])
def test_singular_value_counts(shape: tuple[int, ...], count: int, relative: bool) -> None:
    A = random(*shape, dtype=torch.float64)
    sigma = reference.singular_values(A)
    scale = sigma[..., :1] if relative else torch.ones_like(sigma[..., :1])
    fractions = torch.linspace(0.05, 0.9, count, dtype=torch.float64)
    thresholds = fractions * (1.0 if relative else float(sigma.max()))
    expected = (sigma[..., None, :] > (thresholds * scale)[..., None]).sum(-1)
    assert torch.equal(bsgap.singular_value_counts(A, thresholds, relative=relative), expected)
    own = thresholds.expand(*A.shape[:-2], count).contiguous()
    assert torch.equal(bsgap.singular_value_counts(A, own, relative=relative), expected)


def test_singular_value_counts_of_odd_thresholds() -> None:
    A = torch.diag(torch.tensor([4.0, 2.0, 1.0]))
    odd = torch.tensor([-1.0, 0.0, 0.4, torch.inf, torch.nan])
    assert bsgap.singular_value_counts(A, odd).tolist() == [3, 3, 2, 0, -1]
    assert bsgap.singular_value_counts(A, odd, relative=False).tolist() == [3, 3, 3, 0, -1]
    assert bsgap.singular_value_counts(A, torch.tensor([1e-9])).tolist() == [3]
    assert bsgap.singular_value_counts(A, torch.empty(0)).shape == (0,)


def test_tolerances_on_the_cpu_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    # The meta device stands for a GPU, where a copy from the host would wait for it.
    A = torch.empty(3, 2, device="meta")
    monkeypatch.setattr(Tensor, "to", None)
    pairs = threshold_pairs(A, torch.tensor(1.0), torch.tensor(0.1, dtype=torch.float16))
    assert (pairs.device, pairs.dtype, pairs.shape) == (A.device, torch.float64, (2,))


def test_grouped_matches_single() -> None:
    As = [random(30, 8), random(9, 200, dtype=torch.bfloat16), random(70, 90, dtype=torch.float64)]
    As.append(torch.empty(0, 5))
    assert bsgap.near_rank_grouped(As, rtol=0.2).tolist() == [int(bsgap.near_rank(A, rtol=0.2)) for A in As]
    assert bsgap.near_rank_grouped([]).shape == (0,)
    assert bsgap.near_rank_grouped([torch.empty(0, 5), torch.empty(3, 0)]).tolist() == [0, 0]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_grouped_takes_leading_dimensions_as_rows(layout: torch.memory_format) -> None:
    outputs = [
        random(5, 6, 4, 3).contiguous(memory_format=layout),
        random(3, 20, 2, 2).contiguous(memory_format=layout),  # fewer rows than channels
    ]
    unfolded = [x.movedim(1, -1).reshape(-1, x.shape[1]) for x in outputs]
    for rtol in (0.2, None):
        counts = bsgap.near_rank_grouped([x.movedim(1, -1) for x in outputs], rtol=rtol)
        assert counts.tolist() == [int(bsgap.near_rank(A, rtol=rtol)) for A in unfolded]


# Strides, batches, content


def views(A: Tensor) -> dict[str, Tensor]:
    """The same values behind other strides."""
    m, n = A.shape
    padded = torch.zeros(2 * m, 3 * n, dtype=A.dtype)
    padded[::2, ::3] = A
    return {
        "transposed": A.mT.contiguous().mT,
        "sliced": padded[::2, ::3],
        "offset": torch.cat([A.new_ones(1, n), A])[1:],
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    for shape in [(40, 17), (17, 40), (100, 80)]:
        A = random(*shape, dtype=dtype)
        for name, view in views(A).items():
            for center in (False, True):
                assert torch.equal(bsgap.gram(view, center=center), bsgap.gram(A, center=center)), name
                assert bsgap.near_rank(view, rtol=0.3, center=center) == bsgap.near_rank(
                    A, rtol=0.3, center=center
                )
    assert bsgap.near_rank(random(6, 1).expand(6, 9), rtol=1e-2).item() == 1


def test_conv_unfolding_is_read_in_place() -> None:
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = random(4, 6, 5, 5).contiguous(memory_format=memory_format)
        channel = x.permute(0, 2, 3, 1).reshape(-1, 6)
        strided = x.permute(0, 2, 3, 1)  # a batch of 4 x 5 matrices (5, 6) that is no copy
        assert torch.allclose(bsgap.gram(strided).sum((0, 1)), bsgap.gram(channel), rtol=1e-13)


def test_batches_equal_single_matrices() -> None:
    A = random(2, 3, 30, 20)
    rows = [bsgap.near_rank(a, rtol=0.4) for a in A.flatten(0, 1)]
    assert torch.equal(bsgap.near_rank(A, rtol=0.4), torch.stack(rows).view(2, 3))
    view = A.transpose(0, 1)
    assert torch.equal(bsgap.near_rank(view, rtol=0.4), torch.stack(rows).view(2, 3).T)
    assert torch.equal(bsgap.gram(view), bsgap.gram(A).transpose(0, 1))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rtol", [0.2, 1e-9])
def test_non_finite_is_reported_and_does_not_spread(dtype: torch.dtype, bad: float, rtol: float) -> None:
    A = random(3, 40, 20, dtype=dtype)
    clean = bsgap.near_rank(A, rtol=rtol)
    A[1, 7, 3] = bad
    for center in (False, True):
        counts = bsgap.near_rank(A, rtol=rtol, center=center)
        assert counts[1] == -1
        assert (counts[::2] >= 0).all()
        lower, upper = bsgap.near_rank_interval(A, rtol=rtol, center=center)
        assert lower[1] == upper[1] == -1
        assert (lower[::2] >= 0).all()
        summary = bsgap.spectral_summary(A, center=center)
        assert summary[1].isnan().all()
        assert not summary[::2].isnan().any()
    assert torch.equal(bsgap.near_rank(A, rtol=rtol)[::2], clean[::2])
    assert bsgap.near_rank_ratio(A, rtol=rtol)[1].isnan()
    assert bsgap.gram(A)[1].isnan().any()
    assert bsgap.singular_value_counts(A, torch.tensor([rtol]))[1].item() == -1


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e-30, 1e30, 1e160, 1e300])
@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (120, 90)])
def test_range_float64(shape: tuple[int, int], scale: float) -> None:
    A = spectra.with_count(*shape, 7, 1e-2, margin=COUNT_MARGIN, seed=3) * scale
    assert bsgap.near_rank(A, rtol=1e-2).item() == 7
    assert bsgap.near_rank_interval(A, rtol=1e-2) == (7, 7)
    assert bsgap.near_rank(A, atol=1e-2 * scale).item() == 7
    summary = bsgap.spectral_summary(A)
    assert torch.allclose(summary[0], torch.tensor(scale, dtype=torch.float64), rtol=1e-9, atol=0)
    assert bsgap.near_rank_interval(A * 0, atol=scale) == (0, 0)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-22, 1e22, 1e30, 1e37])
def test_range_float32(scale: float) -> None:
    # Squares of these under- or overflow in float32; the matrix itself does not.
    A = (spectra.with_count(60, 100, 9, 0.05, margin=COUNT_MARGIN, seed=3) * scale).to(torch.float32)
    assert reference.near_rank(A, rtol=0.05).item() == 9
    assert bsgap.near_rank(A, rtol=0.05).item() == 9
    assert bsgap.near_rank_interval(A, rtol=0.05, mode="probed") == (9, 9)


def test_probed_interval_of_large_sides() -> None:
    # From 424 on a GPU takes the probes.
    shape, count = (448, 424), 41
    A = spectra.with_count(*shape, count, 0.05, margin=COUNT_MARGIN, seed=3).to(torch.bfloat16)
    sigma = reference.singular_values(A)
    assert (sigma > 0.05 * sigma[0]).sum() == count
    batch = torch.stack([torch.full_like(A, float("nan")), A])
    lower, upper = bsgap.near_rank_interval(batch, rtol=0.05, mode="probed", seed=3)
    assert lower.tolist() == upper.tolist() == [-1, count]


@pytest.mark.parametrize(("mean", "step"), [(1.0, 1e-200), (1.0, 1e-300), (1e200, 1e-150), (1e-200, 0.0)])
@pytest.mark.parametrize("shape", [(3, 2), (3, 7), (140, 131)])
def test_range_of_centred_columns(shape: tuple[int, int], mean: float, step: float) -> None:
    # Squares of the differences underflow: a Gram matrix of 0 must not prove that nothing counts.
    A = torch.full(shape, mean, dtype=torch.float64)
    A[:, 1] = step * torch.arange(1.0, shape[0] + 1, dtype=torch.float64)
    rank = int(step > 0)
    lower, upper = bsgap.near_rank_interval(A, rtol=1e-2, center=True)
    assert lower <= rank <= upper
    lower, upper = bsgap.near_rank_interval(A, atol=1e-2 * mean, center=True)
    assert lower == upper == 0


def test_zero_and_rank_one() -> None:
    for shape in [(5, 3), (100, 90)]:
        zero = torch.zeros(shape)
        assert bsgap.near_rank(zero).item() == 0
        assert bsgap.near_rank_interval(zero) == (0, 0)
        assert bsgap.spectral_summary(zero)[:-1].tolist() == [0.0] * 9
        one = torch.outer(random(shape[0]), random(shape[1]))
        assert bsgap.near_rank(one, rtol=1e-3).item() == 1
        assert bsgap.near_rank_interval(one, rtol=1e-3) == (1, 1)


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e6])
def test_centring_keeps_its_digits(mean: float) -> None:
    A = random(5000, 12, dtype=torch.float64) + mean
    for x in (A, A[:10].repeat(1, 30)):
        assert torch.allclose(bsgap.covariance(x), reference.covariance(x), rtol=1e-9, atol=1e-9)
    sigma = reference.singular_values(A, center=True)
    assert bsgap.near_rank(A, rtol=0.5, center=True).item() == (sigma > 0.5 * sigma[0]).sum().item()
    lower, upper = bsgap.near_rank_interval(A, rtol=0.5, center=True)
    assert lower == upper == (sigma > 0.5 * sigma[0]).sum()


# Floating-point outputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 40, 9)])
@pytest.mark.parametrize("center", [False, True])
def test_gram_and_covariance(shape: tuple[int, ...], dtype: torch.dtype, center: bool) -> None:
    A = random(*shape, dtype=dtype)
    expected = reference.gram(A, center=center)
    size = A.double().abs().mT @ A.double().abs()
    assert bsgap.gram(A, center=center).dtype == torch.float64
    assert (
        (bsgap.gram(A, center=center) - expected).abs() <= sum_rtol(torch.float64, shape[-2]) * size
    ).all()
    if shape[-2] > 1:
        cov = bsgap.covariance(A)
        assert cov.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        tolerance = sum_rtol(torch.float32 if dtype != torch.float64 else dtype, shape[-2])
        assert torch.allclose(cov.double(), reference.covariance(A), rtol=tolerance, atol=tolerance)


def test_covariance_agrees_with_torch_cov() -> None:
    A = random(40, 6, dtype=torch.float64)
    for correction in (0, 1, 2):
        assert torch.allclose(
            bsgap.covariance(A, correction=correction), torch.cov(A.T, correction=correction)
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 40, 19)])
@pytest.mark.parametrize("center", [False, True])
def test_spectral_summary(shape: tuple[int, ...], dtype: torch.dtype, center: bool) -> None:
    A = random(*shape, dtype=dtype)
    if center and shape[-2] == 1:  # one centred row: zero
        A = torch.cat([A, 2 * A])
        shape = (2, *shape[1:])
    ours, oracle = bsgap.spectral_summary(A, center=center), reference.spectral_summary(A, center=center)
    assert tuple(reference.SUMMARY) == bsgap.SUMMARY_COLUMNS
    # Counts and alpha_req look at the smallest singular values, which a Gram matrix knows to 1e-8 only.
    assert torch.allclose(
        ours, oracle, rtol=max(1e-6, metric_rtol(torch.float64, *shape[-2:])), equal_nan=True
    )


def test_accumulating_chunks_equals_one_gram() -> None:
    A, shift = random(1000, 9) + 5, torch.full((9,), 5.0, dtype=torch.float64)
    whole, chunks = (torch.zeros(10, 10, dtype=torch.float64) for _ in range(2))
    assert bsgap.gram_accumulate_(whole, A, shift) is whole
    for part in A.split(170):
        bsgap.gram_accumulate_(chunks, part, shift)
    assert torch.allclose(whole, chunks, rtol=1e-13)
    assert whole[0, 0] == 1000
    s = whole[0, 1:]
    centred = whole[1:, 1:] - torch.outer(s, s) / 1000
    assert torch.allclose(centred, reference.gram(A, center=True), rtol=1e-12)
    assert torch.allclose(s / 1000 + 5, A.double().mean(0), rtol=1e-12)
    bsgap.gram_accumulate_(whole, torch.empty(0, 9), shift)
    assert torch.allclose(whole, chunks, rtol=1e-13)


def test_results_do_not_alias_the_input_and_do_not_depend_on_threads(
    use_threads: Callable[[int], None],
) -> None:
    A = random(500, 150)
    results = []
    for threads in (1, 2):
        use_threads(threads)
        results.append((bsgap.gram(A), bsgap.near_rank(A), *bsgap.near_rank_interval(A)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][0].data_ptr() != A.data_ptr()
