"""The CPU's fast paths say what the plain ones say, on drawn shapes, dtypes and strides.

Equality is exact wherever the design promises it: a matrix's numbers depend on its values alone, not on its
strides, the number of threads, or the other matrices of a call.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_inputs import LAYOUTS, Case, convolutions
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import bsgap_kernels as bsgap
from bsgap_kernels import _core, reference
from bsgap_kernels.dispatch import FLOAT32_GRAM_MIN_RTOL
from bsgap_kernels.strides import features_last

ANY = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture]
QUICK = settings(max_examples=200, deadline=None, suppress_health_check=ANY)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# On both sides of tiles (8, 24, 48), lanes (64), blocks (96), slabs and strips (128, 192, 256).
SIDES = (1, 2, 3, 7, 8, 9, 16, 17, 23, 24, 25, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129, 191, 193)
LARGE = ((4200, 24), (9000, 130), (300, 200), (257, 300), (30, 2100), (529, 515))


def cases(*, most: int = 193) -> st.SearchStrategy[Case]:
    side = st.sampled_from([s for s in SIDES if s <= most])
    kind = st.sampled_from(["graded", "gaussian", "low rank", "offset"])
    return st.builds(Case, side, side, st.sampled_from(DTYPES), kind, st.integers(0, 10**6))


layouts = st.sampled_from(sorted(LAYOUTS))


def answers(A: Tensor, rtol: float, *, center: bool = False) -> list[Tensor]:
    """Everything that has to be the same to the last bit, whatever stands around A in memory and time."""
    thresholds = torch.tensor([0.5, rtol], dtype=torch.float64)
    return [
        bsgap.gram(A, center=center),
        bsgap.near_rank(A, rtol=rtol, center=center),
        bsgap.near_rank(A, atol=0.3, center=center),
        bsgap.near_rank(A, atol=0.3, rtol=torch.tensor(rtol, dtype=torch.float64), center=center),
        *bsgap.near_rank_interval(A, rtol=rtol, center=center),
        *bsgap.near_rank_interval(A, rtol=rtol, center=center, mode="probed"),
        bsgap.singular_value_counts(A, thresholds, center=center),
        bsgap.near_rank_grouped(list(A.view(-1, *A.shape[-2:]) if A.dim() > 2 else [A]), rtol=rtol),
    ]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def separated_rtol(sigma: Tensor, least: float) -> tuple[float, int]:
    """An rtol >= least in the widest gap of a spectrum, 2 % clear of every value, and its count."""
    assume(float(sigma[0]) > 0)
    values = [*(s for s in (sigma / sigma[0]).tolist() if s > least), least]
    gaps = [upper / lower for upper, lower in itertools.pairwise(values)]
    count = max(range(len(gaps)), key=gaps.__getitem__) + 1
    assume(gaps[count - 1] > 1.045)
    return (values[count - 1] * values[count]) ** 0.5, count


# Against the oracle


@QUICK
@given(cases(), layouts, st.booleans(), st.sampled_from([FLOAT32_GRAM_MIN_RTOL, 1e-4]))
def test_counts_are_the_oracles(case: Case, layout: str, center: bool, least: float) -> None:
    A = case.matrix()
    rtol, count = separated_rtol(reference.singular_values(A, center=center), least)
    x = LAYOUTS[layout](A)
    assert bsgap.near_rank(x, rtol=rtol, center=center).item() == count
    assert bsgap.near_rank_grouped([x], rtol=rtol, center=center).tolist() == [count]
    thresholds = torch.tensor([2.0, rtol], dtype=torch.float64)
    assert bsgap.singular_value_counts(x, thresholds, center=center).tolist() == [0, count]
    assert bsgap.near_rank_interval(x, rtol=rtol, center=center) == (count, count)
    lower, upper = bsgap.near_rank_interval(x, rtol=rtol, center=center, mode="probed")
    assert lower <= count <= upper


@QUICK
@given(cases(), layouts, st.booleans(), st.floats(FLOAT32_GRAM_MIN_RTOL, 0.98))
def test_counts_lie_within_the_certificate(case: Case, layout: str, center: bool, rtol: float) -> None:
    # Any threshold: a float32 Gram matrix may move singular values that stand within 1 % of it.
    A = case.matrix()
    assume(case.m > 1 or not center)
    wide = A.double().contiguous()
    count = bsgap.near_rank(LAYOUTS[layout](A), rtol=rtol, center=center)
    assert count >= bsgap.near_rank_interval(wide, rtol=1.01 * rtol, center=center).lower
    assert count <= bsgap.near_rank_interval(wide, rtol=0.99 * rtol, center=center).upper


@QUICK
@given(cases(most=65), layouts, st.booleans())
def test_gram_matrices_keep_their_bound(case: Case, layout: str, center: bool) -> None:
    A = case.matrix()
    wide = A.double().numpy()
    exact = wide.astype(np.longdouble)
    exact = exact - exact.mean(0) if center else exact
    G = bsgap.gram(LAYOUTS[layout](A), center=center).numpy()
    assert (G.T == G).all()
    # 2^-11: what long doubles themselves lose, relative to float64.
    error, size = (G - exact.T @ exact).astype(np.float64), np.abs(exact).T @ np.abs(exact)
    assert center or (np.abs(error) <= (case.m + 4) * (1 + 2**-11) * 2.0**-53 * size).all()
    said = _core.gram(wide, center=center)
    bound = said["rounding_error"] + said["centring_error"]
    assert np.linalg.norm(error, 2) <= bound * (1 + 2**-11) or said["exponent"] != 0
    assert (said["gram"] == G).all() or said["exponent"] != 0


@pytest.mark.parametrize("shape", LARGE)
def test_large_gram_matrices_keep_their_bound(shape: tuple[int, int]) -> None:
    A = Case(*shape, dtype=torch.float64).matrix()
    rows = torch.linspace(0, shape[1] - 1, 12).long()  # long doubles are slow
    exact = A.numpy().astype(np.longdouble)
    chunks, slabs = -(-shape[0] // 256), 16
    bound = (256 + chunks + slabs) * 2.0**-53 * (1 + 2**-10) * np.abs(exact[:, rows]).T @ np.abs(exact)
    assert (np.abs(bsgap.gram(A).numpy()[rows] - exact[:, rows].T @ exact) <= bound).all()


# To the last bit


@QUICK
@given(cases(), layouts, st.booleans(), st.integers(1, 3))
def test_strides_change_nothing(case: Case, layout: str, center: bool, batch: int) -> None:
    A = torch.stack(
        [Case(case.m, case.n, case.dtype, case.kind, case.seed + i).matrix() for i in range(batch)]
    )
    x = LAYOUTS[layout](A)
    assert torch.equal(x, A)
    expected = answers(A, 0.02, center=center)
    assert same(answers(x, 0.02, center=center), expected)
    double = answers(A.double(), 0.02, center=center)  # halves and float32 numbers are float64 numbers
    assert torch.equal(double[0], expected[0])


@QUICK
@given(cases(most=97), st.sampled_from(["rows", "columns", "all", "batch"]), st.booleans())
def test_expanded_tensors_are_read_in_place(case: Case, along: str, center: bool) -> None:
    m, n = case.m, case.n
    one = Case(1 if along in ("rows", "all") else m, 1 if along in ("columns", "all") else n, case.dtype)
    x = one.matrix().expand(3, m, n) if along == "batch" else one.matrix().expand(m, n)
    assert same(answers(x, 0.02, center=center), answers(x.contiguous(), 0.02, center=center))


@settings(QUICK, max_examples=80)
@given(cases(), layouts, st.booleans(), st.integers(1, 5))
def test_threads_change_nothing(
    use_threads: Callable[[int], None], case: Case, layout: str, center: bool, batch: int
) -> None:
    x = LAYOUTS[layout](case.matrix().expand(batch, case.m, case.n))
    found = []
    for threads in (1, 2):
        use_threads(threads)
        found.append(answers(x, 0.02, center=center))
    assert same(*found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", LARGE)
def test_threads_change_nothing_of_large_matrices(
    shape: tuple[int, int], dtype: torch.dtype, use_threads: Callable[[int], None]
) -> None:
    x = Case(*shape, dtype=dtype).matrix()
    found = []
    for threads in (1, 2, 3):
        use_threads(threads)
        state = torch.ops.bsgap._shifted_gram(x, torch.full((shape[1],), 0.1, dtype=torch.float64))
        found.append([*answers(x, 0.02), bsgap.gram(x, center=True), *state])
    assert same(found[1], found[0])
    assert same(found[2], found[0])


# Company


def alone(x: Tensor, rtol: float, center: bool = False) -> int:
    return int(bsgap.near_rank(x, rtol=rtol, center=center))


def spoiled(A: Tensor, how: str) -> Tensor:
    """A member that must not touch its neighbours in the vector lanes."""
    A = A.clone()
    if how == "zero":
        return A.zero_()
    A[-1, -1] = {"nan": torch.nan, "inf": torch.inf, "big": 6e4}[how]
    return A


members = st.tuples(cases(most=97), layouts, st.sampled_from(["", "", "", "zero", "nan", "inf", "big"]))


@QUICK
@given(
    st.lists(members, min_size=1, max_size=14), st.booleans(), st.integers(1, 2), st.sampled_from([0.1, 1e-4])
)
def test_company_changes_nothing_of_a_list(
    use_threads: Callable[[int], None],
    drawn: list[tuple[Case, str, str]],
    center: bool,
    threads: int,
    rtol: float,
) -> None:
    xs = [LAYOUTS[layout](spoiled(c.matrix(), how) if how else c.matrix()) for c, layout, how in drawn]
    use_threads(1)
    expected = [alone(x, rtol, center) for x in xs]
    for (_, _, how), count in zip(drawn, expected, strict=True):
        assert (count == -1) == (how in ("nan", "inf"))
    use_threads(threads)
    assert bsgap.near_rank_grouped(xs, rtol=rtol, center=center).tolist() == expected
    assert bsgap.near_rank_grouped(xs[::-1], rtol=rtol, center=center).tolist() == expected[::-1]


@QUICK
@given(cases(most=97), st.lists(st.sampled_from(["", "", "zero", "nan", "big"]), min_size=1, max_size=19))
def test_company_changes_nothing_of_a_batch(case: Case, how: list[str]) -> None:
    xs = [Case(case.m, case.n, case.dtype, case.kind, case.seed + i).matrix() for i in range(len(how))]
    xs = [spoiled(x, h) if h else x for x, h in zip(xs, how, strict=True)]
    batch = torch.stack(xs)
    assert bsgap.near_rank(batch, rtol=0.02).tolist() == [alone(x, 0.02) for x in xs]
    ends = torch.stack(bsgap.near_rank_interval(batch, rtol=0.02), -1).tolist()
    assert ends == [[int(e) for e in bsgap.near_rank_interval(x, rtol=0.02)] for x in xs]
    for G, x in zip(bsgap.gram(batch), xs, strict=True):
        assert torch.equal(G.nan_to_num(nan=-1.0), bsgap.gram(x).nan_to_num(nan=-1.0))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("number", [127, 128, 300])  # from 128 on, groups are the pieces of work
def test_many_matrices(number: int, threads: int, use_threads: Callable[[int], None]) -> None:
    use_threads(threads)
    sides = (1, 5, 33, 64, 65, 100)
    xs = [Case(40 + i % 50, sides[i % 6], DTYPES[i % 4], seed=i).matrix() for i in range(number)]
    xs[7] = spoiled(xs[7], "nan")
    xs[20] = spoiled(xs[20], "zero")
    counts = bsgap.near_rank_grouped(xs, rtol=0.02).tolist()
    assert counts == [alone(x, 0.02) for x in xs]
    assert (counts[7], counts[20]) == (-1, 0)


# Rows of four and more dimensions


def added_up(x: Tensor) -> Tensor:
    """The Gram matrix of rows (*, n) after one addition to zeros, as the tracker's hooks make it."""
    gram, totals = (
        torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64),
        torch.zeros(3, dtype=torch.float64),
    )
    torch.ops.bsgap._accumulate_gram_(gram, totals, None, x, x.ndim - 1, x.ndim, True, False, False, False)
    return gram


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", convolutions())
def test_images_are_read_in_place(name: str, dtype: torch.dtype) -> None:
    x = convolutions(dtype)[name]
    copied = x.reshape(-1, x.shape[-1]).clone()
    expected = bsgap.near_rank_grouped([copied, copied[:9]], rtol=0.05)
    centred = bsgap.near_rank_grouped([copied], rtol=0.05, center=True)
    added = added_up(copied)
    with torch.autograd.profiler.profile() as profile:
        assert torch.equal(bsgap.near_rank_grouped([x, copied[:9]], rtol=0.05), expected)
        assert torch.equal(bsgap.near_rank_grouped([x], rtol=0.05, center=True), centred)
        found = added_up(x)
    assert "aten::flatten" not in {event.name for event in profile.function_events}
    # Planes are summed in another order.
    torch.testing.assert_close(found, added, rtol=1e-13, atol=0)


