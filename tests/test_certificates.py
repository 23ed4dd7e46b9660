"""The certified intervals: every error term carries weight, and no interval is false.

For each term an error of the size of its bound is injected and the interval holds; with the term switched
off a committed case gives a false interval.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import certificate_families as families
import numpy as np
import pytest
import rational
import torch
from numpy.typing import NDArray

import bsgap_kernels as bsgap
from bsgap_kernels import _core

U = 2.0**-53  # unit roundoff
TINY = 2.0**-1074  # smallest subnormal
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "certificates.json"

Matrix = NDArray[np.float64]


def interval(G: Matrix, **options: object) -> tuple[int, int]:
    found = _core.certified_count(G, **options)  # type: ignore[arg-type]
    return found["lower"], found["upper"]


def holds(bounds: tuple[int, int], count: int) -> bool:
    return bounds[0] <= count <= bounds[1]


# --- Gram ---------------------------------------------------------------------------------------------


def test_gram_term_natural_rounding() -> None:
    # σ² = 1 + 255·2^-54, but every 2^-54 that is added to 1 rounds away: g = 1. The threshold lies between.
    A = np.full((256, 1), 2.0**-27)
    A[0, 0] = 1.0
    atol = 1.0 + 2.0**-48
    assert rational.count_above(rational.gram(A.tolist()), Fraction(atol) ** 2) == 1
    found = _core.gram(A)
    assert found["gram"][0, 0] == 1.0
    assert not holds(
        interval(found["gram"], atol=atol, gram_error=found["rounding_error"], without=["gram"]), 1
    )
    assert holds(interval(found["gram"], atol=atol, gram_error=found["rounding_error"]), 1)
    assert holds(_core.near_rank_interval(A, atol=atol, rtol=0.0), 1)


@pytest.mark.parametrize("sign", [-1, 1])
def test_gram_term_injected(sign: int) -> None:
    error = 1e-3
    exact = np.diag([1.0, 0.01])
    rounded = exact + np.diag([0.0, sign * 0.99 * error])
    atol = float(np.sqrt(0.01 + sign * 0.5 * error))
    count = 1 + (sign < 0)
    assert not holds(interval(rounded, atol=atol, gram_error=error, without=["gram"]), count)
    assert holds(interval(rounded, atol=atol, gram_error=error), count)


@pytest.mark.parametrize("observations", [False, True])
@pytest.mark.parametrize("rows", [3, 64, 1000])
@pytest.mark.parametrize("mean", [0.1, 1e12, 2.0**52, -(2.0**53) + 1])
def test_centring_beside_a_large_mean(mean: float, rows: int, observations: bool) -> None:
    # The means are no float64, and the last column is constant: what it leaves must be 0.
    A = mean + abs(np.spacing(mean)) * (np.arange(rows)[:, None] % np.array([2, 3, 1]))
    exact = rational.gram(A.tolist(), center=True)
    found = _core.gram(A, center=True, observations=observations)
    scale = 4.0 ** -found["exponent"]
    size = float(exact[0][0] + exact[1][1])
    if observations:
        assert np.trace(found["gram"]) * scale == pytest.approx(size, rel=1e-14 * rows)
    else:
        error = found["gram"] * scale - np.array(exact, dtype=float)
        assert np.abs(error).max() <= 1e-15 * rows * size
        assert not found["gram"][2].any()
    assert found["centring_error"] * scale <= 1e-13 * size
    atol = 1.25 * float(
        np.sqrt(size)
    )  # above σ, which was counted when the rest of the mean was not taken off
    assert _core.near_rank_interval(A, atol=atol, rtol=0.0, center=True) == (0, 0)


def test_equal_rows_leave_nothing_when_centred() -> None:
    rng = np.random.default_rng(0)
    for shape in ((3, 5), (50, 7), (2000, 3)):
        for scale in (1.0, 1e-200, 1e300, 5e-324):
            A = np.broadcast_to(np.round(rng.standard_normal(shape[1]), 3) * scale, shape).copy()
            assert _core.near_rank_interval(A, center=True) == (0, 0)
            A[1, 0] += abs(A[0, 0]) / 2 + TINY
            assert _core.near_rank_interval(A, center=True) == (1, 1)


def test_differences_far_below_the_entries_are_scaled_to_their_own_size() -> None:
    # Their squares underflow beside the constant 1, and σ = 1e-200·√(3/4).
    A = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 1e-200]])
    assert _core.near_rank_interval(A, center=True) == (1, 1)
    assert _core.near_rank_interval(A, atol=0.86e-200, rtol=0.0, center=True) == (1, 1)
    assert _core.near_rank_interval(A, atol=0.87e-200, rtol=0.0, center=True) == (0, 0)
    assert bsgap.near_rank(torch.from_numpy(A), rtol=1e-2, center=True) == 1


# --- LDL^T, shift, underflow -------------------------------------------------------------------------


def vanishing_pivots() -> Matrix:
    """Two 3 x 3 blocks whose first pivots are about a unit in the last place at the two shifts beside 4.

    Their reciprocals swallow the digits of everything else: either shift finds one eigenvalue too few.
    """
    G = np.zeros((6, 6))
    G[:3, :3] = [[4.0 - 25 * 2.0**-51, 2.0, 2.0], [2.0, 2.875, -0.9375], [2.0, -0.9375, 5.25]]
    G[3:, 3:] = [[4.0 + 12 * 2.0**-50, 2.0, 2.0], [2.0, 5.5, -0.125], [2.0, -0.125, 2.75]]
    return G


def test_ldlt_term_off_is_false() -> None:
    # Eigenvalues 0.52, 4.82, 6.79 and 0.88, 4.20, 7.17: nothing within 5 % of the threshold.
    G = vanishing_pivots()
    count = rational.count_above(G.tolist(), 4)
    assert count == 4
    assert interval(G, atol=2.0, without=["ldlt"]) == (3, 3)
    assert holds(interval(G, atol=2.0), count)


def shifted_chain(n: int = 8) -> tuple[Matrix, float]:
    """L D Lᵀ with L bidiagonal of ones, D = (3 ... 3, 2^-51), and a² = 2^-53.

    Every subtraction of the shift rounds it away and every other operation is exact, so that the pivots are
    D, all positive. But the smallest eigenvalue is about 2^-51 / n, below the shift.
    """
    L = np.eye(n) + np.diag(np.ones(n - 1), -1)
    return L @ np.diag([3.0] * (n - 1) + [2.0**-51]) @ L.T, 2.0**-26.5


def test_shift_term_off_is_false() -> None:
    # The spare roundings of the LDLᵀ bound cover the shift's too (u max|c_jj| <= u T), so both are off here.
    G, atol = shifted_chain()
    count = rational.count_above(G.tolist(), Fraction(atol) ** 2)
    assert count == 7
    assert not holds(interval(G, atol=atol, without=["ldlt", "shift"]), count)
    assert holds(interval(G, atol=atol, without=["ldlt"]), count)
    assert holds(interval(G, atol=atol), count)


def subnormal_arrow(n: int = 200) -> tuple[Matrix, float]:
    """Multiples of 2^-1074: the n - 1 products 0.45·2^-1074 that the last pivot should lose round to 0."""
    atol = 2.0**-532  # its square is 1024·2^-1074; outward rounding puts the lower shift at 1044
    G = np.diag(np.full(n, 1064.0))
    G[-1, -1] = 1056.0
    G[-1, :-1] = G[:-1, -1] = 3.0
    return G * TINY, atol


def test_underflow_term_off_is_false() -> None:
    G, atol = subnormal_arrow()
    count = rational.count_above(G.tolist(), Fraction(atol) ** 2)
    assert count == 199
    assert not holds(interval(G, atol=atol, without=["underflow"]), count)
    assert holds(interval(G, atol=atol), count)


@pytest.mark.parametrize(
    ("term", "scale"), [("factor_error", 1.0), ("shift_error", 1.0), ("underflow_error", 2.0**-1050)]
)
@pytest.mark.parametrize("sign", [-1, 1])
def test_factorisation_terms_injected(term: str, scale: float, sign: int) -> None:
    # A diagonal matrix is factored without error; its second eigenvalue is moved across the threshold by
    # the whole bound of one term, and the interval must still hold the count before the move.
    atol = float(np.sqrt(2.0**-10 * scale))
    tau_squared = Fraction(atol) ** 2
    base = np.diag([scale, float(tau_squared)] + [scale] * 6)
    error = _core.inertia(base, float(tau_squared) * (1 + 1e-3))[term]
    assert error > 0
    before, after = base.copy(), base.copy()
    before[1, 1] += 0.45 * sign * error
    after[1, 1] -= 0.5 * sign * error
    count = rational.count_above(before.tolist(), tau_squared)
    assert count != rational.count_above(after.tolist(), tau_squared)
    assert holds(interval(after, atol=atol), count)


# --- largest eigenvalue ---------------------------------------------------------------------------------


def test_spectral_norm_term_off_is_false() -> None:
    # Lanczos starts orthogonal to the top eigenvector and finds 1.0 where λ_max is 1.05.
    G = np.diag([1.05, 1.0, 0.51])
    rtol, start, count = float(np.sqrt(0.5)), [0.0, 1.0, 0.5], 2
    assert not holds(interval(G, rtol=rtol, start=start, without=["spectral_norm"]), count)
    assert holds(interval(G, rtol=rtol, start=start), count)
    found = _core.certified_count(G, rtol=rtol, start=start)["largest_eigenvalue"]
    assert found[0] <= 1.05 <= found[1]


@pytest.mark.parametrize("n", [90, 600])
def test_spectral_norm_orthogonal_start_dense(n: int) -> None:
    rng = np.random.default_rng(n)
    Q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    values = np.concatenate([[1.05, 1.0], np.linspace(0.0, 0.4, n - 3), [0.51]])
    G = (Q * values) @ Q.T
    G = (G + G.T) / 2
    start = list(Q @ np.concatenate([[0.0], rng.standard_normal(n - 1)]))
    found = _core.certified_count(G, rtol=float(np.sqrt(0.5)), start=start)
    assert found["lower"] <= 2 <= found["upper"]
    low, high = found["largest_eigenvalue"]
    assert low <= 1.05 * (1 + 1e-13)
    assert high >= 1.05 * (1 - 1e-13)


@pytest.mark.parametrize("n", [3, 70, 128, 300])
def test_spectral_norm_of_a_dominant_eigenvalue(n: int) -> None:
    # A diagonal matrix has its eigenvalues to the bit. No factorisation is asked, so the ends are close.
    values = np.concatenate([[1.0], 0.5 * 0.8 ** np.arange(n - 1)])
    low, high = _core.certified_count(np.diag(values), rtol=0.1, start=[1e-2] + [1.0] * (n - 1))[
        "largest_eigenvalue"
    ]
    assert 1 - 1e-12 < low <= 1.0 <= high < 1 + 1e-12


@pytest.mark.parametrize("exponent", [-300, -170, -160, -155, -100, 0, 100, 150])
def test_spectral_norm_of_a_dominant_eigenvalue_at_any_scale(exponent: int) -> None:
    rng = np.random.default_rng(7)
    for _ in range(40):
        n = int(rng.integers(2, 200))
        values = np.concatenate([[1.0], rng.uniform(0, 0.6 / np.sqrt(n), n - 1)]) * 10.0**exponent
        found = _core.certified_count(np.diag(values), rtol=0.1, start=list(rng.standard_normal(n)))
        low, high = found["largest_eigenvalue"]
        assert low <= values.max() <= high, (n, low, high)


@pytest.mark.parametrize("gap", [1e-3, 1e-5])
def test_spectral_norm_of_a_missed_twin(gap: float) -> None:
    # The vector is an exact eigenvector with residual 0, of the second of two eigenvalues that stand alone.
    G = np.diag([1 + gap, 1.0] + [0.0] * 68)
    low, high = _core.certified_count(G, rtol=0.5, start=[0.0] + [1.0] * 69)["largest_eigenvalue"]
    assert low <= 1 + gap <= high


def test_spectral_norm_term_injected() -> None:
    # The top eigenvalue may lie anywhere in its interval: counts for both ends must be in the answer.
    rtol = 0.5
    low, high = _core.certified_count(np.diag([1.0, 0.1]), rtol=rtol)["largest_eigenvalue"]
    assert low < 1.0 < high
    second = float(Fraction(rtol) ** 2 * (Fraction(low) + 3 * Fraction(high)) / 4)
    for top in (low, high):
        exact = np.diag([top, second])
        count = 1 + (Fraction(second) > Fraction(rtol) ** 2 * Fraction(top))
        assert holds(interval(np.diag([1.0, second]), rtol=rtol), count), exact


# --- probes ---------------------------------------------------------------------------------------------


def probe_case(seed: int) -> tuple[Matrix, Matrix, Matrix, float]:
    """M, G = M + ε v vᵀ with ‖Ev‖ all but its probed bound, and the bound.

    v = cos·p + sin·q with p in the span of the probes and q orthogonal to them: v is turned so far away from
    the probes that the bound they give is 1.01 ε.
    """
    n = 24
    omega = _core.probe_vectors(n, seed)
    basis = np.linalg.qr(omega.T, mode="complete")[0]
    p, q = basis[:, 0], basis[:, -1]
    factor = 10 * np.sqrt(2 / np.pi)
    cosine = 1.01 / (factor * np.abs(omega @ p).max())
    v = cosine * p + np.sqrt(1 - cosine**2) * q
    v[np.abs(v) < 1e-3] = 0.0
    v /= np.linalg.norm(v)
    rest = np.linalg.qr(np.column_stack([v, np.random.default_rng(seed).standard_normal((n, n - 1))]))[0][
        :, 1:
    ]
    M = 0.0100 * np.outer(v, v) + (rest * np.linspace(0.5, 1.0, n - 1)) @ rest.T
    M = (M + M.T) / 2
    G = M + 1e-3 * np.outer(v, v)
    G = (G + G.T) / 2
    return M, G, omega, _core.probe_bound(G, omega, omega @ M, 1e-13)


@pytest.mark.parametrize("seed", range(5))
def test_probe_term(seed: int) -> None:
    M, G, _, bound = probe_case(seed)
    assert 1e-3 < bound < 1.2e-3  # an error of the size of its bound
    atol = float(np.sqrt(0.0105))
    count = int((np.linalg.eigvalsh(M) > atol**2 + 1e-12).sum())
    assert count == 23
    assert not holds(interval(G, atol=atol, gram_error=0.0), count)
    assert holds(interval(G, atol=atol, gram_error=bound), count)


def test_probe_of_undefined_product_is_infinite() -> None:
    omega = _core.probe_vectors(3, 0)
    for bad in (np.nan, np.inf):
        y = omega.copy()
        y[4, 1] = bad
        assert _core.probe_bound(np.eye(3), omega, y) == np.inf


def test_probe_bound_of_random_errors() -> None:
    rng = np.random.default_rng(0)
    for seed in range(40):
        n = int(rng.integers(1, 60))
        E = rng.standard_normal((n, n)) * 10.0 ** rng.uniform(-9, 0)
        E += E.T
        omega = _core.probe_vectors(n, seed)
        assert _core.probe_bound(np.eye(n) + E, omega, omega, 0.0) >= np.linalg.norm(E, 2)


# --- range, modes of the processor, extreme arguments --------------------------------------------------


def test_flushed_subnormals_change_nothing() -> None:
    # A subnormal atol must be scaled with A under IEEE arithmetic: flushed to 0 it counts everything.
    A = torch.diag(torch.tensor([2.0**-1030, 2.0**-1045], dtype=torch.float64))
    atol = 2.0**-1040
    assert torch.set_flush_denormal(True)
    try:
        op = bsgap.near_rank_interval(A, atol=atol, rtol=0.0)
        numpy = _core.near_rank_interval(A.numpy(), atol=atol, rtol=0.0)
    finally:
        torch.set_flush_denormal(False)
    assert (int(op.lower), int(op.upper)) == (1, 1)
    assert numpy == (1, 1)


def test_overflowed_threshold_is_no_bound() -> None:
    # λ_max = 3.4e308 overflows and so does atol² = 1.82e308 < λ_max: nothing is known, certainly not "0".
    assert holds(interval(np.full((2, 2), 1.7e308), atol=1.35e154), 1)


@pytest.mark.parametrize("exponent", [-300, -160, -90, -85, -80, -60, 60, 80, 85, 90, 150, 300])
@pytest.mark.parametrize("shape", [(40, 10), (90, 80)])
def test_scales_of_float64(exponent: int, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(*shape, dtype=torch.float64, generator=generator) * 10.0**exponent
    lower, upper = bsgap.near_rank_interval(A, rtol=1e-4)
    assert (int(lower), int(upper)) == (min(shape), min(shape))
    assert int(bsgap.near_rank(A, rtol=1e-4)) == min(shape)


def test_one_by_one_and_trivial_thresholds() -> None:
    one = np.array([[3.0]])
    assert _core.near_rank_interval(one, atol=2.0, rtol=0.0) == (1, 1)
    assert _core.near_rank_interval(one, atol=4.0, rtol=0.0) == (0, 0)
    assert holds(_core.near_rank_interval(one, atol=3.0, rtol=0.0), 0)
    assert holds(_core.near_rank_interval(one, atol=0.0, rtol=0.0), 1)
    assert _core.near_rank_interval(one, atol=0.0, rtol=1.0) == (0, 0)
    assert _core.near_rank_interval(one, atol=np.inf, rtol=0.0) == (0, 0)
    assert _core.near_rank_interval(one, atol=0.0, rtol=np.inf) == (0, 0)
    assert _core.near_rank_interval(np.zeros((3, 2)), atol=0.0, rtol=0.0) == (0, 0)
    assert _core.near_rank_interval(np.array([[1.0, np.nan]])) == (-1, -1)
    assert _core.near_rank_interval(np.array([[1.0], [-np.inf]]), center=True) == (-1, -1)


def test_binding_refuses_what_voids_the_theorem() -> None:
    with pytest.raises(ValueError, match="G must be symmetric"):
        _core.certified_count(np.array([[1.0, 0.5], [0.0, 1.0]]))
    for bad in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="gram_error must be"):
            _core.certified_count(np.eye(2), gram_error=bad)


def test_results_do_not_depend_on_threads(use_threads: Callable[[int], None]) -> None:
    generator = torch.Generator().manual_seed(3)
    # Sides with parallel tiles, panels and products (>= 512), and rows with parallel slabs.
    for shape in ((700, 600), (40000, 20), (6, 90, 70)):
        A = torch.randn(*shape, generator=generator) * torch.logspace(0, -3, shape[-1])
        found = []
        for threads in (1, 2):
            use_threads(threads)
            found.append(
                [bsgap.gram(A), bsgap.gram(A, center=True)]
                + [
                    x
                    for mode in ("rigorous", "probed")
                    for x in bsgap.near_rank_interval(A, rtol=1e-2, mode=mode)
                ]  # type: ignore[arg-type]
            )
        for one, two in zip(*found, strict=True):
            assert torch.equal(one, two)


# --- random matrices with a known count -----------------------------------------------------------------


def test_no_interval_is_false() -> None:
    seen: dict[str, int] = {}
    separated = single = 0
    for group in families.groups(22, 0, mpmath_matrices=4, mpmath_side=16):
        for case, found in zip(group, families.intervals(group), strict=True):
            seen[case.family] = seen.get(case.family, 0) + 1
            for answer in found:
                assert answer.lower <= case.count <= answer.upper, (case, answer)
                if case.separated and case.rtol >= 1e-4:
                    separated += 1
                    single += answer.lower == answer.upper
    assert set(seen) == {*families.FAMILIES, "batched", "graded, mpmath"}
    assert single >= 0.95 * separated > 300


def test_committed_study() -> None:
    study = json.loads(RESULTS.read_text())
    assert study["matrices"] >= 2000
    assert study["false_intervals"] == 0
    assert study["false"] == []
    assert study["separated_single_share"] >= 0.95
    assert sum(row["matrices"] for row in study["families"].values()) == study["matrices"]
    assert set(study["families"]) == {*families.FAMILIES, "batched", "graded, mpmath"}
    for table in ("families", "modes"):
        assert sum(row["intervals"] for row in study[table].values()) == study["intervals"]
        assert all(row["false"] == 0 for row in study[table].values())
