"""Launches of a site on a GPU, counted with a driver that does nothing, and what is kept between them."""

from __future__ import annotations

import importlib
import math
import re
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_compile
import own_process
import pytest
import torch
from own_process import stubbed
from test_triton_site import State, state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bsgap_kernels.triton import memory, site


@own_process.starts
def test_with_a_driver_that_does_nothing() -> None:
    own_process.run(__file__, "stub", "not slow")


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
    ("shape", "dtype", "float32_sums", "sums", "launches"),
    [
        ((64, 64, 8, 8), torch.bfloat16, True, False, 1),
        ((64, 16, 8, 8), torch.float32, True, False, 1),
        ((64, 64, 8, 8), torch.float16, False, True, 1),
        ((64, 300, 8, 8), torch.float32, False, True, 1),
        ((64, 64, 8, 8), torch.float64, False, True, 1),
        ((64, 300, 8, 8), torch.float64, False, False, 1),
        ((64, 300, 8, 8), torch.bfloat16, True, False, 2),  # the second redoes what left the range
    ],
)
@pytest.mark.parametrize("fresh", [False, True])
def test_one_launch_a_site(
    stub: Any, shape: tuple[int, ...], dtype: torch.dtype, float32_sums: bool, sums: bool, launches: int,
    fresh: bool,
) -> None:  # fmt: skip
    n = shape[1]
    own, A = state(n, n, sums=sums), torch.zeros(shape, dtype=dtype)
    found, operations = launched(stub, own, A, 1, 2, True, False, float32_sums, fresh)
    assert found == launches
    assert operations in ([], ALLOCATION)


@stubbed
@pytest.mark.parametrize(
    ("rows", "dtype", "most"),
    [
        (40, torch.bfloat16, 0),
        (64, torch.float64, 0),
        (100, torch.float32, 25),  # of several tiles: centred by operations of torch
        (100, torch.float64, 66),
    ],
)
def test_launches_of_few_rows_about_their_mean(stub: Any, rows: int, dtype: torch.dtype, most: int) -> None:
    A = torch.zeros(rows, 3, 20, 20, dtype=dtype)
    found, operations = launched(stub, state(rows, 3, sums=False), A, 1, 4, False, True, False, True)
    assert found == 1
    small = [name for name in operations if name not in ALLOCATION]
    assert bool(small) == bool(most)
    assert len(small) <= most


def launched(stub: Any, own: State, A: Tensor, *options: Any) -> tuple[int, list[str]]:
    """Launches of ours, and torch's operations, of an addition to a site after its first."""
    from bsgap_kernels.ops._cuda_sums import accumulate_gram

    accumulate_gram(*own, A, *options)
    for other in (A, torch.zeros_like(A)):  # what is bound does not depend on the activation's address
        before = stub.launches
        with Operations() as operations:
            accumulate_gram(*own, other, *options)
    return stub.launches - before, operations.names


@stubbed
def test_the_walk_to_the_kernel_is_the_one_that_is_documented(
    stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What stands on the stack where the kernel is launched, file by file and function by function.
    from bsgap_kernels import _native, dispatch
    from bsgap_kernels.ops import _cuda
    from bsgap_kernels.triton import gram, launch

    near_rank = importlib.import_module("bsgap_kernels.ops.near_rank")
    frames: list[traceback.FrameSummary] = []
    monkeypatch.setattr(dispatch, "device_kind", lambda A: "cuda")
    monkeypatch.setattr(_native, "has_cuda_kernels", lambda: True)
    monkeypatch.setattr(near_rank, "_NEAR_RANK", _cuda.near_rank)
    monkeypatch.setattr(_cuda, "count_stage", lambda found, rtol: Zero)
    monkeypatch.setattr(launch.Launch, "at", lambda *_: frames.extend(traceback.extract_stack()))
    monkeypatch.setattr(launch.Launch, "_adopt", lambda self, compiled: setattr(self, "_run", compiled))
    monkeypatch.setattr(gram, "_PREPARED", {})
    for _ in range(2):
        near_rank._kernel(torch.zeros(90, 8), rtol=0.3)
    walked: dict[str, list[str]] = {}
    for frame in frames:
        if "/bsgap_kernels/" in frame.filename:
            walked.setdefault(frame.filename.partition("/bsgap_kernels/")[2], []).append(frame.name)
    assert 1 <= len(walked) <= 4
    page = (Path(__file__).parents[1] / "docs" / "kernels.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:both|CUDA) \| `bsgap_kernels/(\S+\.py)` \| (.*) \|$", page, re.MULTILINE)
    documented = {file: re.findall(r"`(\w+)`", names) for file, names in rows if file != "dispatch.py"}
    assert list(walked.items()) == list(documented.items())


class Zero:
    """Counts of one matrix."""

    counts = torch.zeros(1, 1, dtype=torch.int64)


@stubbed
def test_what_triton_compiled_is_kept(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.jit import JITFunction

    from bsgap_kernels.triton.gram import gram_set
    from bsgap_kernels.triton.table import describe

    own, A = state(8, 8, sums=False), torch.zeros(90, 8)
    view = describe(A, batch=True)
    assert view is not None
    for _ in range(2):
        site.add_gram(*own, A, 1, 2, True, False, "float64", False)
        gram_set([view], precision="float32")
    monkeypatch.setattr(JITFunction, "run", None)
    before = stub.launches
    site.add_gram(*own, A, 1, 2, True, False, "float64", False)
    gram_set([view], precision="float32")
    assert stub.launches == before + 2


@stubbed
def test_what_is_compiled_ahead_is_what_calls_ask_for(
    stub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Triton's own cache says whether it had the kernel: one that it compiles makes a folder there.
    from bsgap_kernels.triton.gram import gram_set, triton_version
    from bsgap_kernels.triton.table import describe

    if triton_version() < (3, 8):
        pytest.skip("older versions name their kernels otherwise, and compile them when they are asked for")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    names = ("float16 32 0 float32", "float16 32 0 float64, site")
    variants = [v for v in gpu_compile.ahead() if v.name.removeprefix("torch.") in names]
    assert len(variants) == len(names)
    for variant in variants:
        assert gpu_compile.compile_one((variant, 90, math.inf)) == "compiled"
    before = len(list(tmp_path.rglob("*.cubin")))
    assert before == len(names)

    def call(columns: int) -> None:
        view = describe(torch.zeros(400, columns, dtype=torch.float16), batch=True)
        assert view is not None
        gram_set([view], precision="float32")

    call(32)
    A = torch.zeros(400, 32, dtype=torch.float16)
    site.add_gram(*state(32, 32, sums=True), A, 1, 2, True, False, "float64", False)
    assert len(list(tmp_path.rglob("*.cubin"))) == before
    call(31)
    assert len(list(tmp_path.rglob("*.cubin"))) == before + 1


def test_no_variant_is_compiled_ahead_twice() -> None:
    variants = gpu_compile.ahead()
    assert len({replace(variant, name="") for variant in variants}) == len(variants)
    assert gpu_compile.compile_one((variants[0], 90, 0.0)) == "not begun"


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
