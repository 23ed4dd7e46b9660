"""The oracles against cases that one can compute by hand, and against the traps known from public code."""

from __future__ import annotations

import ast
import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from spectra import from_singular_values, geometric, signed_permutation_spectrum, with_count
from tolerances import COUNT_MARGIN, ORACLE_RTOL
from torch import Tensor

import bsgap_kernels
from bsgap_kernels import reference

Metric = Callable[..., Tensor]

COUNTS: list[Metric] = [
    reference.near_rank,
    reference.numerical_rank,
    reference.feature_rank,
    reference.srank,
    reference.pca_rank,
    reference.dormant_units,
]
FLOATS: list[Metric] = [
    reference.sigma_max,
    reference.frobenius_norm,
    reference.near_rank_ratio,
    reference.saturation,
    reference.effective_rank,
    reference.rankme,
    reference.stable_rank,
    reference.participation_ratio,
    reference.nesum,
    reference.alpha_req,
]


def diagonal(*sigma: float) -> Tensor:
    return torch.diag(torch.tensor(sigma, dtype=torch.float64))


def close(value: Tensor, expected: float, rtol: float = ORACLE_RTOL) -> bool:
    return value.dtype == torch.float64 and math.isclose(float(value), expected, rel_tol=rtol, abs_tol=1e-14)


# Matrices


def test_gram_and_covariance_by_hand() -> None:
    A = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 9.0]])
    assert torch.equal(reference.gram(A), torch.tensor([[35.0, 59.0], [59.0, 101.0]], dtype=torch.float64))
    # Centred columns: (-2, 0, 2) and (-3, -1, 4).
    centred = torch.tensor([[8.0, 14.0], [14.0, 26.0]], dtype=torch.float64)
    assert torch.allclose(reference.gram(A, center=True), centred, rtol=ORACLE_RTOL)
    assert torch.allclose(reference.covariance(A), centred / 2, rtol=ORACLE_RTOL)
    assert torch.allclose(reference.covariance(A, correction=0), centred / 3, rtol=ORACLE_RTOL)


@pytest.mark.filterwarnings("ignore:cov\\(\\).*degrees of freedom")
@pytest.mark.parametrize(("m", "n", "correction"), [(7, 3, 1), (7, 3, 0), (1, 3, 1), (2, 3, 5)])
def test_covariance_follows_torch_cov(m: int, n: int, correction: int) -> None:
    A = torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 5
    expected = torch.cov(A.T, correction=correction)
    assert torch.allclose(
        reference.covariance(A, correction=correction), expected, rtol=1e-10, equal_nan=True
    )


def test_singular_values_are_those_prescribed() -> None:
    sigma = geometric(20, 1e-3)
    A = from_singular_values(sigma, 40, 20)
    assert torch.allclose(reference.singular_values(A), sigma, rtol=0, atol=ORACLE_RTOL)
    assert reference.singular_values(A.mT).shape == (20,)
    assert close(reference.sigma_max(A), 1.0)
    assert close(reference.frobenius_norm(diagonal(3, 4, 12)), 13.0)


def test_center_subtracts_the_column_means() -> None:
    constant_rows = torch.ones(6, 1) @ torch.tensor([[1.0, 2.0, 4.0]])
    assert reference.near_rank(constant_rows) == 1
    assert reference.near_rank(constant_rows, center=True) == 0
    spread = diagonal(1, 2, 3)
    assert torch.allclose(
        reference.singular_values(spread, center=True),
        torch.linalg.svdvals(spread - spread.mean(0)),
        atol=1e-14,
    )


# numerical_rank against torch.linalg.matrix_rank

SHAPES = [
    (1, 1),
    (5, 3),
    (3, 5),
    (4, 4),
    (2, 6, 4),
    (3, 2, 4, 6),
    (0, 3),
    (3, 0),
    (2, 0, 3),
    (0, 3, 3),
    (0, 0),
]
TOLERANCES = [None, 0.0, 1e-9, 0.05, 0.3, 2.0]


