"""Counts and certificates of complex matrices, held to torch's complex solvers and to 40 digits of mpmath."""

from __future__ import annotations

import mpmath
import pytest
import torch
from torch import Tensor

import bsgap_kernels as bsgap
from bsgap_kernels.ops._real_form import halved_interval


def gaussian_integers(m: int, n: int, rank: int, seed: int) -> Tensor:
    """A product of small Gaussian integers, of the given rank or less."""
    generator = torch.Generator().manual_seed(seed)

    def part(rows: int, columns: int) -> Tensor:
        parts = torch.randint(-3, 4, (2, rows, columns), generator=generator).double()
        return torch.complex(parts[0], parts[1])

    return part(m, rank) @ part(rank, n)


def exact_count(A: Tensor, atol: float, rtol: float) -> int:
    """#{sigma > max(atol, rtol sigma_max)} by complex singular values of 40 digits; no ties."""
    with mpmath.workdps(40):
        sigma = mpmath.svd_c(mpmath.matrix(A.tolist()), compute_uv=False)
        tau = max(mpmath.mpf(atol), mpmath.mpf(rtol) * max(sigma))
        assert all(abs(s - tau) > mpmath.mpf(10) ** -30 for s in sigma)
        return sum(s > tau for s in sigma)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize(("m", "n"), [(4, 3), (3, 5), (6, 6)])
def test_counts_and_certificates_against_40_digits(m: int, n: int, dtype: torch.dtype) -> None:
    proven = 0
    for seed in range(6):
        A = gaussian_integers(m, n, 1 + seed % min(m, n), seed)
        for atol, rtol in [(0.0, 1e-2), (0.0, 0.3), (7.3, 0.0), (2.1, 0.2), (1e-3, 0.0), (1e6, 0.0)]:
            right = exact_count(A, atol, rtol)
            given = A.to(dtype)
            assert bsgap.near_rank(given, atol=atol, rtol=rtol).item() == right
            lower, upper = bsgap.near_rank_interval(given, atol=atol, rtol=rtol)
            assert lower <= right <= upper
            proven += int(lower == upper)
            (in_group,) = bsgap.near_rank_grouped([given], atol=atol, rtol=rtol)
            assert in_group == right
            if rtol == 0:
                thresholds = torch.tensor([atol], dtype=torch.float64)
                assert bsgap.singular_value_counts(given, thresholds, relative=False).item() == right
    assert proven >= 30


def test_a_tie_lies_in_the_interval_and_halves_of_odd_bounds_hold() -> None:
    A = torch.diag(torch.tensor([4j, 3, -2, 1], dtype=torch.complex64))  # three values above 1, one at it
    lower, upper = bsgap.near_rank_interval(A, atol=1.0, rtol=0.0)
    assert lower <= 3 <= upper
    assert bsgap.near_rank_interval(A, atol=0.5, rtol=0.0) == (4, 4)
    low, high = halved_interval(torch.tensor([-1, 0, 1, 3, 4, 5]), torch.tensor([-1, 8, 3, 4, 4, 5]), A)
    assert low.tolist() == [-1, 0, 1, 2, 2, 0]  # the last pair contradicts itself: nothing is known
    assert high.tolist() == [-1, 4, 1, 2, 2, 4]


@pytest.mark.parametrize("rtol", [1e-2, 1e-9])
@pytest.mark.parametrize("bad", [complex(0, float("nan")), complex(float("inf"), 0)])
def test_non_finite_parts(bad: complex, rtol: float) -> None:
    A = torch.eye(5, dtype=torch.complex128).repeat(2, 1, 1)
    A[1, 2, 3] = bad
    assert bsgap.near_rank(A, rtol=rtol).tolist() == [5, -1]
    assert [x.tolist() for x in bsgap.near_rank_interval(A, rtol=rtol)] == [[5, -1], [5, -1]]
    assert bsgap.near_rank_ratio(A, rtol=rtol).isnan().tolist() == [False, True]
    assert bsgap.near_rank_grouped([A[0], A[1]], rtol=rtol).tolist() == [5, -1]


@pytest.mark.parametrize("scale", [1e-300, 1e300])
@pytest.mark.parametrize("rtol", [1e-2, 1e-10])
def test_range(scale: float, rtol: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q, r = torch.linalg.qr(torch.randn(2, 6, 4, dtype=torch.complex128, generator=generator))
    sigma = torch.tensor([1.0, 5 * rtol, rtol / 5, rtol / 100], dtype=torch.float64)
    A = (q[0] * sigma) @ torch.linalg.qr(r[1]).Q.mH * scale
    A[0] *= 1.0  # finite parts whose absolute value may overflow are told from infinite ones
    assert bsgap.near_rank(A, rtol=rtol).item() == 2
    big = torch.full((2, 2), complex(1.7e308, 1.7e308), dtype=torch.complex128)
    assert bsgap.near_rank(big, rtol=rtol).item() == 1


def test_views_batches_and_grouped_rows() -> None:
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(2, 3, 8, 5, dtype=torch.complex64, generator=generator)
    for view in (A, A.mH, A.conj(), A.transpose(0, 1), A[..., ::2, :], A.real + 1j * A.imag):
        right = torch.linalg.matrix_rank(view, rtol=0.3)
        assert torch.equal(bsgap.near_rank(view, rtol=0.3), right)
        assert torch.equal(torch.ops.bsgap.near_rank(view, rtol=0.3), right)
    grouped = bsgap.near_rank_grouped([A, A.real, A[0, 0]], rtol=0.3)
    rows = [A.flatten(0, -2), A.real.flatten(0, -2), A[0, 0]]
    assert grouped.tolist() == [int(torch.linalg.matrix_rank(B, rtol=0.3)) for B in rows]
    many = torch.linspace(0.05, 0.95, 12)
    sigma = torch.linalg.svdvals(A)
    right = (sigma[..., None, :] > many[:, None] * sigma[..., None, :1]).sum(-1)
    assert torch.equal(bsgap.singular_value_counts(A, many), right)
    assert torch.equal(torch.func.vmap(bsgap.near_rank)(A), torch.linalg.matrix_rank(A))
