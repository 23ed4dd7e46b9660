"""Properties of the C++ core on random input, in exact rational arithmetic where a theorem is claimed."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import rational
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from bsgap_kernels import _core

Matrix = NDArray[np.float64]
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
BIG = 2.0**600


def numbers(largest: float) -> st.SearchStrategy[float]:
    """Floats of every size, subnormal ones too, and small integers: those make ties and singular matrices."""
    return st.one_of(
        st.integers(-3, 3).map(float),
        st.floats(-largest, largest),
        st.floats(-4.0, 4.0),
        st.floats(-1e-300, 1e-300),
    )


def matrices(largest: float, *, side: int = 5) -> st.SearchStrategy[Matrix]:
    shape = st.tuples(st.integers(1, side), st.integers(1, side))
    return shape.flatmap(lambda s: hnp.arrays(np.float64, s, elements=numbers(largest)))


def symmetric(largest: float, *, side: int = 6) -> st.SearchStrategy[Matrix]:
    square = st.integers(1, side).flatmap(lambda n: hnp.arrays(np.float64, (n, n), elements=numbers(largest)))
    return square.map(lambda a: np.tril(a) + np.tril(a, -1).T)


def gaussian_symmetric(n: int, seed: int, decades: float) -> Matrix:
    rng = np.random.default_rng(seed)
    Q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    G = (Q * 10.0 ** rng.uniform(-decades, 0, n)) @ Q.T
    return (G + G.T) / 2


@QUICK
@given(symmetric(1e150), numbers(1e150))
def test_inertia_stays_within_its_error(G: Matrix, shift: float) -> None:
    # #{λ > s + δ} <= positive pivots <= #{λ > s - δ}, exactly, for any numbers.
    found = _core.inertia(G, shift)
    if not found["valid"]:
        return
    error = sum(Fraction(found[name]) for name in ("factor_error", "shift_error", "underflow_error"))
    assert rational.count_above(G.tolist(), Fraction(shift) + error) <= found["positive"]
    assert found["positive"] <= rational.count_above(G.tolist(), Fraction(shift) - error)


@QUICK
@given(st.integers(20, 140), st.integers(0, 10**6), st.floats(0, 12), st.floats(0, 1))
def test_inertia_of_panels_against_eigvalsh(n: int, seed: int, decades: float, where: float) -> None:
    G = gaussian_symmetric(n, seed, decades)
    shift = float(10.0 ** (-decades * where))
    found = _core.inertia(G, shift)
    values = np.linalg.eigvalsh(G)
    error = found["factor_error"] + found["shift_error"] + found["underflow_error"] + 1e-13 * n
    assert (values > shift + error).sum() <= found["positive"] <= (values > shift - error).sum()


@QUICK
@given(matrices(BIG), st.one_of(numbers(BIG).map(abs), st.none()), st.booleans())
def test_interval_holds_the_exact_count(A: Matrix, atol: float | None, center: bool) -> None:
    exact = rational.gram(A.tolist(), center=center)
    # Half of the thresholds are an entry of A: in sparse matrices that is a singular value, a tie.
    a = float(np.abs(A).max()) if atol is None else atol
    lower, upper = _core.near_rank_interval(A, atol=a, rtol=0.0, center=center)
    count = rational.count_above(exact, Fraction(a) ** 2)
    assert lower <= count <= upper


@QUICK
@given(matrices(1e18), st.floats(0, 8), st.booleans(), st.integers(0, 2**63 - 1))
def test_probed_interval_holds_the_exact_count(A: Matrix, atol: float, center: bool, seed: int) -> None:
    A = A.astype(np.float32)
    lower, upper = _core.near_rank_interval(A, atol=atol, rtol=0.0, center=center, mode="probed", seed=seed)
    count = rational.count_above(rational.gram(A.tolist(), center=center), Fraction(atol) ** 2)
    assert lower <= count <= upper


@QUICK
@given(matrices(BIG), st.booleans(), st.booleans())
def test_gram_error_bounds_the_error(A: Matrix, center: bool, observations: bool) -> None:
    found = _core.gram(A, center=center, observations=observations)
    if not A.any():
        return
    scaled = [[Fraction(x) * Fraction(2) ** found["exponent"] for x in row] for row in A.tolist()]
    if center and observations:
        means = [sum(column) / len(scaled) for column in zip(*scaled, strict=True)]
        scaled = [[x - mean for x, mean in zip(row, means, strict=True)] for row in scaled]
    if observations:
        exact = rational.gram(list(zip(*scaled, strict=True)))
    else:
        exact = rational.gram(scaled, center=center)
    got = found["gram"].tolist()
    squares = sum(
        (Fraction(g) - e) ** 2 for p, q in zip(got, exact, strict=True) for g, e in zip(p, q, strict=True)
    )
    bound = Fraction(found["rounding_error"]) + Fraction(found["centring_error"])
    assert squares <= len(got) * bound**2  # the Frobenius norm is at most √n times the spectral one
    trace = sum(exact[i][i] for i in range(len(exact)))
    assert center or trace <= Fraction(found["frobenius_sq"])


@pytest.mark.parametrize("rows", [255, 256, 257, 600, 17000])
@pytest.mark.parametrize("center", [False, True])
def test_gram_error_over_chunks_and_slabs(rows: int, center: bool) -> None:
    rng = np.random.default_rng(rows)
    A = rng.standard_normal((rows, 3)) * [1.0, 1e-3, 1e3] + (1e4 if center else 0.0)
    found = _core.gram(A, center=center)
    exact = rational.gram(A.tolist(), center=center)
    error = max(abs(Fraction(float(found["gram"][i, j])) - exact[i][j]) for i in range(3) for j in range(3))
    assert error <= Fraction(found["rounding_error"]) + Fraction(found["centring_error"])


@QUICK
@given(st.integers(1, 40), st.integers(0, 10**6), st.floats(-2, 2), st.booleans())
def test_sturm_counts_against_eigvalsh(n: int, seed: int, x: float, graded: bool) -> None:
    rng = np.random.default_rng(seed)
    size = 10.0 ** rng.uniform(-8, 0, n) if graded else np.ones(n)
    d, e = rng.standard_normal(n) * size, rng.standard_normal(n - 1) * size[1:]
    e[rng.random(n - 1) < 0.2] = 0.0
    values = np.linalg.eigvalsh(np.diag(d) + np.diag(e, 1) + np.diag(e, -1))
    margin = 1e-14 * n * max(1.0, float(np.abs(values).max()))
    count = _core.sturm_count_above(d, e, x)
    assert (values > x + margin).sum() <= count <= (values > x - margin).sum()


@QUICK
@given(symmetric(10.0).map(lambda a: np.round(a)), st.integers(-6, 6))
def test_sturm_counts_ties_as_not_above(G: Matrix, x: int) -> None:
    # Diagonal matrices of integers: every comparison is exact.
    d = np.diag(G).copy()
    assert _core.sturm_count_above(d, np.zeros(len(d) - 1), float(x)) == int((d > x).sum())
