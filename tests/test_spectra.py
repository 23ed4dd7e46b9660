"""The builders of test matrices do what they say."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from spectra import (
    clustered,
    from_singular_values,
    geometric,
    hadamard,
    hadamard_spectrum,
    orthogonal,
    signed_permutation_spectrum,
    with_count,
)
from tolerances import COUNT_MARGIN, ORACLE_RTOL, ROUNDOFF, metric_rtol
from torch import Tensor


def exact_gram(A: Tensor) -> list[list[Fraction]]:
    """AᵀA in rational arithmetic."""
    columns = [[Fraction(x) for x in column] for column in A.double().T.tolist()]
    return [[sum((x * y for x, y in zip(a, b, strict=True)), Fraction(0)) for b in columns] for a in columns]


def test_orthogonal_factors() -> None:
    q = orthogonal(30, 12, seed=3)
    assert q.shape == (30, 12)
    assert torch.allclose(q.mT @ q, torch.eye(12, dtype=torch.float64), atol=ORACLE_RTOL)
    assert not torch.equal(q, orthogonal(30, 12, seed=4))


@pytest.mark.parametrize(("m", "n"), [(1, 1), (40, 25), (25, 40)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_from_singular_values(m: int, n: int, dtype: torch.dtype) -> None:
    sigma = geometric(min(m, n), 0.01)
    A = from_singular_values(sigma, m, n, dtype=dtype)
    assert A.dtype == dtype
    assert A.shape == (m, n)
    eps = torch.finfo(dtype).eps if dtype != torch.float64 else ORACLE_RTOL
    assert torch.allclose(torch.linalg.svdvals(A.double()), sigma, rtol=0, atol=eps)


def test_missing_values_are_zeros() -> None:
    sigma = torch.linalg.svdvals(from_singular_values([2.0, 1.0], 9, 6))
    assert torch.allclose(sigma, torch.tensor([2.0, 1, 0, 0, 0, 0], dtype=torch.float64), atol=ORACLE_RTOL)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize(
    ("m", "n", "count", "rtol"), [(1, 1, 1, 0.5), (50, 20, 13, 1e-2), (20, 50, 20, 1e-3)]
)
def test_with_count_keeps_its_margin(m: int, n: int, count: int, rtol: float, scale: float) -> None:
    A = with_count(m, n, count, rtol, margin=COUNT_MARGIN, dtype=torch.float32, scale=scale, seed=count)
    sigma = torch.linalg.svdvals(A.double())
    for factor in (1 - COUNT_MARGIN, 1.0, 1 + COUNT_MARGIN):
        assert int((sigma > factor * rtol * sigma[0]).sum()) == count
    assert abs(float(sigma[0]) / scale - 1) < 1e-6


def test_with_count_refuses_what_rounding_would_spoil() -> None:
    with_count(64, 64, 30, 1e-2, margin=COUNT_MARGIN, dtype=torch.float32)
    with pytest.raises(ValueError, match="moves singular values"):
        with_count(64, 64, 30, 1e-2, margin=COUNT_MARGIN, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="no 4 x 4 matrix has 5"):
        with_count(4, 4, 5, 1e-2, margin=COUNT_MARGIN)


def test_clustered() -> None:
    sigma = clustered(20, 0.1, 1e-3, 6)
    assert sigma.shape == (20,)
    assert torch.equal(sigma, sigma.sort(descending=True).values)
    assert int(((sigma / 0.1 - 1).abs() <= 1.0001e-3).sum()) == 6
    assert float(sigma[7]) <= 0.0101


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_hadamard(n: int) -> None:
    h = hadamard(n)
    assert torch.equal(h.abs(), torch.ones(n, n, dtype=torch.float64))
    assert torch.equal(h @ h.mT, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("m", [8, 32])
def test_hadamard_spectrum_is_exact(dtype: torch.dtype, m: int) -> None:
    # σ with ties, a cluster one unit apart, and a zero; H_8 AᵀA H_8 / 8 = diag(σ²) checked in rational
    # arithmetic.
    sigma = [4.0, 1.0, 1.0, 1.0, 1.0 - 2.0**-10, 1.0 - 2.0**-10, 0.0625, 0.0]
    A = hadamard_spectrum(sigma, m, dtype=dtype)
    assert int((A != 0).sum()) > A.numel() // 2  # dense
    h = [[int(x) for x in row] for row in hadamard(8).tolist()]
    g = exact_gram(A)
    for i in range(8):
        for j in range(8):
            rotated = sum(h[i][a] * g[a][b] * h[b][j] for a in range(8) for b in range(8)) / 8
            assert rotated == (Fraction(sigma[i]) ** 2 if i == j else 0)


def test_one_sided_hadamard_spectrum_is_exact() -> None:
    sigma = [1.0, 0.7, 0.7, 1e-20, 0.0]
    g = exact_gram(hadamard_spectrum(sigma, 16, two_sided=False))
    assert [g[i][i] for i in range(5)] == [Fraction(s) ** 2 for s in sigma]
    assert all(g[i][j] == 0 for i in range(5) for j in range(5) if i != j)


def test_hadamard_spectrum_refuses_what_it_cannot_represent() -> None:
    with pytest.raises(ValueError, match="power of four"):
        hadamard_spectrum([1.0, 1.0], 4)
    with pytest.raises(ValueError, match=r"too many bits for torch\.float32"):
        hadamard_spectrum([1.0, 2.0**-30], 2, dtype=torch.float32)
    with pytest.raises(ValueError, match="too many bits for exact sums"):
        hadamard_spectrum([1.0, 2.0**-60], 2)


def test_signed_permutation_spectrum_is_exact() -> None:
    sigma = [1e30, 3.0, 3.0, 1e-30]
    A = signed_permutation_spectrum([float(torch.tensor(s)) for s in sigma], 7, 6, dtype=torch.float32)
    assert torch.equal(A[A != 0].abs().sort().values, torch.tensor(sigma).sort().values)
    assert int(((A != 0).sum(0) > 1).sum()) == 0
    assert int(((A != 0).sum(1) > 1).sum()) == 0
    with pytest.raises(ValueError, match="not representable"):
        signed_permutation_spectrum([0.1], 2, 2, dtype=torch.float32)


def test_metric_tolerances_stay_useful() -> None:
    # A tolerance that reached a percent would test nothing.
    for dtype in ROUNDOFF:
        assert 0 < metric_rtol(dtype, 65536, 512) < 1e-2
