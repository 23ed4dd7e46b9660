"""The Triton Gram kernel in Triton's interpreter against float64, on CPU tensors."""

from __future__ import annotations

import math
from collections.abc import Callable

import own_process
import pytest
import torch
from own_process import interpreted
from tolerances import sum_rtol
from torch import Tensor

from bsgap_kernels.triton import config
from bsgap_kernels.triton.gram import GramSet, gram_set
from bsgap_kernels.triton.table import MatrixView, describe

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ALIGNED = (config.SIDE_ALIGNED, config.DEPTH_ALIGNED)


@own_process.starts
@pytest.mark.parametrize("part", own_process.PARTS)
def test_in_the_interpreter(part: str) -> None:
    own_process.run(__file__, "interpreter", part)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal entries with a common direction, so that sums do not cancel everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) + 0.5).to(dtype)


def viewed(A: Tensor, *, batch: bool = True, features_side: bool = False) -> MatrixView:
    view = describe(A, batch=batch, features_side=features_side)
    assert view is not None
    return view


def matrices(A: Tensor, *, batch: bool = True, features_side: bool = False) -> Tensor:
    """The oracle's X, (count, depth, side), float64."""
    wide = A.to(torch.float64)
    X = wide.reshape(-1, *A.shape[-2:]) if batch else wide.reshape(1, -1, A.shape[-1])
    return X if features_side or X.shape[2] <= X.shape[1] else X.mT


def assert_gram(G: Tensor, X: Tensor, result: GramSet, view: int, precision: config.Precision) -> None:
    """Each entry within its summation order's bound (float64) or a random walk of a chunk (float32)."""
    expected, scale = X.mT @ X, X.abs().mT @ X.abs()
    depth = X.shape[1]
    if precision == "float64":
        row = result.plan.rows[result.plan.order.index(view)]
        rtol = (row["roundings"] + depth) * 2.0**-53  # the kernel's order, and the oracle's
    else:
        rtol = sum_rtol(torch.float32, min(depth, 256))
    error = (G - expected).abs()
    assert (error <= rtol * scale).all(), f"{(error / scale).max()} above {rtol}"
    assert torch.equal(G, G.mT)


@interpreted
@pytest.mark.parametrize("dtype", FLOATS)
def test_float32_sums_are_added_up_in_float64_every_chunk(dtype: torch.dtype) -> None:
    chunk = config.gram_config("float32", dtype.itemsize, 64, False, 9).chunk
    A = torch.full((8 * chunk, 64), 2.0**-8.75).to(dtype)
    A[:: 4 * chunk] = 2.0**7  # a chunk that starts so loses all its other products
    result = gram_set([viewed(A)], precision="float32", splits=1)
    (X,) = matrices(A)
    exact = X.mT @ X
    small = exact - 2 * 2.0**14
    lost = (exact - result.gram(0)[0]) / small
    assert (lost > 0.2).all()
    assert (lost <= 0.25).all()


def row_of(result: GramSet, view: int) -> dict[str, int]:
    return result.plan.rows[result.plan.order.index(view)]


def layout_of(result: GramSet, view: int) -> int:
    return row_of(result, view)["layout"] % config.CODE_LAYOUTS


