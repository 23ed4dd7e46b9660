"""What the hook path adds to a site's sums on a GPU, in Triton's interpreter against exact sums."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import own_process
import pytest
import torch
from own_process import interpreted
from test_triton_gram import random
from tolerances import sum_rtol
from torch import Tensor

from bsgap_kernels import rounding
from bsgap_kernels.strides import features_last
from bsgap_kernels.triton import config, site
from bsgap_kernels.triton.gram import _PREPARED


@own_process.starts
@pytest.mark.parametrize("part", own_process.PARTS)
def test_in_the_interpreter(part: str) -> None:
    own_process.run(__file__, "interpreter", part)


State = tuple[Tensor, Tensor, Tensor | None]


def state(side: int, n: int, *, sums: bool, fill: float = 0.0) -> State:
    """Gram matrix, totals and column sums of a site."""
    new = [torch.full(shape, fill, dtype=torch.float64) for shape in ((side, side), (3,), (n,))]
    return new[0], new[1], new[2] if sums else None


CASES: dict[str, tuple[Callable[[torch.dtype], Tensor], int, int, bool]] = {
    "rows": (lambda d: random(700, 24, dtype=d), 1, 2, True),
    "NCHW": (lambda d: random(5, 20, 16, 17, dtype=d), 1, 2, True),
    "channels_last": (
        lambda d: random(9, 16, 9, 7, dtype=d).to(memory_format=torch.channels_last),
        1,
        2,
        True,
    ),
    "odd strides": (lambda d: random(7, 9, 8, 10, dtype=d)[:, :, ::2, ::3], 1, 2, True),
    "flattened": (lambda d: random(40, 3, 4, 5, dtype=d), 1, 4, True),
    "several tiles": (lambda d: random(90, 150, dtype=d), 1, 2, True),
    "several of 128": (lambda d: random(70, 264, dtype=d), 1, 2, True),
    "few rows": (lambda d: random(19, 501, dtype=d), 1, 2, False),
    "few rows, several tiles": (lambda d: random(136, 200, dtype=d), 1, 2, False),
}


def by_hand(A: Tensor, first: int, last: int, features_side: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gram matrix, sums of magnitudes for its bound, and column sums, float64."""
    X = features_last(A.double(), first, last).reshape(-1, A.shape[first:last].numel())
    Y = X if features_side else X.mT
    return Y.mT @ Y, Y.abs().mT @ Y.abs(), X.sum(0)


def bound_of_part(precision: config.Precision, trace: float, side: int) -> float:
    """What docs/certificates.md, section 8, adds to the totals for the call prepared last."""
    if trace == 0:
        return 0.0
    if precision == "float32":
        return float("inf")
    row = list(_PREPARED.values())[-1].plan.rows[0]
    c, depth = row["roundings"], row["outer"] * row["inner"]
    return rounding.gamma(c) * (1 + 4 * rounding.gamma(c + 2 * depth)) * trace + side * rounding.UNDERFLOW


@interpreted
@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize(
    ("name", "splits"),
    # Splits meet in the same way whatever the tiles; those of several take the interpreter seconds.
    [
        pytest.param(
            name,
            splits,
            marks=pytest.mark.slow if splits < 3 and name not in ("rows", "several tiles") else (),
        )
        for name in CASES
        for splits in ((2,) if "several" in name else (1, 3, 18))
    ],
)
def test_sums_are_those_of_the_rows(
    name: str, precision: config.Precision, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "split_count", lambda *_: splits)
    build, first, last, features_side = CASES[name]
    dtypes = (torch.float32, torch.bfloat16) if precision == "float32" else (torch.float16, torch.float64)
    if "128" in name:
        dtypes = dtypes[1:]
    for dtype in dtypes:
        _PREPARED.clear()
        A, sums = build(dtype), precision == "float64" and features_side
        G, scale, columns = by_hand(A, first, last, features_side)
        gram, totals, vector = state(len(G), len(columns), sums=sums)
        for _ in range(2):
            site.add_gram(gram, totals, vector, A, first, last, features_side, False, precision, False)
        depth = A.numel() // len(G)
        rtol = (
            sum_rtol(torch.float32, min(depth, 256))
            if precision == "float32"
            else 2 * (depth + 200) * 2.0**-53
        )
        assert ((gram - 2 * G).abs() <= 2 * rtol * scale).all()
        assert torch.equal(gram, gram.mT)
        error = bound_of_part(precision, float(G.trace()), len(G))
        m = A.numel() // len(columns)
        expected = torch.tensor([2 * m, 2 * error, 2], dtype=torch.float64)
        # The oracle's trace and the kernel's differ by their roundings.
        torch.testing.assert_close(totals, expected, rtol=(depth + len(G)) * 2.0**-52, atol=0)
        if precision == "float64":
            assert float((gram - 2 * G).diagonal().abs().sum()) <= float(totals[1])
        if vector is not None:
            magnitude = features_last(A.double(), first, last).reshape(m, -1).abs().sum(0)
            assert ((vector - 2 * columns).abs() <= 4 * (m + 200) * 2.0**-53 * magnitude).all()


SEVERAL_TILES = [("float64", "finite"), ("float32", "finite"), ("float32", "huge")]