def sample(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Random matrices, one in two rank-deficient."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(shape, generator=generator, dtype=dtype)
    if seed % 2 and shape[-1] > 1:
        A[..., -1] = A[..., 0]
    return A


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numerical_rank_is_matrix_rank(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for seed, (atol, rtol) in enumerate(itertools.product(TOLERANCES, TOLERANCES)):
        # Below float32's rounding matrix_rank counts noise: only full-rank matrices compare there.
        tiny = rtol in (0.0, 1e-9) or atol == 1e-9
        A = sample(shape, dtype, 2 * seed if tiny and dtype == torch.float32 else seed)
        expected = torch.linalg.matrix_rank(A, atol=atol, rtol=rtol)
        count = reference.numerical_rank(A, atol=atol, rtol=rtol)
        assert count.dtype == expected.dtype == torch.int64
        assert torch.equal(count, expected), (atol, rtol, seed)


# matrix_rank itself warns when a tolerance of shape (1,) meets a single matrix.
@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
@pytest.mark.parametrize("seed", range(40))
def test_numerical_rank_is_matrix_rank_with_tensor_tolerances(seed: int) -> None:
    pick = random.Random(seed)
    A = sample(pick.choice([(4, 3), (2, 4, 3), (5, 1, 3, 3), (5, 2, 3, 4), (2, 0, 3)]), torch.float64, seed)
    batches = [(), (1,), A.shape[:-2], (2,) if A.ndim == 3 else (1,) * max(A.ndim - 2, 0)]
    generator = torch.Generator().manual_seed(seed)

    def tolerance() -> Tensor | None:
        shape = pick.choice(batches)
        values = torch.rand(shape, generator=generator, dtype=torch.float64)
        # Zeros matter: there, and only there, an unset rtol takes its default.
        return pick.choice([None, values, torch.where(values < 0.5, 0.0, values), torch.zeros_like(values)])

    atol, rtol = tolerance(), tolerance()
    expected = torch.linalg.matrix_rank(A, atol=atol, rtol=rtol)
    assert torch.equal(reference.numerical_rank(A, atol=atol, rtol=rtol), expected)


def test_tensor_tolerances_broadcast_against_the_batch() -> None:
    A = torch.stack([diagonal(1, 0.5, 0.25), diagonal(1, 1, 0.1)])
    rtol = torch.tensor([[0.05], [0.3], [0.6]])
    assert reference.numerical_rank(A, rtol=rtol).tolist() == [[3, 3], [2, 2], [1, 2]]
    assert reference.numerical_rank(A[0], atol=torch.tensor([0.3, 0.0])).tolist() == [2, 3]


def test_the_threshold_itself_is_not_counted() -> None:
    A = signed_permutation_spectrum([1.0, 0.25, 0.25, 0.0625], 6, 5)
    assert reference.near_rank(A, rtol=0.25) == 1
    assert reference.near_rank(A, atol=0.25) == 1
    assert reference.near_rank(A, atol=0.2499) == 3


def test_atol_alone_turns_the_default_rtol_off() -> None:
    A = diagonal(1.0, 1e-16)
    assert reference.near_rank(A) == 1
    assert reference.near_rank(A, atol=0.0) == 1
    assert reference.near_rank(A, atol=1e-17) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_take_the_default_tolerance_of_float32(dtype: torch.dtype) -> None:
    A = with_count(128, 128, 16, 0.3, margin=COUNT_MARGIN, dtype=dtype)
    assert reference.near_rank(A, rtol=0.3) == 16
    assert reference.near_rank(A) == torch.linalg.matrix_rank(A.double(), rtol=128 * 2.0**-23) > 100
    with pytest.raises(TypeError, match="numerical_rank takes float32 or float64"):
        reference.numerical_rank(A)


def test_near_rank_ratio_divides_by_the_smaller_side() -> None:
    A = from_singular_values([1.0, 1.0, 1.0], 12, 4)
    assert close(reference.near_rank_ratio(A, rtol=0.5), 0.75)
    assert close(reference.near_rank_ratio(A.mT, rtol=0.5), 0.75)


def test_feature_rank_scales_by_the_number_of_rows() -> None:
    # σ = √m · s with m = 100 rows, so that σ/√m = s is at the scale of ε.
    A = from_singular_values([10 * s for s in (1.0, 0.02, 0.011, 0.009)], 100, 4)
    assert reference.feature_rank(A) == 3
    assert reference.feature_rank(A, eps=0.015) == 2
    # Divided by √n instead of √m, 0.009·10/√4 = 0.045 would count too.
    assert int((reference.singular_values(A) / 2 > 0.01).sum()) == 4


# Ranks by cumulative share


def test_srank_sums_singular_values_and_pca_rank_their_squares() -> None:
    A = diagonal(10, 1, 1, 1, 1, 0.1)  # Σσ = 14.1; Σσ² = 104.01
    # 14/14.1 = 0.9929, 13/14.1 = 0.922; squared: 103/104.01 = 0.9903, 102/104.01 = 0.9807.
    assert reference.srank(A) == 5
    assert reference.pca_rank(A) == 4
    assert reference.srank(A, delta=0.1) == 4  # 13/14.1 = 0.922
    assert reference.pca_rank(A, share=0.9) == 1


def test_srank_is_not_the_stable_rank() -> None:
    A = diagonal(10, 1, 1, 1, 1, 0.1)
    assert close(reference.stable_rank(A), 1.0401)
    assert reference.srank(A) == 5


def test_saturation_is_the_centred_pca_rank_over_the_features() -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(50, 8, generator=generator, dtype=torch.float64) @ diagonal(
        9, 8, 7, 6, 1e-3, 1e-3, 1e-3, 1e-3
    )
    A = A + 1000.0  # one direction has all the energy unless it is centred away
    assert close(reference.saturation(A), 4 / 8)
    assert close(reference.saturation(A, center=False), 1 / 8)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_pca_rank_is_one_more_than_the_directions_below_the_share(share: float) -> None:
    # The count of the package delve: eigenvalues of the covariance whose cumulative share is below the
    # threshold.
    A = torch.randn(60, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    lam = torch.linalg.eigvalsh(torch.cov(A.T, correction=0)).flip(0)
    below = int((lam.cumsum(0) / lam.sum() < share).sum())
    assert reference.pca_rank(A, share=share, center=True) == below + 1


# Ranks without a threshold


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_identity_has_every_rank_n(n: int) -> None:
    A = torch.eye(n)
    for metric in (reference.effective_rank, reference.stable_rank, reference.participation_ratio):
        assert close(metric(A), n)
    assert reference.near_rank(A) == reference.srank(A, delta=1e-6) == n
    assert close(reference.rankme(A), n, rtol=2e-7 * n * (1 + math.log(n)))  # ε enters n times


def test_rank_one_has_every_rank_one() -> None:
    A = torch.outer(torch.arange(1.0, 8.0), torch.arange(1.0, 5.0)).double()
    for metric in (reference.effective_rank, reference.stable_rank, reference.participation_ratio):
        assert close(metric(A), 1.0)
    assert reference.near_rank(A) == reference.srank(A) == reference.pca_rank(A) == 1
    assert close(reference.sigma_max(A), math.sqrt(140 * 30))


@pytest.mark.parametrize(("ratio", "k"), [(0.5, 10), (0.9, 30)])
def test_geometric_spectrum_in_closed_form(ratio: float, k: int) -> None:
    A = from_singular_values([ratio**i for i in range(k)], 40, k)
    q = ratio**2
    total = (1 - q**k) / (1 - q)
    assert close(reference.stable_rank(A), total)
    assert close(reference.participation_ratio(A), total**2 * (1 - q**2) / (1 - q ** (2 * k)))
    # −Σ p log p with p_i = r^i / s is log s − log r · Σ i r^i / s.
    s = (1 - ratio**k) / (1 - ratio)
    weighted = ratio * (1 - k * ratio ** (k - 1) + (k - 1) * ratio**k) / (1 - ratio) ** 2
    assert close(reference.effective_rank(A), math.exp(math.log(s) - math.log(ratio) * weighted / s))


def test_effective_rank_of_two_values() -> None:
    p = 0.75
    assert close(
        reference.effective_rank(diagonal(3, 1)), math.exp(-p * math.log(p) - (1 - p) * math.log(1 - p))
    )


def test_rankme_takes_singular_values_and_adds_eps_after_normalising() -> None:
    A = diagonal(3, 1)

    def rankme(p: list[float], eps: float) -> float:
        return math.exp(-sum((x + eps) * math.log(x + eps) for x in p))

    assert close(reference.rankme(A), rankme([0.75, 0.25], 1e-7))
    assert close(reference.rankme(A, eps=1e-2), rankme([0.75, 0.25], 1e-2))
    over_eigenvalues = rankme([0.9, 0.1], 1e-7)
    assert abs(float(reference.rankme(A)) - over_eigenvalues) > 0.3


def test_participation_ratio_is_traces_of_the_gram_matrix() -> None:
    A = torch.randn(3, 20, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    G = A.mT @ A
    trace = G.diagonal(dim1=-2, dim2=-1).sum(-1)
    expected = trace.square() / G.square().sum((-2, -1))
    assert torch.allclose(reference.participation_ratio(A), expected, rtol=ORACLE_RTOL)


def test_nesum_is_the_trace_of_the_covariance_over_its_largest_eigenvalue() -> None:
    A = torch.randn(30, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 3
    covariance = torch.cov(A.T)
    expected = float(covariance.trace() / torch.linalg.eigvalsh(covariance)[-1])
    assert close(reference.nesum(A), expected)
    assert not close(reference.nesum(A, center=False), expected, rtol=1e-2)


# α-ReQ


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_req_recovers_a_power_law(alpha: float) -> None:
    sigma = torch.arange(1, 121, dtype=torch.float64) ** (-alpha / 2)
    A = signed_permutation_spectrum(sigma, 150, 120)
    assert close(reference.alpha_req(A), alpha, rtol=1e-10)
    # Only i = 10 … 99 enter: spoiling the others changes nothing.
    spoilt = sigma.clone()
    spoilt[:9] = 50.0
    spoilt[99:] = spoilt[98] / 2
    assert close(reference.alpha_req(signed_permutation_spectrum(spoilt, 150, 120)), alpha, rtol=1e-10)


def test_alpha_req_regresses_on_log_i_not_on_i() -> None:
    rate = 0.1
    sigma = torch.exp(-rate / 2 * torch.arange(1, 121, dtype=torch.float64))
    A = signed_permutation_spectrum(sigma, 120, 120)
    # Against i the slope would be −rate; against log i it is the least-squares line through −rate·exp(log i).
    i = torch.arange(10, 100, dtype=torch.float64)
    x = i.log() - i.log().mean()
    expected = float(rate * (x * i).sum() / x.square().sum())
    assert close(reference.alpha_req(A), expected, rtol=1e-9)
    assert expected > 10 * rate


def test_alpha_req_needs_three_eigenvalues() -> None:
    for k, defined in [(3, False), (11, False), (12, True)]:
        sigma = torch.arange(1, k + 1, dtype=torch.float64) ** -0.5
        assert math.isnan(reference.alpha_req(signed_permutation_spectrum(sigma, k, k))) != defined
    # 40 singular values, but only 11 that are not rounding noise.
    sigma = torch.cat(
        [torch.arange(1, 12, dtype=torch.float64) ** -0.5, torch.full((29,), 1e-9, dtype=torch.float64)]
    )
    assert math.isnan(reference.alpha_req(from_singular_values(sigma, 40, 40)))


# Dormant units


def test_dormant_units_by_hand() -> None:
    # Mean magnitudes 4, 0, 1, 0.1, layer mean 1.275; scores 3.14, 0, 0.78, 0.078.
    A = torch.tensor([[4.0, 0.0, 2.0, 0.1], [-4.0, 0.0, 0.0, -0.1]])
    assert reference.dormant_units(A) == 1
    assert reference.dormant_units(A, tau=0.1) == 2
    assert reference.dormant_units(A, tau=0.8) == 3
    assert reference.dormant_units(torch.zeros(3, 4)) == 4


# Edge cases


@pytest.mark.parametrize("metric", COUNTS + FLOATS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_input_spoils_its_own_matrix_only(metric: Metric, bad: float) -> None:
    A = torch.randn(3, 40, 30, generator=torch.Generator().manual_seed(4))
    alone = metric(A)
    A[1, 2, 3] = bad
    value = metric(A)
    assert value.shape == (3,)
    assert value[[0, 2]].tolist() == alone[[0, 2]].tolist()
    assert value[1] == -1 if metric in COUNTS else math.isnan(value[1])


@pytest.mark.parametrize("metric", COUNTS + FLOATS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (2, 0, 3), (2, 3, 0), (0, 3, 3)], ids=str)
def test_empty_matrices_give_zero(metric: Metric, shape: tuple[int, ...]) -> None:
    value = metric(torch.zeros(shape))
    expected = torch.full(shape[:-2], math.nan if metric is reference.alpha_req else 0.0)
    assert value.dtype == (torch.int64 if metric in COUNTS else torch.float64)
    assert torch.equal(value.float().nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("metric", COUNTS + FLOATS, ids=lambda f: f.__name__)
def test_zero_matrix_gives_zero(metric: Metric) -> None:
    value = float(metric(torch.zeros(20, 14)))
    if metric is reference.alpha_req:
        assert math.isnan(value)
    else:
        assert value == (14 if metric is reference.dormant_units else 0)


SCALE_FREE = [
    m for m in (*COUNTS, *FLOATS) if m.__name__ not in ("feature_rank", "sigma_max", "frobenius_norm")
]


@pytest.mark.parametrize("metric", SCALE_FREE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("scale", [2.0**-900, 2.0**900])
def test_huge_and_tiny_scales_change_nothing(metric: Metric, scale: float) -> None:
    A = torch.randn(30, 20, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert math.isclose(float(metric(A * scale)), float(metric(A)), rel_tol=1e-9)


@pytest.mark.parametrize("center", [False, True])
def test_summary_is_its_columns(center: bool) -> None:
    assert tuple(reference.SUMMARY) == bsgap_kernels.SUMMARY_COLUMNS
    A = torch.randn(2, 3, 40, 20, generator=torch.Generator().manual_seed(6)) + 1
    summary = reference.spectral_summary(A, center=center)
    assert summary.shape == (2, 3, 10)
    for column, metric in zip(summary.unbind(-1), reference.SUMMARY.values(), strict=True):
        assert torch.equal(column, metric(A, center=center).double())
    A[0, 0, 0, 0] = math.nan
    assert reference.spectral_summary(A, center=center)[0, 0].isnan().all()


def test_wrong_input_is_named() -> None:
    with pytest.raises(TypeError, match=r"real float tensor of shape .* got torch.int64"):
        reference.sigma_max(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"shape \(3,\)"):
        reference.srank(torch.ones(3))


def test_no_module_of_the_package_imports_the_oracles() -> None:
    package = Path(bsgap_kernels.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = {node.module or "", *(alias.name for alias in node.names)}
            elif isinstance(node, ast.Import):
                names = {alias.name for alias in node.names}
            else:
                continue
            assert not any(name.split(".")[-1] == "reference" for name in names), path
