"""What the hook path adds to a site's sums on a GPU: by the Gram kernel itself, in one launch.

Its numbers are those of Triton's interpreter; its launches are counted with a driver that does nothing. Each
replaces triton in its process, so that both run in processes of their own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from tolerances import sum_rtol
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bsgap_kernels import rounding
from bsgap_kernels.strides import features_last
from bsgap_kernels.triton import config, memory, site
from bsgap_kernels.triton.gram import _PREPARED

HERE = os.environ.get("BSGAP_SITE_TESTS", "")
interpreted = pytest.mark.skipif(HERE != "interpreter", reason="runs in a process of its own")
stubbed = pytest.mark.skipif(HERE != "stub", reason="runs in a process of its own")


@pytest.mark.skipif(HERE != "", reason="is such a process")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize(
    ("where", "part"),
    [
        ("interpreter", "not slow"),
        pytest.param("interpreter", "slow", marks=pytest.mark.slow),
        ("stub", "not slow"),
    ],
)
def test_in_a_process_of_its_own(where: str, part: str) -> None:
    environment = os.environ | {"BSGAP_SITE_TESTS": where}
    if where == "interpreter":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", part, __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "passed" in result.stdout


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal entries with a common direction, so that sums do not cancel everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) + 0.5).to(dtype)


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
            site.add_gram(gram, totals, vector, A, first, last, features_side, precision, False)
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


@interpreted
@pytest.mark.parametrize("shape", [(60, 7), (130, 136)])
@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("content", ["finite", "zero", "nan", "tiny", "huge"])
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
        site.add_gram(*own, A, 1, 2, True, precision, fresh)
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
    site.add_gram(gram, totals, sums, A, 1, 2, True, "float64", False)
    # Python's integers have no range to leave.
    X = [[Fraction(x) for x in row] for row in A.tolist()]
    entry = sum(row[0] * row[1] for row in X)
    assert float(gram[1, 0]) == (
        pytest.approx(float(entry), rel=1e-13) if abs(entry) < 10**300 else float("inf")
    )
    torch.testing.assert_close(sums, A.sum(0), rtol=1e-12, atol=0)
    assert totals[1] > 0


@interpreted
def test_a_site_keeps_its_bound_call_as_long_as_it_lives() -> None:
    before = len(site._SITES)
    gram, totals, _ = state(6, 6, sums=False)
    for rows in (30, 40, 30):
        site.add_gram(gram, totals, None, random(rows, 6), 1, 2, True, "float64", False)
    assert len(site._SITES[id(gram)].bound) == 2
    assert totals.tolist()[0] == 100
    del gram
    assert len(site._SITES) == before


class Operations(TorchDispatchMode):
    """Names of torch's operations that are more than another view of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if not getattr(func, "is_view", False) and str(func) != "aten.detach.default":
            self.names.append(str(func))
        return outputs


@pytest.fixture(scope="module")
def stub() -> Any:
    import stub_driver

    return stub_driver.install()


ALLOCATION = ["aten.empty.memory_format"]


@stubbed
@pytest.mark.parametrize(
    ("shape", "dtype", "float32_gram", "sums", "launches"),
    [
        ((64, 64, 8, 8), torch.bfloat16, True, False, 1),
        ((64, 16, 8, 8), torch.float32, True, False, 1),
        ((64, 64, 8, 8), torch.float16, False, True, 1),
        ((64, 300, 8, 8), torch.float32, False, True, 1),
        ((64, 300, 8, 8), torch.bfloat16, True, False, 2),  # the second redoes what left the range
    ],
)
@pytest.mark.parametrize("fresh", [False, True])
def test_one_launch_a_site(
    stub: Any, shape: tuple[int, ...], dtype: torch.dtype, float32_gram: bool, sums: bool, launches: int,
    fresh: bool,
) -> None:  # fmt: skip
    from bsgap_kernels.ops._cuda_sums import accumulate_gram

    n = shape[1]
    own, A = state(n, n, sums=sums), torch.zeros(shape, dtype=dtype)
    options = (1, 2, True, False, float32_gram, fresh)
    accumulate_gram(*own, A, *options)
    for other in (A, torch.zeros_like(A)):  # what is bound does not depend on the activation's address
        before = stub.launches
        with Operations() as operations:
            accumulate_gram(*own, other, *options)
        assert stub.launches - before == launches
        assert operations.names in ([], ALLOCATION)


@stubbed
def test_what_triton_compiled_is_kept(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.jit import JITFunction

    from bsgap_kernels.triton.gram import gram_set
    from bsgap_kernels.triton.table import describe

    own, A = state(8, 8, sums=False), torch.zeros(90, 8)
    view = describe(A, batch=True)
    assert view is not None
    for _ in range(2):
        site.add_gram(*own, A, 1, 2, True, "float64", False)
        gram_set([view], precision="float32")
    monkeypatch.setattr(JITFunction, "run", None)
    before = stub.launches
    site.add_gram(*own, A, 1, 2, True, "float64", False)
    gram_set([view], precision="float32")
    assert stub.launches == before + 2


@stubbed
def test_another_form_of_compiled_kernels_is_served_and_said() -> None:
    from bsgap_kernels.triton.launch import Launch

    launched: list[tuple[object, ...]] = []

    class Kernel:
        """Launches, and hands back what has none of the names that are asked for."""

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
            def launch(*arguments: object, **constants: object) -> object:
                launched.append(arguments)
                return object()

            return launch

    launch = Launch(Kernel(), 3, {"x": "i32"}, {}, {}, torch.device("cpu"))
    with pytest.warns(UserWarning, match="keeps compiled kernels in another form"):
        launch(1)
    launch(2)
    assert launched == [(1,), (2,)]
    assert not launch.is_kept


def test_kept_memory_is_made_by_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    # Where a graph is warmed up, what this thread allocates is the graph's.
    streams, entered = ["theirs"], []

    class Stream:
        def __init__(self, stream: str) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            entered.append((threading.get_ident(), self.stream))

        def __exit__(self, *_: object) -> None:
            pass

    capturing = False
    monkeypatch.setattr(memory, "is_capturing", lambda device: capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: streams[-1])
    monkeypatch.setattr(torch.cuda, "stream", Stream)
    device, here = torch.device("cuda", 0), threading.get_ident()

    def make() -> tuple[int, bool]:
        return threading.get_ident(), torch.is_inference_mode_enabled()

    with torch.inference_mode():
        thread, inference = memory.kept(device, make)
    assert thread != here
    assert not inference
    assert entered == [(thread, "theirs")]
    capturing = True
    assert memory.kept(device, make)[0] == here
    capturing = False
    assert memory.kept(torch.device("cpu"), make)[0] == here
    with pytest.raises(ZeroDivisionError):
        memory.kept(device, lambda: 1 // 0)
