"""Every constant of the bounds in csrc/cuda against the formulas of docs/certificates.md, in fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import cuda_host
import numpy as np
import pytest
import torch
from cuda_host.problems import Group, problem
from numpy.typing import NDArray
from torch import Tensor

pytestmark = [pytest.mark.torch_free, pytest.mark.skipif(cuda_host.COMPILER is None, reason="needs g++")]

U, TINY = Fraction(1, 2**53), Fraction(2) ** -1074
NEAR = 1e-9
LAST = 16 * 2.0**-1074
"""What rounding outwards adds to the smallest numbers."""


def gamma(n: int | Fraction) -> Fraction:
    return n * U / (1 - n * U)


def matrix(n: int, seed: int = 0) -> Tensor:
    """Symmetric, with a diagonal that is far from a shift at one place."""
    A = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    G = (A + A.mT) / 8 + torch.diag(torch.arange(1.0, n + 1, dtype=torch.float64))
    G[0, 0] = -1000.0 * n
    return G


def growth(G: Tensor, shift: float) -> tuple[float, int]:
    """Σ |l_ik d_k l_jk| over i = j of LDLᵀ without pivoting, and the positive pivots."""
    work: NDArray[np.float64] = G.numpy() - shift * np.eye(len(G))
    total, positive = 0.0, 0
    for k in range(len(work)):
        column = work[k + 1 :, k].copy()
        pivot = work[k, k]
        total += abs(pivot) + float((np.abs(column * column / pivot)).sum())
        positive += pivot > 0
        work[k + 1 :, k + 1 :] -= np.outer(column, column / pivot)
    return total, positive


def terms(G: Tensor, shift: float) -> tuple[Fraction, Fraction, Fraction, int]:
    """Factorisation, shift and underflow term, and the count."""
    n = len(G)
    total, positive = growth(G, shift)
    factor = gamma(n + 4) * Fraction(total) * (1 + gamma(Fraction(n * n, 2) + 2 * n + 8))
    largest = Fraction(float((G.diagonal() - shift).abs().max()))
    return factor, U * largest * (1 + 4 * U), (n + 1) ** 2 * TINY, positive


@pytest.mark.parametrize("n", [2, 31, 33, 90, 128])
def test_factorisations_of_small_matrices(n: int) -> None:
    G = matrix(n)
    for shift in (0.0, 7.3):
        factor, of_shift, underflow, positive = terms(G, shift)
        count, valid, error = cuda_host.inertia(G, shift)
        assert valid
        assert count == positive
        expected = factor + (of_shift if shift else 0) + underflow
        assert error == pytest.approx(float(expected), rel=NEAR, abs=LAST)
        assert Fraction(error) >= expected * (1 - Fraction(NEAR))
    tiny = G * 2.0**-1060  # what is left of it is the underflow term
    assert cuda_host.inertia(tiny, 0.0)[2] >= float((n + 1) ** 2 * TINY)


@pytest.mark.parametrize("n", [129, 200])
def test_factorisations_of_large_matrices(n: int) -> None:
    G = matrix(n)
    p = problem([Group(G[None], roundings=5)])
    tau = 7.3
    cuda_host.count_grams(
        p.grams, p.table, p.sides, p.batches, None, tau, 0.0, None, torch.zeros(1).double(), False, False
    )
    shift, factor, of_shift, underflow, count, replaced = cuda_host.factorisation(0)
    assert (shift, replaced) == (tau * tau, 0)
    expected = terms(G, shift)
    for value, right in zip((factor, of_shift, underflow), expected[:3], strict=True):
        assert value == pytest.approx(float(right), rel=NEAR, abs=LAST)
    assert count == expected[3]


def test_a_replaced_pivot_is_part_of_the_error() -> None:
    """It moves the diagonal by 2⁻²⁶ of its largest entry."""
    n = 130
    G = torch.diag(torch.arange(1.0, n + 1, dtype=torch.float64))
    p = problem([Group(G[None], roundings=5)])
    cuda_host.count_grams(
        p.grams, p.table, p.sides, p.batches, None, 8.0, 0.0, None, torch.zeros(1).double(), False, False
    )
    shift, factor, _, _, count, replaced = cuda_host.factorisation(0)
    assert (shift, replaced) == (64.0, 1)  # an eigenvalue
    assert count == n - 64  # which does not count
    moved = 2.0**-26 * (n - 64)
    own = float(terms(G + 1e-300 * torch.eye(n), 64.0 + 1e-12)[0])
    assert factor >= moved
    assert factor == pytest.approx(moved + own, rel=1e-5, abs=LAST)


@pytest.mark.parametrize("exponent", [0, 3, -3])
@pytest.mark.parametrize("trace", [12.5, 2.0**-1040])
def test_gram_matrices(trace: float, exponent: int) -> None:
    """Section 1: rounding, underflow of products, and what scaling down loses."""
    side, depth, c = 40, 300, 57
    cells = side * depth
    squares = Fraction(trace) * (1 + 2 * gamma(c + side)) + cells * TINY
    lost = math.sqrt(cells) * float(TINY) if exponent < 0 else 0.0
    expected = float(gamma(c) * squares + cells * TINY) + (2 * math.sqrt(squares) + lost) * lost
    assert cuda_host.gram_error(trace, side, depth, c, exponent) == pytest.approx(
        expected, rel=NEAR, abs=LAST
    )


@pytest.mark.parametrize("n", [34, 128])
def test_bounds_of_the_largest_eigenvalue(n: int) -> None:
    """Each end is a shift with its factorisation's error, which is far above the rounding of the shift."""
    G = matrix(n)
    proposal = float(torch.linalg.eigvalsh(G)[-1])
    low, high = cuda_host.largest_eigenvalue(G, proposal)
    lower, gap = 0.0, 2.0**-27
    while gap < 2.0**-8:
        shift = proposal * (1 - gap)
        error = cuda_host.inertia(G, shift)[2]
        lower = max(lower, shift - error)
        if error <= gap * proposal:
            break
        gap *= 64
    shift = proposal * (1 + 2.0**-27)
    positive, _, error = cuda_host.inertia(G, shift)
    assert positive == 0
    assert error > 1e4 * math.ulp(shift)
    assert proposal - low == pytest.approx(proposal - lower, rel=1e-3, abs=LAST)
    assert high - shift == pytest.approx(error, rel=1e-3, abs=LAST)
    assert low < proposal < high