@interpreted
@pytest.mark.parametrize(
    ("shape", "precision", "content"),
    [
        pytest.param(
            shape, precision, content,
            # The three ways through several tiles: float64 sums, float32 sums, those redone in float64.
            marks=pytest.mark.slow if shape[1] > 64 and (precision, content) not in SEVERAL_TILES else (),
        )
        for shape in ((60, 7), (70, 136))
        for precision in ("float32", "float64")
        for content in ("finite", "zero", "nan", "tiny", "huge")
    ],
)  # fmt: skip
def test_fresh_sums_forget_what_was_there(
    content: str, precision: config.Precision, shape: tuple[int, int]
) -> None:
    A, n = random(*shape), shape[1]
    A *= {"zero": 0.0, "tiny": 1e-30, "huge": 1e30}.get(content, 1.0)
    if content == "nan":
        A[3, 2] = torch.nan
    sums = precision == "float64"
    states = []
    for fill, fresh in ((0.0, False), (7.0, True), (torch.nan, True)):
        own = state(n, n, sums=sums, fill=fill)
        site.add_gram(*own, A, 1, 2, True, False, precision, fresh)
        states.append([t for t in own if t is not None])
    for other in states[1:]:
        for found, wanted in zip(other, states[0], strict=True):
            assert torch.equal(found.nan_to_num(nan=3.0), wanted.nan_to_num(nan=3.0))
    gram, totals = states[0][0], states[0][1]
    if content == "nan":
        assert torch.isnan(gram.diagonal()).any()
        return
    G, scale, _ = by_hand(A, 1, 2, True)
    assert ((gram - G).abs() <= sum_rtol(torch.float32, shape[0]) * scale).all()
    assert (totals[0], totals[2]) == (shape[0], 1)
    if content == "zero":
        assert totals[1] == 0
    else:
        assert torch.isinf(totals[1]) if precision == "float32" else 0 < totals[1] < 1e-10 * G.trace()


@interpreted
@pytest.mark.parametrize("scale", [1e200, 1e-200, 1e-310, 1.0])
@pytest.mark.parametrize("n", [9, 70])
def test_float64_input_of_any_scale(scale: float, n: int) -> None:
    A = random(120, n, dtype=torch.float64) * scale
    gram, totals, sums = state(n, n, sums=True)
    assert sums is not None
    site.add_gram(gram, totals, sums, A, 1, 2, True, False, "float64", False)
    # Python's integers have no range to leave.
    X = [[Fraction(x) for x in row] for row in A.tolist()]
    for i, j in ((1, 1), (1, 0)):
        entry = sum(row[i] * row[j] for row in X)
        if abs(entry) < 10**300:
            # What products lose below the normal numbers is part of the error of any sum.
            assert float(gram[i, j]) == pytest.approx(float(entry), rel=1e-13, abs=len(A) * 2.0**-1074)
        else:
            assert not gram[i, i].isfinite()
    torch.testing.assert_close(sums, A.sum(0), rtol=1e-12, atol=0)
    assert totals[1] > 0


@interpreted
@pytest.mark.parametrize("splits", [1, 3])
def test_numbers_whose_squares_vanish_are_no_zeros(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "split_count", lambda *_: splits)
    A = torch.zeros(70, 9, dtype=torch.float64)
    for tiny, error in ((0.0, False), (1e-200, True)):
        A[67, 4] = tiny
        for rows, center in ((A, False), (A.mT[:, 20:], True)):
            gram, totals, _ = state(9, 9, sums=False)
            site.add_gram(gram, totals, None, rows, 1, 2, not center, center, "float64", False)
            assert bool(totals[1] > 0) == error
            assert (gram <= splits * 2.0**-1074).all()


def about_the_mean(A: Tensor) -> Tensor:
    """AAᵀ of the rows about their mean, in 64-bit precision."""
    X = A.double().numpy().astype(np.longdouble)
    X = X - X.mean(0)
    return torch.from_numpy((X @ X.T).astype(np.float64))


@interpreted
@pytest.mark.parametrize(
    ("dtype", "splits", "mean"),
    [(torch.float16, 1, 0.0), (torch.float32, 3, 1e3), (torch.float64, 18, 1e3), (torch.float32, 1, 1e3)],
)
@pytest.mark.parametrize("m", [9, 33])
def test_few_rows_about_their_mean(
    m: int, mean: float, dtype: torch.dtype, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "split_count", lambda *_: splits)
    shape = (m, 3, 7, 41) if m > 9 else (m, 901)
    A = (random(*shape, dtype=torch.float64) + mean).to(dtype)
    gram, totals, _ = state(m, 9, sums=False)
    for part in range(2):
        site.add_gram(gram, totals, None, A, 1, A.ndim, False, True, "float64", part == 0)
    error = torch.linalg.matrix_norm(gram / 2 - about_the_mean(A.flatten(1)), 2)
    c = list(_PREPARED.values())[-1].plan.rows[0]["roundings"]
    squares = float((A.double() - A[:1].double()).square().sum())
    bound = 2 * (2 * rounding.gamma(c) + 3 * rounding.gamma(m + 6)) * squares
    assert error <= bound / 2
    expected = torch.tensor([2 * m, bound, 2], dtype=torch.float64)
    torch.testing.assert_close(totals, expected, rtol=1e-9, atol=0)
    site.add_gram(gram, totals, None, A[:1].expand(m, *A.shape[1:]), 1, A.ndim, False, True, "float64", True)
    assert not gram.any()
    assert totals.tolist() == [m, 0, 1]


@interpreted
def test_a_site_keeps_its_bound_call_as_long_as_it_lives() -> None:
    before = len(site._SITES)
    gram, totals, _ = state(6, 6, sums=False)
    for rows in (30, 40, 30):
        site.add_gram(gram, totals, None, random(rows, 6), 1, 2, True, False, "float64", False)
    assert len(site._SITES[id(gram)].bound) == 2
    assert totals.tolist()[0] == 100
    del gram
    assert len(site._SITES) == before
