"""Every constant of a bound, against its formula in exact arithmetic, from both sides.

A bound that is too small is false and one that is too large is loose: either fails here. Sums are held to
inputs that lose exactly what the length of their chains allows: any other length gives another number.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray

from bsgap_kernels import _core

Matrix = NDArray[np.float64]
U = Fraction(1, 2**53)
TINY = Fraction(1, 2**1074)


def gamma(n: int) -> Fraction:
    return n * U / (1 - n * U)


def just_above(value: float, exact: Fraction, slack: float = 1e-9) -> bool:
    """At least the exact value, and hardly more."""
    return exact <= Fraction(value) <= exact * (1 + Fraction(slack))


def growth(C: Matrix) -> tuple[Fraction, int]:
    """T = Σ|d_q|(1 + Σ l_iq²) of L D Lᵀ in rational arithmetic, and how many d are positive."""
    n = len(C)
    a = [[Fraction(float(x)) for x in row] for row in C]
    total, positive = Fraction(0), 0
    for k in range(n):
        d = a[k][k]
        column = [a[i][k] / d for i in range(k + 1, n)]
        total += abs(d) * (1 + sum(x * x for x in column))
        positive += d > 0
        for i in range(k + 1, n):
            for j in range(k + 1, i + 1):
                a[i][j] -= column[i - k - 1] * column[j - k - 1] * d
                a[j][i] = a[i][j]
    return total, positive


def symmetric(n: int, seed: int) -> Matrix:
    """Indefinite, with pivots far from 0."""
    A = np.random.default_rng(seed).integers(-8, 9, (n, n)).astype(np.float64)
    return A + A.T + np.diag(np.where(np.arange(n) % 3, 16.0 * n, -16.0 * n))


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9, 17])
@pytest.mark.parametrize("shift", [0.0, 2.5])
def test_errors_of_a_factorisation(n: int, shift: float) -> None:
    C = symmetric(n, n)
    found = _core.inertia(C, shift)
    shifted = C - shift * np.eye(n)  # exact: small multiples of a half
    T, positive = growth(shifted)
    assert found["valid"]
    assert found["positive"] == positive
    assert just_above(found["factor_error"], gamma(n + 4) * T)
    largest = Fraction(float(np.abs(np.diag(shifted)).max()))
    assert just_above(found["shift_error"], U * largest) if shift else found["shift_error"] == 0
    assert Fraction(found["underflow_error"]) == (n + 1) ** 2 * TINY


@pytest.mark.parametrize("n", [65, 200, 300, 520])
def test_errors_of_blocked_factorisations(n: int) -> None:
    # L and D are chosen: every block, panel and strip adds its part to T.
    rng = np.random.default_rng(n)
    L = np.tril(rng.integers(-1, 2, (n, n)).astype(np.float64), -1) / 4 + np.eye(n)
    d = rng.choice([-2.0, 1.0, 4.0], n)
    found = _core.inertia((L * d) @ L.T, 0.0)
    T = float((np.abs(d) * (L**2).sum(0)).sum())
    assert found["positive"] == (d > 0).sum()
    assert found["factor_error"] == pytest.approx(float(gamma(n + 4)) * T, rel=1e-6)


def roundings(depth: int, side: int) -> int:
    """c of docs/certificates.md, section 1."""
    slabs = 1
    if side <= 512:
        slabs = max(1, min(16, depth // max(1024, 8 * side)))
        slabs = 1 if slabs < 4 and side > 128 else slabs
    rows = math.ceil(depth / slabs)
    return min(256, depth) + math.ceil(rows / 256) + slabs + 2


@pytest.mark.parametrize(
    ("m", "n"), [(1, 1), (5, 3), (255, 2), (256, 2), (257, 2), (5000, 3), (70000, 1), (4500, 130), (3, 700)]
)
def test_the_gram_term(m: int, n: int) -> None:
    A = np.random.default_rng(m).integers(-3, 4, (m, n)).astype(np.float64)  # no sum of these rounds
    for observations in {False, m < n}:
        side, depth = (m, n) if observations else (n, m)
        found = _core.gram(A, observations=observations)
        c, squares = roundings(depth, side), Fraction(float((A**2).sum()))
        assert _core.gram_roundings(depth, side) == c
        assert just_above(found["frobenius_sq"], squares)
        assert just_above(found["rounding_error"], gamma(c) * squares)


def test_the_underflow_of_a_gram_matrix() -> None:
    # The squares are normal numbers and scaled down: each entry may lose half of the smallest subnormal.
    A = np.array([[2.0**600, 3.0], [0.0, 2.0**590]])
    found = _core.gram(A)
    assert found["exponent"] == -600
    squares, lost = 1 + Fraction(1, 2**20), 2 * TINY
    c = roundings(2, 2)
    assert just_above(found["rounding_error"], gamma(c) * squares + 2 * Fraction(math.sqrt(squares)) * lost)
    # Without scaling k·p·2^-1074 is left of entries of 0.
    tiny = np.zeros((3, 2))
    tiny[0, 0] = 2.0**-199
    assert (
        Fraction(_core.gram(tiny)["rounding_error"])
        >= 6 * TINY + gamma(roundings(3, 2)) * Fraction(2) ** -398
    )


@pytest.mark.parametrize(("m", "n"), [(2, 1), (64, 3), (256, 2), (600, 2), (5000, 1)])
def test_the_centring_term(m: int, n: int) -> None:
    # Means of 0 and exact sums: ρ is the rounding of the sums alone.
    A = np.where(np.arange(m) % 2 == 0, 1.0, -1.0)[:, None] * np.arange(1.0, n + 1)
    found = _core.gram(A, center=True)
    squares = Fraction(float((A**2).sum()))
    c = min(256, m) + -(-m // 256) + 2
    e = gamma(c) + 3 * U
    assert just_above(found["centring_error"], (2 + e) * e * squares)
    # A residual of the mean counts in full: here the sums of A are exact and 3 is no divisor of 1.
    A = np.zeros((3, 1))
    A[0] = 1.0
    found = _core.gram(A, center=True)
    least = (2 * (gamma(6) + 3 * U)) * Fraction(2, 3)
    assert Fraction(found["centring_error"]) >= least * (1 - Fraction(1, 10**9))
    assert found["centring_error"] <= 2 * float(least)


@pytest.mark.parametrize("n", [1, 2, 7, 90])
def test_the_lower_end_of_the_largest_eigenvalue(n: int) -> None:
    # Lanczos is handed the top vector: what is taken off the quotient is the bound of its rounding.
    G = np.zeros((n, n))
    G[0, 0] = 1.0
    start = np.zeros(n)
    start[0] = 1.0
    found = _core.certified_count(G + np.eye(n) * 0.25, rtol=0.9, start=list(start))
    lower, upper = found["largest_eigenvalue"]
    frobenius = Fraction(math.sqrt(1.25**2 + (n - 1) * 0.25**2))
    taken = Fraction(5, 4) - Fraction(lower)
    rounded = 16 * U * Fraction(5, 4)  # down, twice
    assert abs(taken - gamma(3 * n + 32) * frobenius - rounded) <= 6 * U
    assert Fraction(5, 4) <= Fraction(upper) <= Fraction(5, 4) * (1 + Fraction(2, 10**6))


@pytest.mark.parametrize("n", [1, 3, 40])
def test_the_probe_term(n: int) -> None:
    # y is exactly G ω: what is left are the two roundings and the factor 10·√(2/π).
    omega = np.round(np.random.default_rng(n).standard_normal((9, n)) * 8)
    G = np.diag(np.arange(1.0, n + 1))
    frobenius, length = math.sqrt((np.diag(G) ** 2).sum()), math.sqrt((omega**2).sum(1).max())
    factor = 10 * math.sqrt(2 / math.pi)
    for product_error in (0.0, 1e-3):
        expected = factor * (float(gamma(n + 22)) * frobenius + product_error) * length
        found = _core.probe_bound(G, omega, omega @ G, product_error)
        assert expected * (1 - 1e-14) <= found <= expected * (1 + 1e-9)
    omega[:] = 0
    omega[3, 0] = 1.0
    found = _core.probe_bound(np.eye(n), omega, 2 * omega, 0.0)
    assert factor <= found <= factor * (1 + 1e-9)


def column(m: int, first: dict[int, float], rest: float = 0.0) -> Matrix:
    A = np.full((m, 1), rest)
    for row, value in first.items():
        A[row] = value
    return A


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("columns", [1, 3, 17, 40])
@pytest.mark.parametrize("order", ["C", "F"])
def test_float32_chains_lose_what_their_length_allows(dtype: type, columns: int, order: str) -> None:
    def summed(A: Matrix) -> Fraction:
        wide = np.asarray(np.repeat(A, columns, axis=1), dtype=dtype, order=order)  # type: ignore[call-overload]
        G = _core.gram(wide, float32=True)["gram"]
        assert bool((G[0, 0] == G).all())
        return Fraction(float(G[0, 0]))

    half = Fraction(1, 2**24)  # of the last place of 1: a product of this size is lost beside it, to even
    # A chain is 16 products: all after the first are lost, the next chain's sum is not.
    chain = np.concatenate(([1.0], np.full(31, 2.0**-12), np.zeros(96)))[:, None]
    assert summed(chain) == 1 + 16 * half
    # Eight chains are added up in float32: seven sums of half a place are lost as well, 22 of 23 roundings.
    place = np.arange(128)
    worst = np.where(place == 0, 1.0, np.where(place < 16, 2.0**-12, 2.0**-14))[:, None]
    exact = 1 + 15 * half + 7 * half
    assert summed(worst) == 1
    assert _core.FLOAT32_SUM_ROUNDINGS == 23 == (exact - 1) / half + 1
    # Then float64 adds: of the next 128 rows nothing is lost beside 1.
    assert summed(np.concatenate((worst, np.full((128, 1), 2.0**-14)))) == 1 + 8 * half


@pytest.mark.parametrize("columns", [1, 3, 9, 30])
def test_float64_chunks_lose_what_their_length_allows(columns: int) -> None:
    quarter = Fraction(1, 2**54)
    A = np.repeat(column(512, {0: 1.0}, 2.0**-27), columns, axis=1)
    G = _core.gram(A)["gram"]
    assert bool((G[0, 0] == G).all())
    assert Fraction(float(G[0, 0])) == 1 + 256 * quarter  # 255 products are lost, the next chunk's sum is not
    assert G[0, 0] < 1 + 511 * quarter <= Fraction(float(G[0, 0])) + gamma(256 + 2 + 1) * 2