@st.composite
def strided(draw: st.DrawFn) -> Tensor:
    """2 to 5 dimensions in any order in memory, with gaps, of size 1, or expanded."""
    dims = draw(st.integers(2, 5))
    sizes = draw(st.lists(st.integers(1, 5), min_size=dims, max_size=dims))
    steps = draw(st.lists(st.sampled_from([1, 1, 1, 2]), min_size=dims, max_size=dims))
    order = draw(st.permutations(range(dims)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    memory = torch.randn([sizes[d] * steps[d] for d in order], generator=generator)
    x = memory.permute([order.index(d) for d in range(dims)])
    for d in range(dims):
        x = x[(slice(None),) * d + (slice(None, None, steps[d]),)]
        if draw(st.sampled_from([False] * 5 + [True])):
            x = x.select(d, 0).unsqueeze(d).expand(x.shape)
    return x


@settings(QUICK, max_examples=800)
@given(strided(), st.booleans())
def test_rows_of_any_strides(x: Tensor, center: bool) -> None:
    rows = x.reshape(-1, x.shape[-1]).clone()
    found = bsgap.near_rank_grouped([x], rtol=0.05, center=center)
    assert torch.equal(found, bsgap.near_rank_grouped([rows], rtol=0.05, center=center))


@settings(QUICK, max_examples=400)
@given(strided(), st.data())
def test_any_dimensions_are_features(x: Tensor, data: st.DataObject) -> None:
    first = data.draw(st.integers(1, x.ndim - 1))
    last = data.draw(st.integers(first + 1, x.ndim))
    rows = features_last(x, first, last).reshape(-1, x.shape[first:last].numel()).double()
    n = rows.shape[1]
    gram, totals, sums = (torch.zeros(s, dtype=torch.float64) for s in ((n, n), (3,), (n,)))
    torch.ops.bsgap._accumulate_gram_(gram, totals, sums, x, first, last, True, False, False, False)
    torch.testing.assert_close(gram.tril(), (rows.mT @ rows).tril())
    torch.testing.assert_close(sums, rows.sum(0))
    assert (totals[0], totals[2]) == (len(rows), 1)


@pytest.mark.parametrize("content", ["finite", "zero", "nan", "empty"])
@pytest.mark.parametrize("features_side", [True, False])
def test_fresh_sums_forget_what_was_there(content: str, features_side: bool) -> None:
    n = 5
    x = torch.randn(0 if content == "empty" else 9 if features_side else 4, n)
    if content in ("zero", "nan"):
        x.fill_(0.0 if content == "zero" else torch.nan)
    side = n if features_side else len(x)
    states = []
    for fill, fresh in ((0.0, False), (7.0, True), (torch.nan, True)):
        gram, totals, sums = (torch.full(s, fill, dtype=torch.float64) for s in ((side, side), (3,), (n,)))
        given = sums if features_side else None
        torch.ops.bsgap._accumulate_gram_(gram, totals, given, x, 1, 2, features_side, False, False, fresh)
        states.append([gram.tril(), totals, *([sums] if features_side else [])])
    for state in states[1:]:
        for found, expected in zip(state, states[0], strict=True):
            assert torch.equal(found.nan_to_num(nan=3.0), expected.nan_to_num(nan=3.0))


# What once was wrong


def test_columns_whose_squares_underflow() -> None:
    # Householder's factor is a reciprocal of squares: of entries near 1e-160 it overflows.
    for tiny in (1e-139, 1e-141, 1e-150, 1e-154, 1e-160, 1e-163):
        A = torch.tensor([[1.0, 0, tiny], [0, 0.5, 0], [0, 0, 0.25]], dtype=torch.float64)
        assert bsgap.near_rank(A, rtol=0.1).item() == 3
        assert bsgap.near_rank(torch.block_diag(A, A.mT), rtol=0.3).item() == 4


def test_repeated_columns() -> None:
    # What elimination leaves of them shrinks by 1e-16 again and again, down to such entries, in about half of
    # these matrices. NaN there left sigma_max at an upper bound, and the count too low.
    for seed in range(30):
        A = Case(128, 64, torch.float64, "low rank", seed).matrix()
        for rtol in (0.07, 0.1, 0.15):
            assert bsgap.near_rank(A, rtol=rtol).item() == int(reference.near_rank(A, rtol=rtol))


def test_sums_that_overflow_off_the_diagonal_only() -> None:
    # Rounded sums of squares stay below float32's range, the sum of products between them does not.
    x, y = ("0x1.0fa018p+63", "0x1.b20242p+63"), ("0x1.0fa01ap+63", "0x1.b2024p+63")
    A = torch.tensor([[float.fromhex(n) for n in column] for column in (x, y)], dtype=torch.float32).mT
    assert bsgap.near_rank(A, rtol=0.02).item() == 1
    wide = torch.cat([A, torch.zeros(2, 70)], 1).mT.contiguous().mT
    assert bsgap.near_rank(torch.cat([wide, torch.zeros(70, 72)]), rtol=0.02).item() == 1


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_counted_matrices_leave_no_memory_behind() -> None:
    # 300 matrices have 138 MB of Gram matrices, of which two are alive at a time; the input takes 0.2 MB.
    code = """
import torch, bsgap_kernels
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
torch.set_num_threads(2)
x = torch.randn(240, 240)
bsgap_kernels.near_rank(x.expand(2, 240, 240), rtol=0.02)
before = peak()
bsgap_kernels.near_rank(x.expand(300, 240, 240), rtol=0.02)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 50_000, "KiB"
