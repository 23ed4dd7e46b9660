"""Random matrices with a known count, by family, for the tests and the study of the certified intervals.

The truth never comes from the code under test: exactly representable constructions compared in rational
arithmetic, mpmath up to 40 x 40, and float64 singular values that keep 1e-10 σ_max from the threshold.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import mpmath
import spectra
import tolerances
import torch
from torch import Tensor

import bsgap_kernels as bsgap
from bsgap_kernels import _core

SHAPES = ((1, 1), (1, 7), (5, 1), (3, 3), (8, 8), (23, 9), (9, 23), (64, 32), (65, 65), (200, 40), (40, 200),
          (97, 96), (300, 80), (80, 300), (500, 128), (256, 256), (600, 100), (600, 600))  # fmt: skip
SEPARATION = 0.01  # "no singular value within 1 % of the threshold"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One matrix and its threshold; ``count`` is #{σ > max(atol, rtol·σ_max)}, known to be exact."""

    family: str
    matrix: Tensor
    count: int
    rtol: float = 0.0
    atol: float = 0.0
    center: bool = False
    separated: bool = False
    """No singular value within 1 % of the threshold."""


@dataclass(frozen=True)
class Interval:
    """What one way of asking answered."""

    mode: str
    entry: str
    lower: int
    upper: int


def intervals(cases: list[Case]) -> list[list[Interval]]:
    """Every interval of every case: both modes, by the torch op (stacked) and by NumPy (one by one)."""
    first = cases[0]
    A = first.matrix if len(cases) == 1 else torch.stack([c.matrix for c in cases])
    results: list[list[Interval]] = [[] for _ in cases]
    for mode in ("rigorous", "probed"):
        lower, upper = bsgap.near_rank_interval(
            A, atol=first.atol, rtol=first.rtol, center=first.center, mode=mode, seed=7
        )
        for result, low, high in zip(results, lower.view(-1).tolist(), upper.view(-1).tolist(), strict=True):
            result.append(Interval(mode, "op", low, high))
        if first.matrix.dtype == torch.bfloat16:
            continue  # NumPy has no such type
        for case, result in zip(cases, results, strict=True):
            low, high = _core.near_rank_interval(
                case.matrix.numpy(), atol=case.atol, rtol=case.rtol, center=case.center, mode=mode, seed=11
            )
            result.append(Interval(mode, "numpy", low, high))
    return results


def count_above(sigma: list[float], *, atol: float, rtol: float) -> tuple[int, bool]:
    """Count of exactly known singular values above the threshold, and whether they are separated from it."""
    exact = [Fraction(s) for s in sigma]
    tau = max(Fraction(atol), Fraction(rtol) * max(exact))
    separated = all(abs(s - tau) > Fraction(1, 100) * tau for s in exact)
    return sum(s > tau for s in exact), separated


def _scale(rng: random.Random, dtype: torch.dtype) -> float:
    """A power of two: 1e-30 ... 1e30, less where the type does not reach."""
    reach = {torch.float16: 4, torch.float32: 90, torch.bfloat16: 90}.get(dtype, 100)
    return 2.0 ** rng.choice([0, 0, rng.randint(-reach, reach)])


def _hadamard(rng: random.Random) -> Case:
    """Dense, dyadic: some singular values lie exactly on the threshold, or within 2^-10 of it (float64)."""
    n, extra = rng.choice([(1, 2), (2, 2), (4, 1), (8, 2), (16, 1), (32, 1), (64, 0), (128, 0)])
    m = n * 4**extra
    wide = rng.random() < 0.5
    dtype = rng.choice([torch.float64, torch.float64, torch.float32])
    power = rng.randint(1, 6)
    near = (
        [1.0, 1.0, 0.5, 2.0] if dtype == torch.float32 else [1.0, 1.0, 1 - 2.0**-10, 1 + 2.0**-10, 0.5, 2.0]
    )
    sigma = [1.0] + [2.0**-power * rng.choice(near) for _ in range(n - 1)]
    A = spectra.hadamard_spectrum(sigma, m) * _scale(rng, torch.float32)
    assert torch.equal(A.to(dtype).double(), A)
    A = A.to(dtype).mT if wide else A.to(dtype)
    count, separated = count_above(sigma, atol=0.0, rtol=2.0**-power)
    return Case("hadamard ties", A, count, rtol=2.0**-power, separated=separated)


