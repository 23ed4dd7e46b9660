"""csrc/cuda/count_large.cuh on the CPU: sides above 128, blocked LDLᵀ and Lanczos against the C++ core."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import cuda_host
import numpy as np
import pytest
import spectra
import torch
from cuda_host.problems import Group, problem
from torch import Tensor

from bsgap_kernels import _core

pytestmark = [pytest.mark.torch_free, pytest.mark.skipif(cuda_host.COMPILER is None, reason="needs g++")]

THREADS = {"ldlt_update_kernel": 128}  # all others: 256


def gram(A: Tensor) -> Tensor:
    g = A.mT @ A
    return (g + g.mT) / 2


def with_count(n: int, count: int, rtol: float = 1e-2, seed: int = 0) -> Tensor:
    return gram(spectra.with_count(n + 40, n, count, rtol, margin=0.02, seed=seed))


def run(
    grams: Sequence[Tensor],
    *,
    atol: float = 0.0,
    rtol: float = 0.0,
    thresholds: Tensor | None = None,
    exponent: Sequence[int] | None = None,
    gram_error: Tensor | None = None,
    certify: bool = False,
    spectrum: bool = False,
    exact: bool = True,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """One group per matrix (k, k) or batch (b, k, k). exact: the matrices are what they say, error 0."""
    p = problem([Group(g if g.dim() == 3 else g[None], roundings=5) for g in grams])
    total = sum(p.batches)
    if gram_error is None and exact:
        gram_error = torch.zeros(total, dtype=torch.float64)
    exponents = None if exponent is None else torch.tensor(exponent, dtype=torch.int32)
    cuda_host.clear_launches()
    counts, lower, upper, flat, _ = cuda_host.count_grams(
        p.grams, p.table, p.sides, p.batches, thresholds, atol, rtol, exponents, gram_error, certify, spectrum
    )
    return counts, lower, upper, p.eigenvalues_of(flat) if spectrum else []


def launched() -> list[tuple[str, tuple[int, int, int]]]:
    found = []
    for launch in cuda_host.launches():
        name = re.sub(r"^\(|\)$", "", launch.kernel).split("<")[0]
        assert launch.threads == THREADS.get(name, launch.threads)
        assert launch.shared <= 99 * 1024
        found.append((name, launch.grid))
    return found


@pytest.mark.parametrize("n", [129, 192, 200, 257, 320])
def test_point_counts_and_grids(n: int) -> None:
    count = n // 3
    counts, _, _, _ = run([with_count(n, count)], rtol=1e-2)
    assert counts.tolist() == [[count]]
    kernels = launched()
    tiles = -(-n // 64)
    panels = [(name, grid) for name, grid in kernels if name.startswith("ldlt")]
    expected: list[tuple[str, tuple[int, int, int]]] = [("ldlt_begin_kernel", (tiles, 1, 1))]
    for panel in range(tiles):
        below = tiles - panel - 1
        expected.append(("ldlt_panel_kernel", (max(below, 1), 1, 1)))
        if below:
            grid = below if panel % 2 == 0 else below * (below + 1) // 2
            expected.append(("ldlt_update_kernel", (grid, 1, 1)))
    expected.append(("ldlt_finish_kernel", (1, 1, 1)))
    assert panels == expected
    assert [g for name, g in kernels if name == "lanczos_step_kernel"] == [(-(-n // 32), 1, 1)] * 96
    assert "count_small_kernel" not in dict(kernels)


@pytest.mark.parametrize("n", [129, 191, 193])  # odd sides: rows are padded to pairs
def test_no_arithmetic_with_memory_that_nobody_wrote(n: int) -> None:
    run([with_count(n, 40)], rtol=1e-2, certify=True, spectrum=True)
    assert not cuda_host.invalid_operations()


def test_ragged_call_with_thresholds_of_each_matrix() -> None:
    counts_wanted = [40, 90, 5, 130, 60]
    sides = [150, 300, 129, 200, 200]
    grams = [with_count(n, c, seed=i) for i, (n, c) in enumerate(zip(sides, counts_wanted, strict=True))]
    small = torch.diag(torch.arange(1.0, 41.0, dtype=torch.float64))  # served by count_small.cuh
    grams.insert(2, small)
    # Per matrix: the prescribed threshold, everything, nothing, and an absolute one.
    pairs = torch.tensor([[[0.0, 1e-2], [0.0, 0.0], [0.0, 0.999999], [0.5, 0.0]]] * 6, dtype=torch.float64)
    pairs[2, 3, 0] = 5.0
    found, _, _, _ = run(grams, thresholds=pairs)
    for i, (g, row) in enumerate(zip(grams, found.tolist(), strict=True)):
        sigma = torch.linalg.eigvalsh(g).clamp(min=0).sqrt()
        wanted = [int((sigma > max(a, r * sigma[-1])).sum()) for a, r in pairs[i].tolist()]
        assert row == wanted, i
    names = [name for name, _ in launched()]
    assert names.count("count_small_kernel") == 1
    # Four shifts of five matrices at once; the smaller ones drop out as the panels advance.
    panels = [grid[1] for name, grid in launched() if name == "ldlt_panel_kernel"]
    assert panels == [20, 20, 20, 12, 4]


def test_threshold_groups() -> None:
    g = with_count(140, 50)
    taus = torch.linspace(0.002, 0.9, 6, dtype=torch.float64)
    pairs = torch.stack([torch.zeros_like(taus), taus], -1)[None]
    counts, lower, upper, _ = run([g, g], thresholds=pairs, certify=True)
    sigma = torch.linalg.eigvalsh(g).clamp(min=0).sqrt()
    wanted = [int((sigma > t * sigma[-1]).sum()) for t in taus.tolist()]
    for low, count, high in zip(lower.tolist(), counts.tolist(), upper.tolist(), strict=True):
        assert low == count == high == wanted


@pytest.mark.parametrize("n", [129, 200, 320])
def test_intervals_are_as_tight_as_the_core_s(n: int) -> None:
    grams = [with_count(n, n // 4, 10.0**-e, seed=e) for e in (1, 2, 4, 5)]
    for e, g in zip((1, 2, 4, 5), grams, strict=True):
        error = 1e-15 * float(g.trace())
        counts, lower, upper, _ = run(
            [g], rtol=10.0**-e, certify=True, gram_error=torch.tensor([error], dtype=torch.float64)
        )
        core = _core.certified_count(g.numpy(), rtol=10.0**-e, gram_error=error)
        assert lower.item() <= n // 4 <= upper.item()
        assert lower.item() <= counts.item() <= upper.item()
        assert upper.item() - lower.item() <= core["upper"] - core["lower"]


def test_gram_error_from_the_roundings() -> None:
    g = with_count(150, 40)
    counts, lower, upper, _ = run([g], rtol=1e-2, certify=True, exact=False)
    assert lower.item() == counts.item() == upper.item() == 40
    # A stated error as large as tau^2 leaves nothing to prove about the values below the threshold.
    error = torch.tensor([1e-4], dtype=torch.float64)
    _, lower, upper, _ = run([g], rtol=1e-2, certify=True, gram_error=error)
    assert lower.item() < 40 < upper.item()
    # What the probes say of something that is not finite: nothing is known.
    _, lower, upper, _ = run([g], rtol=1e-2, certify=True, gram_error=error * torch.inf)
    assert (lower.item(), upper.item()) == (0, 150)


TOPS = {
    "cluster of 1e-9": lambda n: torch.cat(
        [1 - 1e-9 * torch.arange(10.0), 0.5 * spectra.geometric(n - 10, 1e-3)]
    ),
    "gap of 1e-9": lambda n: torch.cat([torch.tensor([1.0, 1 - 1e-9]), 0.9 * spectra.geometric(n - 2, 1e-3)]),
    "converged at once": lambda n: torch.cat([torch.ones(1), 1e-7 * spectra.geometric(n - 1, 1e-4)]),
    "all equal": lambda n: torch.ones(n),
    "one and zeros": lambda n: torch.cat([torch.ones(1), torch.zeros(n - 1)]),
    "linear": lambda n: torch.linspace(1, 1e-3, n, dtype=torch.float64),
    "edge": lambda n: (1 - (torch.arange(float(n)) / n) ** (2 / 3)).clamp(min=1e-3),
    "two values": lambda n: torch.cat([torch.ones(n // 2), 0.01 * torch.ones(n - n // 2)]),
}


@pytest.mark.parametrize("n", [200, 700])
@pytest.mark.parametrize("top", TOPS)
def test_largest_eigenvalue_of_hard_spectra(top: str, n: int) -> None:
    # The count of sigma^2 > (1 - d) lambda_max jumps where theta stops being close: n values lie there.
    lam = TOPS[top](n).to(torch.float64)
    q = spectra.orthogonal(n, seed=n)
    g = (q * lam) @ q.mT
    g = (g + g.mT) / 2
    exact = torch.linalg.eigvalsh(g)
    r = 0.9995**0.5
    if n == 700:  # points only: the harness takes a second for each factorisation of that size
        counts, _, _, _ = run([g], rtol=r)
        lower = upper = counts
    else:
        counts, lower, upper, _ = run(
            [g], rtol=r, certify=True, gram_error=torch.tensor([1e-14 * n]).double()
        )
    # theta is a lower bound, and not lower than 1e-6.
    most = int((exact > r * r * exact[-1] * (1 - 1e-6)).sum())
    least = int((exact > r * r * exact[-1] * (1 + 1e-12)).sum())
    assert least <= counts.item() <= most
    assert lower.item() <= most
    assert upper.item() >= least
    assert lower.item() <= counts.item() <= upper.item()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("n", "count", "rtol"), [(147, 1, 3.07e-4), (133, 10, 3.116e-3)])
def test_copies_of_the_top_ritz_value_do_not_cancel(n: int, count: int, rtol: float, seed: int) -> None:
    # The value converges before the run looks at it; with the whole of T half of such cases lost it again.
    counts, _, _, _ = run(
        [gram(spectra.with_count(n + 20, n, count, rtol, margin=0.01, seed=seed))], rtol=rtol
    )
    assert counts.item() == count


def test_ties_lie_within_the_interval() -> None:
    sigma = torch.cat([torch.full((20,), 1.0), torch.full((30,), 0.25), torch.full((14,), 0.125)])
    h = spectra.hadamard_spectrum(torch.cat([sigma] * 4), 256, two_sided=True)
    g = gram(h)
    counts, lower, upper, _ = run([g], atol=0.25, certify=True)
    assert lower.item() == 80
    assert upper.item() == 200
    assert 80 <= counts.item() <= 200
    core = _core.certified_count(g.numpy(), atol=0.25)
    assert (core["lower"], core["upper"]) == (80, 200)


def test_zero_pivots() -> None:
    # Uncoupled, every tau^2 is an eigenvalue: the pivot is exactly zero, and equality does not count.
    g = torch.diag(torch.arange(1.0, 201.0, dtype=torch.float64))
    for tie in (1.0, 70.0, 200.0):
        counts, lower, upper, _ = run([g], atol=tie**0.5, certify=True)
        tie_squared = (tie**0.5) ** 2
        wanted = int((torch.arange(1.0, 201.0, dtype=torch.float64) > tie_squared).sum())
        assert lower.item() <= wanted <= upper.item() <= lower.item() + 1
        assert lower.item() <= counts.item() <= upper.item()
    # Rank-deficient, integers: from the second row on every pivot at shift 0 is exactly zero.
    ones = torch.ones(150, 150, dtype=torch.float64)
    assert run([ones])[0].item() == 1
    # Coupled: the first pivot is zero, the eigenvalues are 1 + (+-1, ..., 0).
    coupled = torch.eye(150, dtype=torch.float64)
    coupled[0, 149] = coupled[149, 0] = 1.0
    # Near the shift 1 the factors grow without bound: nothing can be certified, and the point count says so.
    counts, lower, upper, _ = run([coupled], atol=1.0, certify=True)
    assert lower.item() <= 1 <= upper.item()
    assert counts.item() == 1


def test_columns_whose_squares_underflow() -> None:
    # The Householder factor is a reciprocal of squares, which overflows for entries near 1e-160.
    n, tiny = 130, [1e-130, 1e-135, 1e-140, 1e-145, 1e-150, 1e-155, 1e-160, 1e-163]
    g = torch.diag(torch.linspace(0.5, 1.0, n, dtype=torch.float64)).repeat(len(tiny), 1, 1)
    g[:, 0, 5] = g[:, 5, 0] = torch.tensor(tiny, dtype=torch.float64)
    counts, _, _, values = run([g], rtol=0.9, spectrum=True)
    expected = torch.linalg.eigvalsh(g)
    assert float((values[0] - expected).abs().max()) <= 1e-14 * n
    assert counts.flatten().tolist() == (expected > 0.81).sum(-1).tolist()


def test_content_without_arithmetic() -> None:
    n = 140
    good = with_count(n, 30)
    nan, inf = good.clone(), good.clone()
    nan[7, 7] = float("nan")
    inf[0, 0] = float("inf")
    zero = torch.zeros(n, n, dtype=torch.float64)
    pairs = torch.tensor(
        [[[0.0, 1e-2], [-1.0, -1.0], [float("nan"), 0.0], [0.0, 1.5], [float("inf"), 0.0]]],
        dtype=torch.float64,
    )
    counts, lower, upper, _ = run([nan, good, zero, inf], thresholds=pairs, certify=True)
    wanted = [[-1] * 5, [30, n, -1, 0, 0], [0, n, -1, 0, 0], [-1] * 5]
    assert counts.tolist() == wanted
    assert lower.tolist() == wanted
    assert upper.tolist() == wanted


def test_a_zero_gram_matrix_with_an_error_is_no_zero_matrix() -> None:
    n = 130
    zeros = torch.zeros(3, n, n, dtype=torch.float64)
    error = torch.tensor([0.0, 1e-300, 1e-300], dtype=torch.float64)
    pairs = torch.tensor([[[0.0, 0.1]], [[0.0, 0.1]], [[1e-100, 0.1]]], dtype=torch.float64)
    counts, lower, upper, eigenvalues = run(
        [zeros], thresholds=pairs, gram_error=error, certify=True, spectrum=True
    )
    assert counts.tolist() == lower.tolist() == [[0], [0], [0]]
    assert upper.tolist() == [[0], [n], [0]]
    assert torch.equal(eigenvalues[0], torch.zeros(3, n, dtype=torch.float64))


@pytest.mark.parametrize("exact", [False, True])
def test_thresholds_beyond_every_singular_value(exact: bool) -> None:
    # Squares that overflow, and one that no factorisation survives.
    n = 130
    pairs = torch.tensor([[[atol, 0.0] for atol in (1e10, 1e153, 1e160, math.inf)]], dtype=torch.float64)
    counts, lower, upper, _ = run([with_count(n, 30)], thresholds=pairs, certify=True, exact=exact)
    assert counts.tolist() == lower.tolist() == upper.tolist() == [[0] * 4]


@pytest.mark.parametrize("scale", [1e-150, 1e150, 2.0**-500, 2.0**500])
def test_scales(scale: float) -> None:
    # Of the Gram matrix itself: nothing of it may overflow, and norms may not vanish.
    counts, lower, upper, _ = run([with_count(140, 30) * scale], rtol=1e-2, certify=True)
    assert lower.item() == counts.item() == upper.item() == 30


def test_exponent_scales_atol() -> None:
    g = with_count(140, 30)
    sigma = torch.linalg.eigvalsh(g).clamp(min=0).sqrt()
    tau = float(1e-2 * sigma[-1])
    # The Gram matrix of A * 2^40, A tiny.
    pairs = torch.tensor([[[tau * 2.0**-40, 0.0]], [[tau, 0.0]]], dtype=torch.float64)
    counts, lower, upper, _ = run([g, g], thresholds=pairs, exponent=[40, 0], certify=True)
    assert counts.tolist() == lower.tolist() == upper.tolist() == [[30], [30]]


def test_same_bits_every_time() -> None:
    # Also alone and in company: a matrix's answer does not depend on what shares the launch.
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(160, 160, generator=generator, dtype=torch.float64)
    g = gram(a)
    sigma = torch.linalg.svdvals(a)
    pairs = torch.stack([torch.zeros(4), sigma[[10, 80, 140, 159]] / sigma[0]], -1).double()[None]
    first = run([g], thresholds=pairs)[0]
    assert torch.equal(first, run([g], thresholds=pairs)[0])
    assert torch.equal(first[0], run([with_count(190, 9), g], thresholds=pairs)[0][1])


def test_random_matrices_against_the_core() -> None:
    generator = torch.Generator().manual_seed(11)
    for n in (131, 256):
        a = torch.randn(2 * n, n, generator=generator, dtype=torch.float64) * torch.logspace(0, -4, n)
        g = gram(a)
        counts, lower, upper, _ = run([g], rtol=1e-3, certify=True)
        core = _core.certified_count(g.numpy(), rtol=1e-3)
        assert lower.item() <= core["upper"]
        assert core["lower"] <= upper.item()
        assert upper.item() - lower.item() <= core["upper"] - core["lower"]
        sigma = np.linalg.svd(a.numpy(), compute_uv=False)
        assert counts.item() == int((sigma > 1e-3 * sigma[0]).sum())


def test_spectrum_and_many_thresholds() -> None:
    sides = [200, 129, 129]
    lam = [torch.linspace(1e-3, 1, n, dtype=torch.float64) for n in sides]
    bases = [spectra.orthogonal(n, seed=n + i) for i, n in enumerate(sides)]
    grams = [(q * x) @ q.mT for q, x in zip(bases, lam, strict=True)]
    grams = [1e100 * (g + g.mT) / 2 for g in grams]
    taus = torch.linspace(0.05, 0.95, 5, dtype=torch.float64) + 1e-4
    pairs = torch.stack([torch.zeros_like(taus), taus], -1)[None]
    counts, _, _, values = run(grams, thresholds=pairs, spectrum=True)
    for g, x, found, row in zip(grams, lam, values, counts.tolist(), strict=True):
        exact = torch.linalg.eigvalsh(g)
        assert bool((found[0].diff() >= 0).all())
        assert float((found[0] - exact).abs().max()) <= 1e-13 * float(exact[-1])
        assert row == [int((x > t * t).sum()) for t in taus.tolist()]
    kernels = launched()
    assert [g[0] for name, g in kernels if name == "householder_kernel"] == [
        -(-(200 - j) // 32) for j in range(200)
    ]
    assert {name for name, _ in kernels} == {
        "describe_kernel",
        "householder_kernel",
        "bisection_kernel",
        "sturm_counts_kernel",
    }
    # The same counts without the spectrum, and with a certificate.
    assert torch.equal(run(grams, thresholds=pairs)[0], counts)
    assert "ldlt_panel_kernel" not in {name for name, _ in launched()}
    found_counts, lower, upper, again = run(grams[1:], thresholds=pairs, spectrum=True, certify=True)
    assert torch.equal(found_counts, counts[1:])
    assert torch.equal(lower, counts[1:])
    assert torch.equal(upper, counts[1:])
    assert all(torch.equal(x, y) for x, y in zip(again, values[1:], strict=True))


def test_spectrum_of_special_matrices() -> None:
    n = 130
    diagonal = torch.diag(torch.arange(float(n), dtype=torch.float64))
    zero, nan = torch.zeros_like(diagonal), torch.full_like(diagonal, float("nan"))
    counts, _, _, values = run([diagonal, zero, nan], atol=10.0, spectrum=True)
    assert counts.flatten().tolist() == [29, 0, -1]
    assert float((values[0][0] - torch.arange(float(n))).abs().max()) <= 1e-13 * n
    assert bool((values[1] == 0).all())
    assert bool(values[2].isnan().all())