def tile_of(result: GramSet, view: int) -> int:
    return config.TILES[row_of(result, view)["layout"] % config.CODES // config.CODE_LAYOUTS]


LAYOUTS: dict[str, tuple[Callable[[torch.dtype, int], Tensor], bool, int]] = {
    "row-major": (lambda d, k: random(777, 24, dtype=d), True, config.SIDE_ALIGNED),
    "row-major, several tiles": (lambda d, k: random(k + 36, k, dtype=d), True, config.SIDE_ALIGNED),
    "unaligned": (lambda d, k: random(903, 11, dtype=d), True, config.ANY),
    "NCHW": (lambda d, k: random(5, 20, 16, 17, dtype=d).permute(0, 2, 3, 1), False, config.DEPTH_ALIGNED),
    "NCHW, odd": (
        lambda d, k: random(5, 40, 13, 15, dtype=d).permute(0, 2, 3, 1),
        False,
        config.DEPTH_CONTIGUOUS,
    ),
    "NCHW, small images": (lambda d, k: random(97, 13, 3, 3, dtype=d).permute(0, 2, 3, 1), False, config.ANY),
    "channels_last": (
        lambda d, k: random(29, 16, 9, 7, dtype=d).to(memory_format=torch.channels_last).permute(0, 2, 3, 1),
        False,
        config.SIDE_ALIGNED,
    ),
    "wide": (lambda d, k: random(40, 816, dtype=d), True, config.DEPTH_ALIGNED),
    "wide, odd": (lambda d, k: random(19, 501, dtype=d), True, config.DEPTH_CONTIGUOUS),
    "wide, several tiles": (lambda d, k: random(k, k + 40, dtype=d), True, config.DEPTH_ALIGNED),
    "wide, several tiles, odd": (
        lambda d, k: random(k + 1, k + 36, dtype=d)[:, 3:],
        True,
        config.DEPTH_CONTIGUOUS,
    ),
    "sliced": (lambda d, k: random(900, 90, dtype=d)[::2, 1::3], True, config.ANY),
    "sliced, several tiles": (lambda d, k: random(k + 36, 2 * k, dtype=d)[:, ::2], True, config.ANY),
    "sliced tokens": (lambda d, k: random(5, 150, 32, dtype=d)[:, :137], False, config.SIDE_ALIGNED),
    "sliced, few tokens": (lambda d, k: random(60, 8, 32, dtype=d)[:, :7], False, config.ANY),
    "batch": (lambda d, k: random(2, 2, 770, 32, dtype=d), True, config.SIDE_ALIGNED),
    "expanded batch": (lambda d, k: random(1, 601, 9, dtype=d).expand(3, 601, 9), True, config.ANY),
}


@interpreted
@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, precision: config.Precision) -> None:
    build, batch, layout = LAYOUTS[name]
    dtypes = FLOATS if precision == "float32" else (torch.float32, torch.bfloat16, torch.float64)
    if "several" in name:
        dtypes = FLOATS[:2]  # each takes seconds, and tiles are the same to every dtype
    for dtype in dtypes:
        # At least three tiles, the last of them ragged, that 16-byte loads divide.
        large = precision == "float32" and dtype.itemsize == 2 and layout in ALIGNED
        A = build(dtype, 264 if large else 136)
        result = gram_set([viewed(A, batch=batch)], precision=precision, splits=3)
        assert layout_of(result, 0) == layout
        assert row_of(result, 0)["splits"] == 3
        X = matrices(A, batch=batch)
        if "several" in name:
            assert -(-X.shape[2] // tile_of(result, 0)) >= 3
            assert X.shape[2] % tile_of(result, 0) != 0
        assert [launch.rescue for launch in result.plan.launches] == [False, True][
            : 1 + (precision == "float32" and X.shape[2] > 64)
        ]
        assert_gram(result.gram(0), X, result, 0, precision)


@interpreted
@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize(
    ("precision", "dtype", "shape"),
    [
        ("float32", torch.bfloat16, (19, 40, 8, 8)),
        ("float32", torch.float32, (19, 40, 4, 4)),
        ("float64", torch.bfloat16, (7, 13, 8, 8)),
        ("float64", torch.float64, (9, 60, 2, 4)),
    ],
)
def test_blocks_of_two_small_images(
    precision: config.Precision, dtype: torch.dtype, shape: tuple[int, ...], splits: int
) -> None:
    A = random(*shape, dtype=dtype)
    A[3] *= 1e25 if precision == "float32" else 1  # redone in float64, which walks the same depths
    rows = A.permute(0, 2, 3, 1)
    result = gram_set([viewed(rows, batch=False)], precision=precision, splits=splits)
    assert result.plan.launches[0].hops == 2
    assert layout_of(result, 0) == config.DEPTH_ALIGNED
    assert_gram(result.gram(0), matrices(rows, batch=False), result, 0, precision)


@interpreted
@pytest.mark.parametrize(
    ("splits", "precision"),
    [
        (17, "float32"),
        *(
            pytest.param(splits, precision, marks=pytest.mark.slow)
            for splits in (1, 17, 256)
            for precision in ("float32", "float64")
            if (splits, precision) != (17, "float32")
        ),
    ],
)
def test_splits_meet_in_two_levels(splits: int, precision: config.Precision) -> None:
    sizes = [(2500, 16), (40, 4), (1301, 30), (1250, 64), (1100, 33)]
    if (splits, precision) == (17, "float32"):
        sizes = [(560, 16), (40, 4), (570, 64)]  # as many blocks of 32 rows as there are splits
    mixed = [random(m, n, seed=n) for m, n in sizes] + [random(2, 700, 16, dtype=torch.bfloat16)]
    if splits == 256:
        mixed = [random(130 * 256 if precision == "float64" else 35 * 256, 16), *mixed[1:2]]
    elif len(mixed) > 4:
        mixed.append(random(600, 136))
    views = [viewed(A) for A in mixed]
    result = gram_set(views, precision=precision, splits=splits)
    assert max(row["splits"] for row in result.plan.rows) == splits
    launches = [launch for launch in result.plan.launches if not launch.rescue]
    assert sum(launch.items for launch in launches) == sum(
        row["count"]
        * row["splits"]
        * config.tile_count(row["side"], config.TILES[row["layout"] % config.CODES // config.CODE_LAYOUTS])
        for row in result.plan.rows
    )
    sides = [row["side"] for row in result.plan.rows]
    assert sides == sorted(sides, reverse=True)
    for i, A in enumerate(mixed):
        assert_gram(result.gram(i), matrices(A), result, i, precision)
    again = gram_set(views, precision=precision, splits=splits)
    assert torch.equal(result.grams, again.grams)


@interpreted
def test_heuristics_split_a_long_matrix() -> None:
    A = random(30000, 16)
    result = gram_set([viewed(A)], precision="float64")
    assert 2 <= row_of(result, 0)["splits"] <= config.MAX_SPLITS
    assert_gram(result.gram(0), matrices(A), result, 0, "float64")


@interpreted
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_features_side(precision: config.Precision) -> None:
    A = random(2, 30, 150)
    result = gram_set([viewed(A, features_side=True)], precision=precision, features_side=True, splits=2)
    assert result.plan.sides == (150,)
    assert_gram(result.gram(0), matrices(A, features_side=True), result, 0, precision)


@interpreted
@pytest.mark.parametrize(
    ("mode", "dtype", "splits"),
    [
        ("vector", torch.float32, 3),
        ("first_row", torch.float32, 1),
        ("first_row", torch.bfloat16, 3),
        ("first_row", torch.float64, 3),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("vector", torch.float64, 3),
                ("vector", torch.float32, 18),
                ("vector", torch.bfloat16, 3),
                ("first_row", torch.float32, 18),
                ("vector", torch.float16, 3),
            )
        ),
    ],
)
def test_shift_and_column_sums(mode: str, dtype: torch.dtype, splits: int) -> None:
    mixed = [random(2, 300, 20, dtype=dtype), random(40, 200, dtype=dtype), random(300, 150, dtype=dtype)]
    mixed += [random(3, 7, 900, dtype=dtype), random(19, 7, 3, 12, dtype=dtype).flatten(0, 2)[:, ::2]]
    vectors = [random(A.numel() // A.shape[-2] // A.shape[-1], A.shape[-1], seed=3).double() for A in mixed]
    if mode == "first_row":
        vectors = [A.double().reshape(-1, *A.shape[-2:])[:, 0] for A in mixed]
    shift = torch.cat([v.flatten() for v in vectors]) if mode == "vector" else "first_row"
    result = gram_set([viewed(A) for A in mixed], precision="float64", shift=shift, splits=splits)
    assert result.sums is not None
    for i, (A, c) in enumerate(zip(mixed, vectors, strict=True)):
        shifted = A.double().reshape(-1, *A.shape[-2:]) - c[:, None, :]
        X = matrices(shifted)
        assert_gram(result.gram(i), X, result, i, "float64")
        if A.shape[-1] <= A.shape[-2]:
            at = result.plan.vector_offsets[i]
            sums = result.sums[at : at + c.numel()].view_as(c)
            bound = (row_of(result, i)["roundings"] + A.shape[-2]) * 2.0**-53 * shifted.abs().sum(1)
            assert ((sums - shifted.sum(1)).abs() <= bound).all()


RANGES = [
    (shape, dtype, scale)
    for shape in ((400, 10), (300, 40), (70, 136), (270, 264))
    for dtype in (torch.float32, torch.bfloat16)
    for scale in (1e30, 1e-30, 3e18, 0.0)
]


def takes_seconds(shape: tuple[int, int], dtype: torch.dtype, scale: float) -> bool:
    """Tiles of 128 that are redone or not as others are, and more of them."""
    return shape[1] > 200 or (shape[1] > 64 and dtype == torch.bfloat16 and scale != 1e30)


@interpreted
@pytest.mark.parametrize(
    ("shape", "dtype", "scale"),
    [pytest.param(*case, marks=pytest.mark.slow if takes_seconds(*case) else ()) for case in RANGES],
)
def test_float32_range(shape: tuple[int, int], dtype: torch.dtype, scale: float) -> None:
    A = random(*shape, dtype=torch.float32).mul(scale).to(dtype)
    A[: shape[0] // 2, :3] = 0
    for splits in (1, 2) if shape[1] < 100 else (2,):
        result = gram_set([viewed(A), viewed(random(50, 70))], precision="float32", splits=splits)
        assert_gram(result.gram(0), matrices(A), result, 0, "float32")
        assert result.exponent is None


@interpreted
@pytest.mark.parametrize(
    ("shape", "bad"), [((400, 10), math.nan), ((400, 10), -math.inf), ((70, 136), -math.inf)]
)
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_non_finite_input_shows_on_the_diagonal(
    bad: float, precision: config.Precision, shape: tuple[int, int]
) -> None:
    for dtype in (torch.float32, torch.bfloat16) if precision == "float32" else (torch.float16,):
        A, fine = random(*shape, dtype=dtype), random(60, 20, dtype=dtype)
        A[shape[0] // 2, shape[1] - 2] = bad
        result = gram_set([viewed(A), viewed(fine)], precision=precision, splits=2)
        assert not result.gram(0).diagonal(dim1=1, dim2=2).isfinite().all()
        assert_gram(result.gram(1), matrices(fine), result, 1, precision)


@interpreted
def test_float64_input_is_scaled_by_a_power_of_two() -> None:
    scales = (1e200, 1e-200, 1e-310, 1.0, 0.0, float("nan"), 1e150)
    A = torch.stack([random(120, 9, dtype=torch.float64) * s for s in scales])
    result = gram_set([viewed(random(30, 5)), viewed(A)], precision="float64", splits=2)
    assert result.exponent is not None
    exponent = result.exponent
    assert exponent.dtype == torch.int32
    assert exponent[0] == 0
    assert (exponent[1:] != 0).tolist() == [True, True, True, False, False, False, True]
    X = torch.ldexp(A, exponent[1:, None, None])
    keep = [0, 1, 2, 3, 4, 6]
    assert_gram(result.gram(1)[keep], X[keep], result, 1, "float64")
    largest = X[[0, 1, 6]].abs().amax((1, 2))
    assert ((largest >= 0.5) & (largest < 1)).all()
    assert not result.gram(1)[5].diagonal().isfinite().all()


@interpreted
@pytest.mark.parametrize("where", ["batch", "outer", "inner", "side"])
def test_offsets_beyond_32_bits(where: str) -> None:
    # Address space only: pages that nobody touches take no memory.
    far = 2**31 + 4096
    memory = torch.empty(far + 100000, dtype=torch.bfloat16)
    shape, stride = {
        "batch": ((2, 30, 8), (far, 8, 1)),
        "outer": ((2, 40, 8), (far, 8, 1)),
        "inner": ((2, 2), (far, 1)),
        "side": ((40, 2), (1, far)),
    }[where]
    A = memory.as_strided(shape, stride)
    A.copy_(random(*shape, dtype=torch.bfloat16))
    view = viewed(A, batch=where != "outer")
    for precision in ("float32", "float64"):
        result = gram_set([view], precision=precision, splits=2)
        assert_gram(result.gram(0), matrices(A, batch=where != "outer"), result, 0, precision)


def test_what_it_refuses() -> None:
    view = viewed(random(4, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="float64"):
        gram_set([view], precision="float32")
    with pytest.raises(ValueError, match="shift"):
        gram_set([viewed(random(4, 3))], precision="float32", shift="first_row")