def _permutation(rng: random.Random) -> Case:
    """Sparse and exact in every type and shape: ties, clusters and values over 60 orders of magnitude."""
    m, n = rng.choice(SHAPES)
    dtype = rng.choice(DTYPES)
    k = rng.randint(1, min(m, n))
    rtol = rng.choice([1e-1, 1e-2, 1e-3, 1e-4, 2.0**-3, 2.0**-7])
    scale = _scale(rng, dtype)
    raw = [
        rng.choice([rtol, rtol, 10 ** rng.uniform(-6, 0), rtol * (1 + 1e-3 * rng.uniform(-1, 1))])
        for _ in range(k)
    ]
    sigma = (scale * torch.tensor([1.0, *raw[1:]], dtype=torch.float64)).to(dtype).double()
    if bool((sigma == 0).any()):  # below the type's range: then they are zeros, which is fine too
        sigma = sigma[sigma > 0]
    values = sigma.tolist()
    atol = rng.choice([0.0, 0.0, values[-1]])  # an absolute threshold exactly on a singular value
    A = spectra.signed_permutation_spectrum(sigma, m, n, dtype=dtype, seed=rng.randrange(10**6))
    count, separated = count_above([*values, 0.0], atol=atol, rtol=rtol)
    return Case("permutation, exact", A, count, rtol=rtol, atol=atol, separated=separated)


def _extreme(rng: random.Random) -> Case:
    """float64 far outside the range that products keep: 1e-300 ... 1e300, also inside one matrix."""
    m, n = rng.choice(SHAPES[:12])
    k = rng.randint(1, min(m, n))
    centre = rng.choice([-300.0, 300.0, -80.0, 85.0, 150.0])
    spread = rng.choice([1.0, 4.0, 300.0])
    sigma = [10 ** max(-307.0, min(307.0, centre + rng.uniform(-spread, spread))) for _ in range(k)]
    A = spectra.signed_permutation_spectrum(sigma, m, n, seed=rng.randrange(10**6))
    rtol = rng.choice([1e-2, 1e-3])
    atol = rng.choice([0.0, max(sigma), min(sigma), 10**centre])
    count, separated = count_above([*sigma, 0.0], atol=atol, rtol=rtol)
    return Case("extreme scales", A, count, rtol=rtol, atol=atol, separated=separated)


def _centred_exact(rng: random.Random) -> Case:
    """Columns of zero mean plus dyadic means: centred singular values are exact, some on the threshold."""
    m = rng.choice([4, 16, 64, 256])
    n = rng.randint(1, min(m - 1, 40))
    power = rng.randint(1, 6)
    sigma = [1.0] + [2.0**-power * rng.choice([1.0, 0.5, 2.0, 1.0]) for _ in range(n - 1)]
    columns = spectra.hadamard(m)[:, 1 : n + 1] * (torch.tensor(sigma, dtype=torch.float64) / m**0.5)
    means = torch.tensor([rng.choice([0.0, 1.0, -3.0, 1024.0]) for _ in range(n)], dtype=torch.float64)
    A = columns + means
    count, separated = count_above(sigma, atol=0.0, rtol=2.0**-power)
    return Case(
        "centred, exact", A.to(torch.float32), count, rtol=2.0**-power, center=True, separated=separated
    )


def _svd_case(family: str, A: Tensor, rtol: float, *, center: bool = False) -> Case | None:
    """The case, if no float64 singular value is too close to the threshold to be trusted."""
    wide = A.double()
    sigma = torch.linalg.svdvals(wide - wide.mean(0) if center else wide)
    top = float(sigma[0])
    tau = rtol * top
    if not top > 0 or float((sigma - tau).abs().min()) <= tolerances.SVD_TRUTH_MARGIN * top:
        return None
    separated = bool(((sigma - tau).abs() > SEPARATION * tau).all())
    return Case(family, A, int((sigma > tau).sum()), rtol=rtol, center=center, separated=separated)


