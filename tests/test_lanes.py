"""Small matrices side by side in vector lanes (csrc/core/lanes.h) against LAPACK, one kind beside another."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bsgap_kernels import _core

Matrix = NDArray[np.float64]
QUICK = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
LANES = 8
# Householder's backward error, and LAPACK's, are a small multiple of n u ||G||.
ROUNDING = 1e-14
# Laguerre's iteration ends after 60 steps; of n / 2 equal largest eigenvalues each takes a fifth of the way.
TOP_ERROR = 1e-6


def rotated(values: Matrix, rng: np.random.Generator) -> Matrix:
    Q = np.linalg.qr(rng.standard_normal((len(values), len(values))))[0]
    G = (Q * values) @ Q.T
    return (G + G.T) / 2


def gram(n: int, rows: int, rng: np.random.Generator) -> Matrix:
    A = rng.standard_normal((rows, n))
    return A.T @ A


def graded(n: int, decades: float, rng: np.random.Generator) -> Matrix:
    """Entries over many orders of magnitude in any order: products of some underflow."""
    scale = 10.0 ** rng.uniform(-decades, 0, n)
    return gram(n, n, rng) * np.outer(scale, scale)


def multiplicities(n: int, rng: np.random.Generator) -> Matrix:
    return rotated(rng.choice([0.0, 0.25, 1.0], n), rng)


def repeated_columns(n: int, rng: np.random.Generator) -> Matrix:
    """What elimination leaves of them shrinks by 1e-16 again and again, down to squares that underflow."""
    A = rng.standard_normal((2 * n, n))
    A[:, n // 2 :] = A[:, :1]
    return A.T @ A


def sparse(n: int, rng: np.random.Generator) -> Matrix:
    """Columns that are zero, or zero but for one entry of any size: nothing to eliminate, or too little."""
    A = np.diag(rng.uniform(0.5, 2, n))
    A[rng.integers(n), 0] += 10.0 ** -rng.uniform(0, 300)
    return A.T @ A


KINDS: dict[str, Callable[[int, np.random.Generator], Matrix]] = {
    "full": lambda n, rng: gram(n, 2 * n, rng),
    "rank one": lambda n, rng: gram(n, 1, rng),
    "half rank": lambda n, rng: gram(n, (n + 1) // 2, rng),
    "zero": lambda n, _: np.zeros((n, n)),
    "diagonal": lambda n, rng: np.diag(rng.integers(0, 4, n).astype(float)),
    "multiplicities": multiplicities,
    "equal": lambda n, _: np.eye(n),
    "graded": lambda n, rng: graded(n, 10, rng),
    "graded, 300 decades": lambda n, rng: graded(n, 150, rng),
    "repeated columns": repeated_columns,
    "sparse": sparse,
    "tiny": lambda n, rng: gram(n, n, rng) * 2.0**-390,
    "huge": lambda n, rng: gram(n, n, rng) * 2.0**390,
}
Kinds = st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=LANES)
Sides = st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64])


def stack(n: int, kinds: list[str], seed: int) -> Matrix:
    return np.stack([KINDS[kind](n, np.random.default_rng([seed, i])) for i, kind in enumerate(kinds)])


def scaled_eigenvalues(G: Matrix, scale: float) -> Matrix:
    values: Matrix = np.linalg.eigvalsh(G * scale)
    return values


@QUICK
@given(Sides, Kinds, st.integers(0, 10**6))
@example(64, sorted(KINDS)[:LANES], 1)
@example(64, sorted(KINDS)[-LANES:], 2)
def test_every_lane_has_the_spectrum_of_its_matrix(n: int, kinds: list[str], seed: int) -> None:
    G = stack(n, kinds, seed)
    found = _core.lane_spectra(G)
    for g, d, e, (scale,), (largest,) in zip(
        G, found["diagonal"], found["off_diagonal"], found["scale"], found["largest"], strict=True
    ):
        size = g.diagonal().max()
        assert (scale == 1.0) if size == 0 else (1 <= size * scale < 2 and np.frexp(scale)[0] == 0.5)
        values = scaled_eigenvalues(g, scale)
        T = np.diag(d) + np.diag(e, 1) + np.diag(e, -1)
        margin = ROUNDING * n * values[-1]
        assert np.abs(np.linalg.eigvalsh(T) - values).max() <= margin
        assert values[-1] - margin <= largest * scale <= values[-1] * (1 + TOP_ERROR) + margin
        for rank in {1, 1 + seed % n, n}:
            assert abs(_core.tridiagonal_eigenvalue(d, e, rank) - values[n - rank]) <= margin


@QUICK
@given(Sides, Kinds, st.integers(0, 10**6), st.lists(st.floats(-20, 0.1), min_size=1, max_size=5))
def test_counts_of_every_lane(n: int, kinds: list[str], seed: int, exponents: list[float]) -> None:
    G = stack(n, kinds, seed)
    tops = G.diagonal(axis1=1, axis2=2).max(1)
    x = np.outer(np.where(tops > 0, tops, 1.0), n * 10.0 ** np.array(exponents))
    found = _core.lane_spectra(G, x)
    for g, at, counts, (scale,) in zip(G, x, found["counts"], found["scale"], strict=True):
        values = scaled_eigenvalues(g, scale)
        margin = ROUNDING * n * values[-1]
        for shift, count in zip(at * scale, counts, strict=True):
            assert (values > shift + margin).sum() <= count <= (values > shift - margin).sum()


@QUICK
@given(Sides, st.integers(0, 10**6))
def test_ties_count_as_not_above(n: int, seed: int) -> None:
    d = np.random.default_rng(seed).integers(0, 5, (LANES, n)).astype(float)
    x = np.tile(np.arange(-1.0, 6.0), (LANES, 1))
    counts = _core.lane_spectra(np.stack([np.diag(row) for row in d]), x)["counts"]
    assert (counts == (d[:, :, None] > x[:, None, :]).sum(1)).all()


@QUICK
@given(Sides, Kinds, st.integers(0, 10**6), st.sampled_from([np.nan, np.inf, -np.inf]), st.integers(0, 7))
def test_a_lane_does_not_see_the_others(n: int, kinds: list[str], seed: int, bad: float, where: int) -> None:
    G = stack(n, kinds, seed)
    where %= len(kinds)
    x = np.tile([0.0, 0.1, 1.0, 1e300], (len(kinds), 1))
    spoiled = G.copy()
    spoiled[where, n // 2, 0] = spoiled[where, n - 1, n - 1] = bad
    company = _core.lane_spectra(spoiled, x)
    for i in set(range(len(kinds))) - {where}:
        alone = _core.lane_spectra(G[i : i + 1], x[i : i + 1])
        for name, values in alone.items():
            assert np.array_equal(company[name][i], values[0]), name


@pytest.mark.parametrize("x", [np.inf, 1e308])
def test_shifts_that_leave_the_range_when_scaled(x: float) -> None:
    G = np.stack([gram(5, 9, np.random.default_rng(0)) * 2.0**power for power in (-390, 0, 390)])
    assert (_core.lane_spectra(G, [[x]] * 3)["counts"] == 0).all()


def test_what_the_binding_refuses() -> None:
    for wrong in (
        np.zeros((3, 3)),
        np.zeros((2, 3, 4)),
        np.zeros((0, 3, 3)),
        np.zeros((9, 3, 3)),
        np.zeros((1, 0, 0)),
    ):
        with pytest.raises(ValueError, match="^G must"):
            _core.lane_spectra(wrong)
    with pytest.raises(ValueError, match="^x must"):
        _core.lane_spectra(np.zeros((2, 3, 3)), np.zeros((1, 3)))
