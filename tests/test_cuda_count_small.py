"""The CUDA kernel for matrices of up to 128 rows, run on the CPU from its own source (tests/cuda_host)."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from fractions import Fraction

import certificate_families as families
import cuda_host
import numpy as np
import pytest
import rational
import spectra
import test_certificates as committed
import tolerances
import torch
from cuda_host.problems import Group, Problem, problem
from torch import Tensor

from bsgap_kernels import _core

pytestmark = [pytest.mark.torch_free, pytest.mark.skipif(cuda_host.COMPILER is None, reason="needs g++")]

SIDES = (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128)
THREADS, WARPS = 128, 4
U = 2.0**-53


def shared_bytes(sides: Sequence[int]) -> int:
    """Packed triangle, four vectors, one slot a thread, scratch; four warps' worth for narrow matrices."""
    wide = [s for s in sides if s > 32]
    narrow = [s for s in sides if s <= 32]
    bytes_wide = 8 * (max(wide) * (max(wide) + 1) // 2 + 4 * max(wide) + THREADS + 2 * WARPS) if wide else 0
    bytes_narrow = 8 * WARPS * (max(narrow) * (max(narrow) + 1) // 2 + 4 * max(narrow) + 32) if narrow else 0
    return max(bytes_wide, bytes_narrow)


def count(
    p: Problem,
    thresholds: Tensor | None = None,
    *,
    atol: float = 0.0,
    rtol: float = 0.0,
    exponent: Tensor | None = None,
    gram_error: Tensor | None = None,
    certify: bool = True,
    spectrum: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One call, which must be one launch of the kernel with a block a wide matrix and a warp a narrow one."""
    cuda_host.clear_launches()
    result = cuda_host.count_grams(
        p.grams, p.table, p.sides, p.batches, thresholds, atol, rtol, exponent, gram_error, certify, spectrum
    )
    wide = sum(b for s, b in zip(p.sides, p.batches, strict=True) if s > 32)
    narrow = sum(p.batches) - wide
    grid = (wide + math.ceil(narrow / WARPS), 1, 1)
    shared = shared_bytes([s for s, b in zip(p.sides, p.batches, strict=True) if b > 0])
    assert cuda_host.launches() == [cuda_host.Launch("count_small_kernel", grid, THREADS, shared)]
    return result[:4]


def gram_problem(*matrices: Tensor) -> Problem:
    """A group for each matrix (m, n) or equal-shaped batch (b, m, n), as A^T A."""
    groups = []
    for A in matrices:
        X = A.to(torch.float64).view(-1, *A.shape[-2:])
        # numpy's sums: any order, so a term passes through at most m roundings.
        groups.append(Group(X.mT @ X, m=A.shape[-2], roundings=A.shape[-2] + 2))
    return problem(groups)


@pytest.mark.parametrize("certify", [False, True])
def test_moments(certify: bool) -> None:
    """Beside counts, of both kernels: trace, norm and largest eigenvalue in the caller's order."""
    generator = torch.Generator().manual_seed(5)
    draw = [torch.randn(2 * n, n, generator=generator, dtype=torch.float64) for n in (140, 9, 33, 128, 1)]
    draw[2] *= 1e-150  # squares of its entries underflow
    grams = [A.mT @ A for A in draw]
    grams += [torch.zeros(7, 7, dtype=torch.float64), torch.zeros(130, 130, dtype=torch.float64)]
    grams += [torch.full((3, 3), math.nan, dtype=torch.float64), grams[0] * math.nan]
    p = problem([Group(g[None], roundings=5) for g in grams])
    thresholds = torch.tensor([[[0.0, r] for r in (0.5, 0.1, 0.05, 0.03, 1e-2)]], dtype=torch.float64)
    counts, *_, moments = cuda_host.count_grams(
        p.grams, p.table, p.sides, p.batches, thresholds, 0.0, 0.0, None, None, certify, False, True
    )
    for place, g in zip(p.starts, grams, strict=True):
        if not bool(g.any()) or bool(g.isnan().any()):
            expected = torch.full((3,), 0.0 if not bool(g.any()) else math.nan, dtype=torch.float64)
        else:
            values = torch.linalg.eigvalsh(g)
            norm = torch.linalg.matrix_norm(g / g.trace()) * g.trace()
            expected = torch.stack([g.trace(), norm, values[-1]])
            counted = [(values > t**2 * values[-1]).sum() for t in (0.5, 0.1, 0.05, 0.03, 1e-2)]
            assert counts[place].tolist() == counted
        torch.testing.assert_close(moments[place], expected, rtol=1e-5, atol=0, equal_nan=True)


def true_counts(G: Tensor, rtol: float) -> Tensor:
    values = torch.linalg.eigvalsh(G)
    return (values > rtol**2 * values[..., -1:]).sum(-1)


def core_count(G: Tensor, *, atol: float = 0.0, rtol: float = 0.0) -> int:
    """Point count by csrc/core's tridiagonal form, whatever the side."""
    alone = G.numpy()[None]
    top = float(_core.lane_spectra(alone)["largest"][0, 0])
    tau_squared = max(atol * atol, rtol * (rtol * max(top, 0.0)))
    return int(_core.lane_spectra(alone, [[tau_squared]])["counts"][0, 0])


@pytest.mark.parametrize("k", SIDES)
def test_prescribed_spectrum(k: int) -> None:
    rtol = 0.05
    wanted = [max(1, k // 3), max(1, k // 2), k]
    A = torch.stack(
        [
            spectra.with_count(2 * k + 5, k, n, rtol, margin=tolerances.COUNT_MARGIN, seed=10 * k + i)
            for i, n in enumerate(wanted)
        ]
    )
    p = gram_problem(A)
    counts, lower, upper, eigenvalues = count(p, rtol=rtol, spectrum=True)
    assert counts.flatten().tolist() == wanted
    assert lower.flatten().tolist() == wanted
    assert upper.flatten().tolist() == wanted
    G = A.mT @ A
    assert [core_count(g, rtol=rtol) for g in G] == wanted
    values = eigenvalues.view(3, k)
    assert bool((values.diff(dim=-1) >= 0).all())
    # Householder's backward error is a small multiple of k u ||G||, and the oracle's is as large.
    error = (values - torch.linalg.eigvalsh(G)).abs().max(-1).values / values[:, -1]
    assert float(error.max()) <= 8 * max(k, 4) * U


def test_mixed_sides_and_batches_in_one_launch() -> None:
    # A model's mix: three classes and ragged sides, groups in an order that is not the table's.
    generator = torch.Generator().manual_seed(3)
    sides = (16, 64, 32, 5, 128, 33, 16, 1, 100)
    batches = (3, 2, 5, 1, 1, 4, 2, 3, 1)
    matrices = [
        torch.randn(b, k + 9, k, generator=generator, dtype=torch.float64)
        * torch.logspace(0, -3, k, dtype=torch.float64)
        for k, b in zip(sides, batches, strict=True)
    ]
    p = gram_problem(*matrices)
    assert p.sides == sorted(sides, reverse=True)
    counts, lower, upper, eigenvalues = count(p, rtol=1e-2, spectrum=True)
    spectra_of = p.eigenvalues_of(eigenvalues)
    for A, start, values in zip(matrices, p.starts, spectra_of, strict=True):
        G, stop = A.mT @ A, start + A.shape[0]
        truth = true_counts(G, 1e-2)
        assert torch.equal(counts[start:stop, 0], truth)
        assert torch.equal(lower[start:stop, 0], truth)
        assert torch.equal(upper[start:stop, 0], truth)
        torch.testing.assert_close(
            values, torch.linalg.eigvalsh(G), rtol=0, atol=1e-12 * float(G.abs().max())
        )


def test_resnet_56_is_one_launch() -> None:
    # 19 layers of 16 channels, 18 of 32 and 18 of 64: 18 blocks, then 37 warps in 10 blocks.
    A = torch.randn(20, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = gram_problem(*[A[:, :k].expand(b, 20, k) for k, b in ((16, 19), (32, 18), (64, 18))])
    counts, lower, upper, _ = count(p, rtol=1e-3, certify=False)
    assert counts.flatten().tolist() == [16] * 19 + [20] * 36
    assert lower.shape == upper.shape == (0, 1)
    assert cuda_host.launches()[0].grid == (28, 1, 1)


def test_empty_rows_are_passed_over() -> None:
    A = torch.eye(6, dtype=torch.float64) * torch.arange(1.0, 7.0)
    p = problem([Group(torch.zeros(0, 40, 40)), Group((A @ A)[None]), Group(torch.zeros(0, 6, 6)),
                 Group((A @ A)[None, :3, :3])])  # fmt: skip
    counts, *_ = count(p, atol=2.5)
    assert counts.flatten().tolist() == [4, 1]


@pytest.mark.parametrize("t", [1, 2, 5, 40])
@pytest.mark.parametrize("shared", [True, False])
def test_several_thresholds(t: int, shared: bool) -> None:
    generator = torch.Generator().manual_seed(t)
    sides = (9, 40, 33)
    matrices = [torch.randn(2, 50, k, generator=generator, dtype=torch.float64) for k in sides]
    p = gram_problem(*matrices)
    pairs = torch.rand(1 if shared else 6, t, 2, generator=generator, dtype=torch.float64)
    pairs[..., 0] *= 8.0
    pairs[:, ::3, 0] = 0.0
    pairs[:, 1::3, 1] = 0.0
    counts, lower, upper, _ = count(p, pairs)
    assert counts.shape == lower.shape == upper.shape == (6, t)
    index = 0
    for A in matrices:
        for a in A:
            sigma = torch.linalg.svdvals(a)
            for j, (atol, rtol) in enumerate(pairs[0 if shared else index].tolist()):
                tau = max(atol, rtol * float(sigma[0]))
                expected = int((sigma > tau).sum())
                assert counts[index, j] == expected
                assert lower[index, j] == upper[index, j] == expected
            index += 1


@pytest.mark.parametrize("k", [3, 20, 40])
def test_thresholds_beyond_arithmetic(k: int) -> None:
    nan, inf = math.nan, math.inf
    pairs = torch.tensor(
        [[[nan, 0.1], [0.1, nan], [-1.0, -2.0], [-1.0, 0.1], [0.0, 1.0], [0.0, 7.0], [inf, 0.0], [0.0, 0.0],
          [-inf, -1e-300], [-1.0, 2.0], [1e200, 0.0], [nan, 2.0]]], dtype=torch.float64)  # fmt: skip
    A = torch.eye(k, dtype=torch.float64)
    expected = [-1, -1, k, k, 0, 0, 0, k, k, 0, 0, -1]
    counts, lower, upper, _ = count(gram_problem(A), pairs)
    for found in (counts, lower, upper):
        assert found[0].tolist() == expected
    zero = [-1, -1, k, 0, 0, 0, 0, 0, k, 0, 0, -1]
    counts, lower, upper, eigenvalues = count(gram_problem(0 * A), pairs, spectrum=True)
    for found in (counts, lower, upper):
        assert found[0].tolist() == zero
    assert eigenvalues.tolist() == [0.0] * k


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("k", [7, 50])
def test_non_finite_matrices_leave_their_neighbours_alone(bad: float, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    A = torch.randn(3, k + 5, k, generator=generator, dtype=torch.float64)
    A[1, 2, k // 2] = bad
    p = gram_problem(A)
    pairs = torch.tensor([[[0.0, 0.1], [-1.0, -1.0]]], dtype=torch.float64)
    counts, lower, upper, eigenvalues = count(p, pairs, spectrum=True)
    clean = A[[0, 2]]
    for found in (counts, lower, upper):
        assert found[1].tolist() == [-1, -1]
        assert torch.equal(found[[0, 2], 0], true_counts(clean.mT @ clean, 0.1))
        assert found[[0, 2], 1].tolist() == [k, k]
    values = eigenvalues.view(3, k)
    assert bool(values[1].isnan().all())
    assert bool(values[[0, 2]].isfinite().all())


@pytest.mark.parametrize("power", [-500, -30, 0, 30, 500])
@pytest.mark.parametrize("k", [12, 48])
def test_exponents_scale_the_absolute_tolerance(power: int, k: int) -> None:
    # The Gram matrix is that of A 2^exponent; atol is for A itself: 1e-150 ... 1e150.
    sigma = torch.cat([torch.full((k // 2,), 3.0), torch.full((k - k // 2,), 0.5)]).to(torch.float64)
    A = spectra.from_singular_values(sigma, k + 3, k, seed=k)
    p = gram_problem(A, A)
    exponent = torch.tensor([-power, 0], dtype=torch.int32)
    pairs = torch.tensor([[[math.ldexp(1.0, power), 0.0]], [[1.0, 0.0]]], dtype=torch.float64)
    counts, lower, upper, _ = count(p, pairs, exponent=exponent)
    for found in (counts, lower, upper):
        assert found.flatten().tolist() == [k // 2, k // 2]


@pytest.mark.parametrize("scale", [1e-75, 1e-30, 1e30, 1e75])
def test_gram_matrices_of_any_scale(scale: float) -> None:
    # Entries of G up to 1e150: their squares are still numbers.
    matrices = [
        scale * spectra.with_count(k + 9, k, k // 2, 0.1, margin=0.05, seed=k) for k in (8, 32, 47, 128)
    ]
    counts, lower, upper, _ = count(gram_problem(*matrices), rtol=0.1)
    for found in (counts, lower, upper):
        assert found.flatten().tolist() == [4, 16, 23, 64]


@pytest.mark.parametrize("k", [8, 32, 64, 128])
def test_rank_deficient(k: int) -> None:
    rank = k // 4
    A = spectra.from_singular_values(spectra.geometric(rank, 0.1), 2 * k, k, seed=k)
    counts, lower, upper, _ = count(gram_problem(A), rtol=1e-3)
    assert counts.item() == lower.item() == upper.item() == rank


@pytest.mark.parametrize("k", [8, 32, 64])
def test_ties_and_clusters(k: int) -> None:
    # Exactly representable: a third of the singular values lie on the threshold, which none of them exceeds.
    above, ties = k // 4, k // 2
    sigma = [1.0] * above + [0.25] * ties + [0.125] * (k - above - ties)
    A = spectra.hadamard_spectrum(sigma, k * 4 if math.isqrt(k * k * 4) ** 2 == k * k * 4 else k)
    pairs = torch.tensor([[[0.0, 0.25], [0.25, 0.0], [0.0, 0.2]]], dtype=torch.float64)
    counts, lower, upper, _ = count(gram_problem(A), pairs)
    for j, truth in enumerate((above, above, above + ties)):
        assert lower[0, j] <= truth <= upper[0, j]
        assert lower[0, j] <= counts[0, j] <= upper[0, j]
    assert lower[0, 2] == upper[0, 2]
    assert lower[0, 0] < upper[0, 0]
    assert upper[0, 0] - lower[0, 0] <= ties
    for width in (1e-3, 1e-6):
        inside = k // 2
        A = spectra.from_singular_values(spectra.clustered(k, 0.1, width, inside), 2 * k, k, seed=k)
        counts, lower, upper, _ = count(gram_problem(A), rtol=0.1)
        assert lower.item() <= true_counts(A.mT @ A, 0.1).item() <= upper.item()
        assert upper - lower <= inside


# --- certificates -----------------------------------------------------------------------------------------


def group_of(case: families.Case) -> tuple[Group, int, float] | None:
    """Gram matrix of a case on its smaller side with csrc/core's exponent and error; None beyond 128 rows."""
    A = case.matrix.to(torch.float64)  # exact for every dtype
    k = min(A.shape)
    if k > 128:
        return None
    found = _core.gram(A.numpy(), center=case.center, observations=A.shape[0] < A.shape[1])
    G = torch.from_numpy(found["gram"])
    error = found["rounding_error"] + found["centring_error"]
    roundings = 256 + max(A.shape) // 256 + 1 + 16 + 2  # csrc/core/gram.h
    return Group(G[None], m=max(A.shape), roundings=roundings), found["exponent"], error * (1 + 4 * U)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_no_interval_is_false(family: str) -> None:
    rng = random.Random(f"cuda small {family}")
    cases: list[tuple[families.Case, Group, int, float]] = []
    while len(cases) < 40:
        case = families.FAMILIES[family](rng)
        found = None if case is None else group_of(case)
        if case is not None and found is not None:
            cases.append((case, *found))
    p = problem([group for _, group, _, _ in cases])
    pairs = torch.tensor([[[case.atol, case.rtol]] for case, *_ in cases], dtype=torch.float64)
    exponent = torch.tensor([e for _, _, e, _ in cases], dtype=torch.int32)
    given = torch.tensor([error for *_, error in cases], dtype=torch.float64)
    same = 0
    for gram_error in (given, None):
        counts, lower, upper, _ = count(p, pairs, exponent=exponent, gram_error=gram_error)
        for i, (case, group, power, error) in enumerate(cases):
            if gram_error is None and case.center:
                continue  # the table's formula knows nothing of a centring error
            low, high = int(lower[i, 0]), int(upper[i, 0])
            assert low <= case.count <= high, (case.family, case.matrix.shape, low, case.count, high)
            assert low <= int(counts[i, 0]) <= high
            atol = math.ldexp(case.atol, power)
            core = _core.certified_count(group.grams[0].numpy(), atol=atol, rtol=case.rtol, gram_error=error)
            assert max(low, core["lower"]) <= min(high, core["upper"])
            if core["lower"] == core["upper"]:
                same += low == high
                # lambda_max is bounded at least as closely as the core does it, so this is as sharp.
                assert low == high or case.family in {"clustered at the threshold", "permutation, exact"}
    assert same > 0 or family in {"hadamard ties", "clustered at the threshold"}


def test_committed_false_cases_hold() -> None:
    # With an error term left out, csrc/core has a false interval for each of these (test_certificates.py).
    chain, chain_atol = committed.shifted_chain()
    arrow, arrow_atol = committed.subnormal_arrow(100)
    dropped_by_rounding = np.array([[1.0]])  # of 256 entries, see test_gram_term_natural_rounding
    cases = [
        (committed.vanishing_pivots(), 2.0, 4, 0.0),
        (chain, chain_atol, 7, 0.0),
        (arrow, arrow_atol, rational.count_above(arrow.tolist(), Fraction(arrow_atol) ** 2), 0.0),
        (dropped_by_rounding, 1.0 + 2.0**-48, 1, 300 * U),
        (np.diag([1.0, 0.01 + 0.99e-3]), math.sqrt(0.01 + 0.5e-3), 1, 1e-3),
        (np.diag([1.0, 0.01 - 0.99e-3]), math.sqrt(0.01 - 0.5e-3), 2, 1e-3),
    ]
    p = problem([Group(torch.from_numpy(np.ascontiguousarray(G))[None]) for G, *_ in cases])
    pairs = torch.tensor([[[atol, 0.0]] for _, atol, *_ in cases], dtype=torch.float64)
    error = torch.tensor([e for *_, e in cases], dtype=torch.float64)
    _, lower, upper, _ = count(p, pairs, gram_error=error)
    for i, (_, _, truth, _) in enumerate(cases):
        assert lower[i, 0] <= truth <= upper[i, 0], i


@pytest.mark.parametrize("side", [8, 40])
@pytest.mark.parametrize(
    ("term", "scale"), [("factor_error", 1.0), ("shift_error", 1.0), ("underflow_error", 2.0**-1050)]
)
def test_factorisation_terms_injected(term: str, scale: float, side: int) -> None:
    # As in test_certificates.py: the second eigenvalue of a diagonal matrix is moved across the threshold by
    # the whole bound of one term, and the interval must still hold the count before the move.
    atol = float(np.sqrt(2.0**-10 * scale))
    tau_squared = Fraction(atol) ** 2
    base = np.diag([scale, float(tau_squared)] + [scale] * (side - 2))
    error = _core.inertia(base, float(tau_squared) * (1 + 1e-3))[term]
    moved, truths = [], []
    for sign in (-1, 1):
        before, after = base.copy(), base.copy()
        before[1, 1] += 0.45 * sign * error
        after[1, 1] -= 0.5 * sign * error
        moved.append(torch.from_numpy(after))
        truths.append(rational.count_above(before.tolist(), tau_squared))
    none = torch.zeros(2, dtype=torch.float64)
    _, lower, upper, _ = count(problem([Group(torch.stack(moved))]), atol=atol, gram_error=none)
    for i, truth in enumerate(truths):
        assert lower[i, 0] <= truth <= upper[i, 0]
        assert lower[i, 0] < upper[i, 0]


@pytest.mark.parametrize(
    "proposal", [1.0, 1.05, 1.05 * (1 - 1e-9), 1.05 * (1 + 1e-5), 0.3, 2.0, 0.0, math.nan]
)
def test_a_wrong_proposal_costs_width_never_truth(proposal: float) -> None:
    Q = spectra.orthogonal(40, seed=1)
    values = torch.tensor([1.05, 1.0, 0.51, *[0.01 * i for i in range(37)]], dtype=torch.float64)
    G = (Q * values) @ Q.mT
    low, high = cuda_host.largest_eigenvalue(((G + G.mT) / 2).contiguous(), proposal)
    assert low < 1.05 * (1 - 1e-12) or proposal == 0
    assert low <= 1.05 * (1 + 1e-13)
    assert high > 1.05 * (1 + 1e-12)
    if abs(proposal / 1.05 - 1) <= 1e-9:
        assert high - low < 2e-8


@pytest.mark.parametrize("k", [4, 32, 50])
def test_nothing_exceeds_the_largest(k: int) -> None:
    A = torch.randn(8, k, k, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    for found in count(gram_problem(A), rtol=1.0)[:3]:
        assert found.flatten().tolist() == [0] * 8


@pytest.mark.parametrize("k", [1, 5, 40])
def test_a_zero_gram_matrix_with_an_error_is_no_zero_matrix(k: int) -> None:
    p = problem([Group(torch.zeros(3, k, k), m=k, roundings=1)])
    error = torch.tensor([0.0, 1e-300, 1e-300], dtype=torch.float64)
    pairs = torch.tensor([[[0.0, 0.1]], [[0.0, 0.1]], [[1e-100, 0.1]]], dtype=torch.float64)
    counts, lower, upper, eigenvalues = count(p, pairs, gram_error=error, spectrum=True)
    assert counts.tolist() == lower.tolist() == [[0], [0], [0]]
    assert upper.tolist() == [[0], [k], [0]]
    assert torch.equal(eigenvalues, torch.zeros(3 * k, dtype=torch.float64))


@pytest.mark.parametrize("k", [6, 45])
def test_gram_error_that_decides_nothing(k: int) -> None:
    A = torch.eye(k, dtype=torch.float64)
    p = gram_problem(torch.stack([A] * 3))
    error = torch.tensor([math.inf, math.nan, 10.0], dtype=torch.float64)
    _, lower, upper, _ = count(p, atol=0.5, gram_error=error)
    assert lower.flatten().tolist() == [0] * 3
    assert upper.flatten().tolist() == [k] * 3


@pytest.mark.parametrize("k", [6, 45])
def test_nan_beside_the_diagonal_hangs_nothing(k: int) -> None:
    # The Gram stage never writes it, but a branch that lanes take differently would be a deadlock.
    G = torch.eye(k, dtype=torch.float64)
    G[k - 1, 0] = G[0, k - 1] = math.nan
    _, lower, upper, _ = count(problem([Group(G[None])]), rtol=0.5, spectrum=True)
    assert lower.item() == 0
    assert upper.item() == k


@pytest.mark.parametrize("k", [10, 32, 60, 128])
def test_interval_keeps_the_largest_eigenvalue_apart(k: int) -> None:
    # A relative threshold 1e-7 from a singular value: lambda_max has to be known to that.
    sigma = torch.cat([torch.ones(1), torch.full((k - 1,), 0.5)]).to(torch.float64)
    A = spectra.from_singular_values(sigma, k, k, seed=k)
    pairs = torch.tensor([[[0.0, 0.5 * (1 + 1e-7)], [0.0, 0.5 * (1 - 1e-7)]]], dtype=torch.float64)
    counts, lower, upper, _ = count(gram_problem(A), pairs)
    for found in (counts, lower, upper):
        assert found[0].tolist() == [1, k]