def _prescribed(rng: random.Random, kind: str, shape: tuple[int, int] | None = None) -> Case | None:
    """Random orthogonal factors times a spectrum of the kind."""
    m, n = shape or rng.choice(SHAPES)
    k = min(m, n)
    rtol = rng.choice([1e-1, 1e-2, 1e-3, 1e-4])
    dtype = rng.choice(DTYPES)
    if kind == "rank-deficient":
        rank = rng.randint(1, max(1, k // 2))
        sigma = spectra.geometric(rank, min(1.0, 30 * rtol))
        dtype = torch.float64 if rtol < 1e-2 else dtype
    elif kind == "clustered at the threshold":
        width = 10 ** rng.uniform(-7, -2)
        sigma = (
            spectra.clustered(k, rtol, width, max(1, k // 2))
            if k > 2
            else spectra.geometric(k, rtol * (1 + width))
        )
    elif kind == "graded":
        sigma = spectra.geometric(k, 10 ** rng.uniform(-12, -2))
    else:
        # A gap of 5 % on either side of the threshold.
        above = rng.randint(1, k)
        sigma = torch.cat(
            [spectra.geometric(above, 1.05 * rtol), 0.95 * rtol * spectra.geometric(k - above, 1e-2)]
        )
        dtype = torch.float64 if rtol < 1e-2 else dtype
    A = spectra.from_singular_values(sigma, m, n, seed=rng.randrange(10**6))
    return _svd_case(kind, (A * _scale(rng, dtype)).to(dtype), rtol)


def _activations(rng: random.Random) -> Case | None:
    """ReLU of a Gaussian of low rank plus noise, with a mean: what a network shows; centred or not."""
    m, n = rng.choice(SHAPES)
    generator = torch.Generator().manual_seed(rng.randrange(10**6))
    rank = rng.randint(1, min(m, n))
    low = torch.randn(m, rank, generator=generator) @ torch.randn(rank, n, generator=generator)
    A = torch.relu(low + 0.1 * torch.randn(m, n, generator=generator) + rng.choice([0.0, 1.0, 30.0]))
    center = m > 1 and rng.random() < 0.5
    return _svd_case(
        "activations", A.to(rng.choice(DTYPES)), rng.choice([1e-1, 3e-2, 1e-2, 1e-3]), center=center
    )


def _mpmath(rng: random.Random, largest: int) -> Case | None:
    """Graded over 1e-16 ... 1 with the threshold deep inside, counted with 60 digits."""
    n = rng.randint(2, largest)
    m = n + rng.choice([0, 3])
    sigma = spectra.geometric(n, 1e-14)
    A = spectra.from_singular_values(sigma, m, n, seed=rng.randrange(10**6))
    A = A * torch.logspace(0, -rng.randint(0, 8), n, dtype=torch.float64)  # and badly scaled columns
    rtol = 10 ** rng.uniform(-9, -2)
    with mpmath.workdps(60):
        exact = mpmath.matrix(A.tolist())
        values = mpmath.eigsy(exact.T * exact, eigvals_only=True)
        tau = mpmath.mpf(rtol) ** 2 * max(values)
        if min(abs(v - tau) for v in values) < mpmath.mpf(10) ** -40 * max(values):
            return None
        count = sum(bool(v > tau) for v in values)
        separated = all(abs(mpmath.sqrt(abs(v) / tau) - 1) > SEPARATION for v in values)
    return Case("graded, mpmath", A, count, rtol=rtol, separated=separated)


def _batch(rng: random.Random) -> list[Case]:
    """Equal shapes, type and threshold, to be stacked in one call."""
    m, n = rng.choice([(1, 1), (7, 3), (33, 20), (20, 70), (130, 64)])
    rtol, dtype = rng.choice([1e-1, 1e-2]), rng.choice([torch.float64, torch.float32])
    cases: list[Case] = []
    while len(cases) < 8:
        generator = torch.Generator().manual_seed(rng.randrange(10**6))
        columns = torch.logspace(0, -3, n)
        case = _svd_case("batched", (torch.randn(m, n, generator=generator) * columns).to(dtype), rtol)
        if case is not None:
            cases.append(case)
    return cases


FAMILIES: dict[str, Callable[[random.Random], Case | None]] = {
    "hadamard ties": _hadamard,
    "permutation, exact": _permutation,
    "extreme scales": _extreme,
    "centred, exact": _centred_exact,
    "rank-deficient": lambda rng: _prescribed(rng, "rank-deficient"),
    "clustered at the threshold": lambda rng: _prescribed(rng, "clustered at the threshold"),
    "graded": lambda rng: _prescribed(rng, "graded"),
    "separated by 5 %": lambda rng: _prescribed(rng, "separated by 5 %"),
    "activations": _activations,
}


def groups(per_family: int, seed: int, *, mpmath_matrices: int, mpmath_side: int) -> Iterator[list[Case]]:
    """``per_family`` matrices of each family in groups of one; the batched ones in groups of 8."""
    for name, make in FAMILIES.items():
        rng = random.Random(f"{seed} {name}")
        made = 0
        while made < per_family:
            case = make(rng)
            if case is not None:
                made += 1
                yield [case]
    rng = random.Random(f"{seed} batched")
    for _ in range((per_family + 7) // 8):
        yield _batch(rng)
    rng = random.Random(f"{seed} mpmath")
    made = 0
    while made < mpmath_matrices:
        case = _mpmath(rng, mpmath_side)
        if case is not None:
            made += 1
            yield [case]
