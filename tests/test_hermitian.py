"""hermitian=True: counts of |eigenvalues| of the lower triangle, as torch's, and certificates of them."""

from __future__ import annotations

import pytest
import rational
import torch
from torch import Tensor

import bsgap_kernels as bsgap
from bsgap_kernels.dispatch import select_backend

DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pairs_of_opposite_sign(values: list[float], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Eigenvalues +a and -a for every value a, exactly: [[0, z], [z*, 0]], |z| = a, shuffled."""
    n = 2 * len(values)
    A = torch.zeros(n, n, dtype=dtype)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    for i, a in enumerate(values):
        p, q = order[2 * i], order[2 * i + 1]
        A[p, q] = a * 1j if dtype.is_complex else a
        A[q, p] = A[p, q].conj()
    return A


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_lower_triangle_is_read(dtype: torch.dtype) -> None:
    A = random(3, 7, 7, dtype=dtype)  # not Hermitian at all
    for options in ({"rtol": 0.3}, {"atol": 1.5}, {"tol": torch.tensor([0.5, 1.0, 2.0])}, {"rtol": 1e-9}, {}):
        right = torch.linalg.matrix_rank(A, hermitian=True, **options)
        assert torch.equal(bsgap.near_rank(A, hermitian=True, **options), right)
        assert torch.equal(torch.ops.bsgap.near_rank(A, hermitian=True, **options), right)
    above = torch.triu(torch.full_like(A, torch.nan), 1)
    lower = torch.where(above == 0, A, above)
    for rtol in (0.3, 1e-14):
        right = torch.linalg.matrix_rank(A, rtol=rtol, hermitian=True)
        assert torch.equal(bsgap.near_rank(lower, rtol=rtol, hermitian=True), right)
        lower[1, 4, 2] = torch.inf
        assert bsgap.near_rank(lower, rtol=rtol, hermitian=True).tolist() == [right[0], -1, right[2]]
        lower[1, 4, 2] = A[1, 4, 2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_opposite_eigenvalues_far_below_the_root_of_eps(dtype: torch.dtype) -> None:
    wide = dtype in (torch.float64, torch.complex128)
    values = [2.0**-e for e in ((0, 4, 9, 20, 34, 39, 44) if wide else (0, 4, 9, 20, 30, 60, 90))]
    A = pairs_of_opposite_sign(values, dtype)
    for i in range(1, len(values)):
        rtol = values[i] * 1.4
        assert bsgap.near_rank(A, rtol=rtol, hermitian=True).item() == 2 * i
        assert bsgap.near_rank(A, atol=rtol, hermitian=True).item() == 2 * i
        assert bsgap.near_rank(A, atol=torch.tensor(rtol), hermitian=True).item() == 2 * i
    assert bsgap.near_rank(A, hermitian=True) == torch.linalg.matrix_rank(A, hermitian=True)


def symmetric_integers(n: int, seed: int) -> Tensor:
    """Small integers, of rank n - 1 or less where seed is odd."""
    A = torch.randint(-4, 5, (n, n), generator=torch.Generator().manual_seed(seed)).double()
    if seed % 2:
        A[-1] = A[0] * 2 - A[1]
    weights = torch.tensor([1.0, -1.0] * n)[:n].double()
    return (A.mT * weights) @ A if seed % 2 else A.tril() + A.tril(-1).mT


@pytest.mark.parametrize("n", [2, 5, 9])
def test_certificates_against_exact_arithmetic(n: int) -> None:
    proven = 0
    for seed in range(12):
        S = symmetric_integers(n, seed)
        rows, opposite = S.tolist(), (-S).tolist()
        for atol in (1.0, 0.37, 3.0, 1e-3, 100.25):
            right = rational.count_above(rows, atol) + rational.count_above(opposite, atol)
            for dtype in (torch.float64, torch.complex128, torch.float32):
                lower, upper = bsgap.near_rank_interval(S.to(dtype), atol=atol, rtol=0.0, hermitian=True)
                assert lower <= right <= upper
                proven += int(lower == upper)
            assert bsgap.near_rank(S, atol=atol + 1e-6, hermitian=True) <= right
    assert proven >= 150


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_matrices(dtype: torch.dtype) -> None:
    A = random(4, 33, 33, dtype=torch.float32).to(dtype)
    for options in ({}, {"rtol": 0.3}, {"atol": 2.0}):
        right = torch.linalg.matrix_rank(A.float(), hermitian=True, **options)
        assert torch.equal(bsgap.near_rank(A, hermitian=True, **options), right)


@pytest.mark.parametrize("scale", [2.0**-1000, 2.0**1000])
def test_range(scale: float) -> None:
    A = pairs_of_opposite_sign([1.0, 2.0**-3, 2.0**-30], torch.float64) * scale
    assert [bsgap.near_rank(A, rtol=r, hermitian=True).item() for r in (0.5, 1e-2, 2.0**-31)] == [2, 4, 6]
    assert bsgap.near_rank_interval(A, rtol=1e-2, hermitian=True) == (4, 4)


def test_eigenvalues_are_taken_for_singular_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.linalg, "svdvals", None)
    A = pairs_of_opposite_sign([1.0, 2.0**-9, 2.0**-30], torch.float64)
    for options in ({"rtol": 1e-8}, {"atol": 1e-8}, {"atol": torch.tensor(1e-8)}):
        assert bsgap.near_rank(A, hermitian=True, **options) == 4
    plan = select_backend("near_rank", torch.float64, 9, 9, 1e-8, hermitian=True)
    assert (plan.gram, plan.count) == (None, "eigvalsh")
