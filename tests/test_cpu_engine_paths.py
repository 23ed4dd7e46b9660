"""Paths of the CPU engine that drawn matrices seldom reach: planes, pairs of bfloat16, and probed intervals.

The second needs a processor with AVX512-BF16, which test_where_the_bfloat16_tile_runs looks for; elsewhere
the same tests hold float32's tile to the same bounds. The third begins at side PROBED_MIN_SIDE.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import spectra
import torch
from engine_inputs import LAYOUTS, Case, convolutions
from tolerances import SVD_TRUTH_MARGIN, sum_rtol, worst_sum_rtol
from torch import Tensor

import bsgap_kernels as bsgap
from bsgap_kernels import _core, reference
from bsgap_kernels._core import FLOAT32_SUM_ROUNDINGS
from bsgap_kernels.dispatch import FLOAT32_GRAM_MIN_RTOL, PROBED_MIN_SIDE, select_backend

# Planes of NCHW images


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("float32_sums", [False, True])
@pytest.mark.parametrize(
    ("images", "height", "width"), [(2, 1, 1), (3, 5, 7), (128, 3, 3), (2, 64, 65), (40, 14, 14)]
)
def test_planes_keep_the_bound_of_their_sums(
    images: int, height: int, width: int, float32_sums: bool, dtype: torch.dtype
) -> None:
    # Past 128 channels, or with fewer rows than channels in the way of a copy, another path is taken.
    for channels in (1, 2, 4, 6, 7, 8, 17, 30, 64, 127, 128, 129):
        generator = torch.Generator().manual_seed(channels)
        x = torch.randn(images, channels, height, width, generator=generator).to(dtype)
        rows = x.movedim(1, -1)
        gram = torch.zeros(channels, channels, dtype=torch.float64)
        totals = torch.zeros(3, dtype=torch.float64)
        torch.ops.bsgap._accumulate_gram_(gram, totals, None, rows, 3, 4, True, False, float32_sums, False)
        exact = rows.reshape(-1, channels).double()
        m = len(exact)
        in_float = float32_sums and dtype != torch.float64
        factor = (
            worst_sum_rtol(torch.float32, min(m, FLOAT32_SUM_ROUNDINGS))
            if in_float
            else worst_sum_rtol(torch.float64, m + 24)
        )
        error = (gram.tril() - (exact.T @ exact).tril()).abs()
        assert (error <= 1.01 * factor * (exact.abs().T @ exact.abs())).all(), channels
        assert totals.tolist()[::2] == [m, 1]
        if not in_float:
            assert torch.linalg.norm(gram.tril() + gram.tril(-1).T - exact.T @ exact, 2) <= 2 * totals[1]


def test_planes_see_what_is_not_finite() -> None:
    for channels in (6, 20):
        x = torch.randn(3, channels, 5, 5)
        x[2, 4, 4, 4] = torch.nan
        assert bsgap.near_rank_grouped([x.movedim(1, -1)], rtol=0.1).tolist() == [-1]
        assert bsgap.near_rank_grouped([x[:2].movedim(1, -1)], rtol=1e-3).tolist() == [channels]


# Pairs of bfloat16

# Odd rows leave half a pair; sides on both sides of tiles (8) and of one to three panels (16). Then, past
# 128, sums in turns, chunks (256 rows), blocks of one matrix (sides past 128), and slabs of odd rows (4201).
SHAPES = (
    *itertools.product((1, 2, 7, 31, 33, 65, 127, 128, 129), (1, 7, 16, 17, 31, 33, 47, 49, 65, 129)),
    (257, 33), (385, 300), (771, 129), (4201, 17), (4201, 33), (5003, 131),
)  # fmt: skip
CPUINFO = Path("/proc/cpuinfo")


def float32_gram(A: Tensor) -> Tensor:
    """AᵀA (*, n, n) by the cheap sums: pairs of bfloat16 where the processor takes them."""
    gram: Tensor = torch.ops.bsgap._feature_gram(A, False, True)
    return gram.view(*A.shape[:-2], A.shape[-1], A.shape[-1])


def pairs_are_taken() -> bool:
    """Whether the tile ran: it alone counts subnormals as zero, so that 1 · 2^-130 is lost."""
    A = torch.tensor([[1.0, 2.0**-130]], dtype=torch.bfloat16)
    product = float(float32_gram(A)[0, 1])
    assert product in (0.0, 2.0**-130)
    return product == 0.0


def entries(m: int, n: int, kind: str) -> Tensor:
    """(m, n), bfloat16."""
    generator = torch.Generator().manual_seed(1000 * m + n)
    if kind == "integers":  # no sum reaches 2^24, so nothing is rounded
        return torch.randint(-255, 256, (m, n), generator=generator).to(torch.bfloat16)
    if kind == "constant columns":  # the same rounding at every row
        return (torch.rand(n, generator=generator) + 0.1).to(torch.bfloat16).expand(m, n)
    if kind == "a large row":  # beside 2^24 ones are lost, at most those of the same sum
        return torch.cat([torch.full((1, n), 2.0**12), torch.ones(m - 1, n)]).to(torch.bfloat16)
    return Case(m, n, torch.bfloat16, kind, seed=m + n).matrix()


KINDS = ("gaussian", "graded", "offset", "integers", "constant columns", "a large row")


def holds_gram(G: Tensor, A: Tensor) -> bool:
    """Whether G is the Gram matrix of the values of A up to the rounding of its float32 sums."""
    wide = A.double()  # exact, and their products of 16 bits are summed with 37 more
    bound = worst_sum_rtol(torch.bfloat16, min(A.shape[-2], FLOAT32_SUM_ROUNDINGS)) * (
        wide.abs().mT @ wide.abs()
    )
    # 2^-11: what the additions of the sums in float64 take, and those of the oracle.
    return bool(((G - wide.mT @ wide).abs() <= (1 + 2**-11) * bound).all())


def test_where_the_bfloat16_tile_runs() -> None:
    # Never with BSGAP_ISA=avx2 nor without AVX512-BF16, and always where neither stands against it.
    code = "import test_cpu_engine_paths as paths; print(paths.pairs_are_taken())"
    here = Path(__file__).parent
    environment = {"BSGAP_ISA": "avx2", "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
    if _core.instruction_set() == "avx512" and CPUINFO.exists():
        assert pairs_are_taken() == ("avx512_bf16" in CPUINFO.read_text(encoding="utf-8").split())
    if not pairs_are_taken():
        pytest.skip(
            f"no pairs of bfloat16 here (instruction set {_core.instruction_set()}), tests ran without"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_grams_keep_their_bound(kind: str) -> None:
    for m, n in SHAPES:
        A = entries(m, n, kind)
        G = float32_gram(A)
        assert holds_gram(G, A), (m, n)
        assert torch.equal(G, G.mT), (m, n)
        if kind == "integers":
            assert torch.equal(G, A.double().mT @ A.double()), (m, n)
        for layout, laid in LAYOUTS.items():
            assert torch.equal(float32_gram(laid(A)), G), (m, n, layout)


def test_threads_change_no_bfloat16_gram(use_threads: Callable[[int], None]) -> None:
    for m, n in ((4201, 33), (5003, 131), (385, 300)):
        A = entries(m, n, "gaussian")
        found = []
        for threads in (1, 2, 3):
            use_threads(threads)
            found.append(float32_gram(A))
        assert torch.equal(found[1], found[0])
        assert torch.equal(found[2], found[0])


@pytest.mark.parametrize("name", convolutions())
def test_bfloat16_grams_of_images(name: str) -> None:
    x = convolutions(torch.bfloat16)[name]
    G = float32_gram(x)  # of the last two dimensions
    assert holds_gram(G, x)
    assert torch.equal(G, float32_gram(x.contiguous()))
    rows = x.flatten(0, -2)  # of all, in place where their strides are regular
    assert holds_gram(float32_gram(rows), rows)
    assert torch.equal(float32_gram(rows), float32_gram(rows.contiguous()))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_bfloat16_grams_of_what_is_not_finite(value: float) -> None:
    for m, n in ((1, 1), (2, 16), (7, 31), (33, 17), (129, 65), (385, 300)):
        for i, j in itertools.product({0, m // 2, m - 1}, {0, n // 2, n - 1}):
            A = entries(m, n, "gaussian")
            A[i, j] = value
            for laid in LAYOUTS.values():
                assert float32_gram(laid(A)).isnan().all(), (m, n, i, j)


@pytest.mark.parametrize("exponent", [-110, -70, -40, 40, 60, 110])
def test_bfloat16_grams_of_any_scale(exponent: int) -> None:
    for m, n in ((7, 31), (33, 17), (129, 65)):
        A = entries(m, n, "gaussian")
        scaled = A * 2.0**exponent
        G = torch.ldexp(float32_gram(scaled), torch.tensor(-2 * exponent))
        if abs(exponent) < 50:  # powers of two change no rounding
            assert torch.equal(G, float32_gram(A))
        else:  # float32 products could leave its range, so sums are float64
            wide = A.double()
            bound = 2 * sum_rtol(torch.float64, m) * (wide.abs().mT @ wide.abs())
            assert ((G - wide.mT @ wide).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("k", [8, 48])
def test_products_that_flushing_loses_decide_no_count(dtype: torch.dtype, k: int) -> None:
    # sigma_2 is 2 to 3 % above tau, a sixth of its square made of products just below 2^-126. AVX512-BF16
    # flushes them, and of a trace of 2^-110 for each cell they are 2^-16: too much at this rtol.
    m, rtol = 3000, 8.4e-3
    A = torch.zeros(m, k, dtype=torch.float64)
    top = float(torch.tensor(1.01 * math.sqrt(k * m) * 2.0**-55).bfloat16())
    A[0, 0] = top
    A[1, 1:] = float(torch.tensor(math.sqrt(0.86 / (k - 1)) * rtol * top).bfloat16())
    A[2:, 1:] = 2.0**-63 * (1 - 2.0**-8)
    second = math.sqrt(float((A[:, 1] ** 2).sum()) * (k - 1))
    assert rtol * 1.02 < second / top < rtol * 1.04
    assert select_backend("near_rank", dtype, m, k, rtol=rtol).gram == "float32"
    assert bsgap.near_rank(A.to(dtype), rtol=rtol).item() == 2


# Probed intervals

PROBED_SHAPES = ((288, 288), (289, 400), (400, 289), (321, 320), (300, 1000), (1000, 301))
CHEAP = (torch.float32, torch.bfloat16, torch.float16)
CLUSTER, IN_CLUSTER = 0.02, 100


def probed(A: Tensor, rtol: float, *, seed: int = 0) -> tuple[int, int]:
    """The interval, from a path that is stated first."""
    plan = select_backend("near_rank_interval", A.dtype, *A.shape[-2:], rtol=rtol, mode="probed")
    assert (plan.certificate, plan.gram) == ("probed", "float32")
    lower, upper = bsgap.near_rank_interval(A, rtol=rtol, mode="probed", seed=seed)
    return int(lower), int(upper)


def split_cluster(m: int, n: int, dtype: torch.dtype) -> tuple[Tensor, float, int]:
    """A matrix, a threshold between two of its singular values about CLUSTER · σ_1, and its count by SVD.

    The values stand closer together than a float32 Gram matrix resolves, which takes an interval of several.
    """
    k = min(m, n)
    values = spectra.clustered(k, CLUSTER, 3e-3, IN_CLUSTER)
    A = spectra.from_singular_values(values, m, n, dtype=dtype, seed=m + n)
    sigma = reference.singular_values(A)
    inside = range(40, 60)
    count = max(inside, key=lambda i: float(sigma[i - 1] - sigma[i]))  # the widest gap near the middle
    assert float(sigma[count - 1] - sigma[count]) > 4 * SVD_TRUTH_MARGIN * float(sigma[0])
    return A, float((sigma[count - 1] + sigma[count]) / (2 * sigma[0])), count


def test_probed_intervals_begin_at_their_side() -> None:
    for m, n in ((PROBED_MIN_SIDE - 1, 400), (400, PROBED_MIN_SIDE - 1)):
        plan = select_backend("near_rank_interval", torch.float32, m, n, rtol=CLUSTER, mode="probed")
        assert plan.certificate == "rigorous"
    assert min(min(shape) for shape in PROBED_SHAPES) == PROBED_MIN_SIDE


@pytest.mark.parametrize("dtype", CHEAP)
@pytest.mark.parametrize("shape", PROBED_SHAPES)
def test_probed_intervals_within_a_cluster(shape: tuple[int, int], dtype: torch.dtype) -> None:
    A, rtol, count = split_cluster(*shape, dtype)
    lower, upper = probed(A, rtol)
    assert lower <= count <= upper
    # Float64 sums say one number: that this is an interval shows that the probes were asked. It ends within
    # the cluster, which a wrong Gram matrix would not allow.
    assert 1 < lower < upper < 1 + IN_CLUSTER
    assert bsgap.near_rank_interval(A, rtol=rtol) == (count, count)
    for seed in range(1, 4):
        other_lower, other_upper = probed(A, rtol, seed=seed)
        assert other_lower <= count <= other_upper
    for laid in LAYOUTS.values():
        assert probed(laid(A), rtol) == (lower, upper)


@pytest.mark.parametrize("dtype", CHEAP)
@pytest.mark.parametrize("shape", PROBED_SHAPES)
def test_probed_intervals_beside_a_gap(shape: tuple[int, int], dtype: torch.dtype) -> None:
    # A gap of 20 % on either side is wide enough for the probes to say one number, if G is what it should be.
    m, n = shape
    for rtol, count in ((0.1, 30), (0.2, min(m, n) - 100)):
        A = spectra.with_count(m, n, count, rtol, margin=0.2, dtype=dtype, seed=count)
        for laid in LAYOUTS.values():
            assert probed(laid(A), rtol) == (count, count)


@pytest.mark.parametrize("dtype", CHEAP)
def test_probed_intervals_at_the_least_rtol(dtype: torch.dtype) -> None:
    # Where the probes' factor blurs most; a centred and a batched call besides.
    m, n = 400, 289
    A = torch.stack([Case(m, n, dtype, "graded", seed).matrix() for seed in range(3)])
    for center in (False, True):
        sigma = reference.singular_values(A, center=center)
        ratios = sigma / sigma[:, :1]
        assert ((ratios - FLOAT32_GRAM_MIN_RTOL).abs() > SVD_TRUTH_MARGIN).all()
        counts = (ratios > FLOAT32_GRAM_MIN_RTOL).sum(-1)
        for laid in LAYOUTS.values():
            bounds = bsgap.near_rank_interval(
                laid(A), rtol=FLOAT32_GRAM_MIN_RTOL, center=center, mode="probed", seed=5
            )
            assert (bounds.lower <= counts).all()
            assert (counts <= bounds.upper).all()
            assert (bounds.upper - bounds.lower < n // 4).all()


def test_threads_change_no_probed_interval(use_threads: Callable[[int], None]) -> None:
    A, rtol, _ = split_cluster(1000, 301, torch.float32)
    found = []
    for threads in (1, 2, 3):
        use_threads(threads)
        found.append(probed(A, rtol))
    assert found[1:] == found[:1] * 2


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_probed_intervals_of_what_is_not_finite(value: float) -> None:
    A = Case(300, 290).matrix()
    A[299, 289] = value
    assert probed(A, 0.02) == (-1, -1)
