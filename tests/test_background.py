"""BackgroundWriter: never blocks, drops with a count, survives its sinks, flushes at whatever end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bsgap_kernels import _native
from bsgap_kernels.tracking import background, clock, reading
from bsgap_kernels.tracking.background import BackgroundWriter
from bsgap_kernels.tracking.records import Question
from bsgap_kernels.tracking.rows import Row
from bsgap_kernels.tracking.sinks import JsonlSink, ParquetSink

# Nothing here waits as long, unless it fails.
LONG = 20.0


class Memory:
    """Keeps what it gets; `gate` closed holds it up, `error` set makes it raise."""

    def __init__(self, *, held: bool = False, error: BaseException | None = None) -> None:
        self.rows: list[Row] = []
        self.calls: list[str] = []
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.error = error
        self._changed = threading.Condition()
        if not held:
            self.gate.set()

    def write(self, rows: Sequence[Row], /) -> None:
        self.entered.set()
        assert self.gate.wait(LONG)
        if self.error is not None:
            raise self.error
        with self._changed:
            self.rows.extend(rows)
            self._changed.notify_all()

    def flush(self) -> None:
        self.calls.append("flush")

    def close(self) -> None:
        self.calls.append("close")

    def wait_for(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.rows) >= count, LONG)

    @property
    def steps(self) -> list[int]:
        return [row.step for row in self.rows]


class Stuck(Memory):
    pass


def row(step: int) -> list[Row]:
    return [Row(step, "relu1#0", "batch.ratio", step / 7)]


def put(writer: BackgroundWriter, steps: range) -> None:
    for step in steps:
        writer.put(lambda step=step: row(step))


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_rows_arrive_in_order_on_another_thread() -> None:
    sinks = [Memory(), Memory()]
    makers = set()

    def make() -> list[Row]:
        makers.add(threading.current_thread())
        return row(100)

    with BackgroundWriter(sinks) as writer:
        put(writer, range(100))
        writer.put(make)
        writer.put(list)
        assert writer.flush(LONG)
        for sink in sinks:
            assert sink.steps == list(range(101))
            assert sink.calls[-1] == "flush"
    assert threading.current_thread() not in makers
    assert [sink.calls[-2:] for sink in sinks] == [["flush", "close"]] * 2
    assert (writer.dropped, writer.disabled) == (0, [])


def test_a_stuck_sink_blocks_neither_put_nor_another_sink(caplog: pytest.LogCaptureFixture) -> None:
    stuck, other = Stuck(held=True), Memory()
    writer = BackgroundWriter([stuck, other], capacity=4)
    put(writer, range(1))
    assert stuck.entered.wait(LONG)
    # One is being written and eight wait. The others are dropped for this sink, and for no other.
    for step in range(1, 21):
        put(writer, range(step, step + 1))
        other.wait_for(step + 1)
    assert writer.dropped_by == {"Stuck": 12}
    assert "Stuck: 1 step is dropped, for its queue of 8 steps is full" in caplog.text
    stuck.gate.set()
    writer.close()
    assert (stuck.steps, other.steps) == (list(range(9)), list(range(21)))
    assert writer.dropped == 12
    assert caplog.text.count("Stuck: ") == 2
    assert "Stuck: 12 steps were dropped in all" in caplog.text


def test_a_step_wakes_no_thread_until_its_queue_fills(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_SECONDS_BETWEEN_LOOKS", LONG)
    sink = Memory()
    with BackgroundWriter([sink], capacity=10) as writer:
        put(writer, range(4))
        time.sleep(0.2)
        assert not sink.rows
        assert writer.flush(LONG)
        assert sink.steps == list(range(4))
        put(writer, range(4, 9))  # half
        sink.wait_for(9)
    assert writer.dropped == 0
    sink = Memory()
    with BackgroundWriter([sink], capacity=1) as writer:  # one step fills it
        for step in range(3):
            put(writer, [step])
            sink.wait_for(step + 1)
    assert writer.dropped == 0


def test_put_does_not_wait_for_rows_that_are_not_there_yet(caplog: pytest.LogCaptureFixture) -> None:
    ready, entered, sink = threading.Event(), threading.Event(), Memory()

    def make() -> list[Row]:
        entered.set()
        assert ready.wait(LONG)
        return row(0)

    writer = BackgroundWriter([sink], capacity=3)
    writer.put(make)
    assert entered.wait(LONG)
    put(writer, range(1, 11))
    assert writer.dropped_by == {"rows": 7}
    assert "rows: 1 step is dropped, for its queue of 3 steps is full" in caplog.text
    ready.set()
    writer.close()
    assert sink.steps == [0, 1, 2, 3]
    assert "rows: 7 steps were dropped in all" in caplog.text


@pytest.mark.parametrize("error", [ValueError("no such project"), SystemExit(1), OSError("gone")])
def test_a_sink_that_raises_is_disabled_and_named(
    error: BaseException, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = Memory(error=error)
    with BackgroundWriter([bad, JsonlSink(tmp_path / "run.jsonl")]) as writer:
        put(writer, range(5))
        assert writer.flush(LONG)
        assert writer.disabled == ["Memory"]
        put(writer, range(5, 8))
    assert steps_in(tmp_path / "run.jsonl") == list(range(8))
    named = [record.getMessage() for record in caplog.records if "is disabled" in record.getMessage()]
    assert named == [f"Memory is disabled, the other sinks go on ({type(error).__name__}: {error})"]
    assert "Memory: 7 steps came after it was disabled" in caplog.text
    assert bad.calls == ["close"]


def test_jsonl_is_tried_again_after_an_error_of_the_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sink = JsonlSink(tmp_path / "run.jsonl")
    file, fails = sink._file, [True]

    class Flaky:
        def write(self, data: Any) -> int:
            if fails[0]:
                raise OSError(28, "No space left on device")
            return file.write(data)

        def close(self) -> None:
            file.close()

    sink._file = Flaky()
    with BackgroundWriter([sink]) as writer:
        put(writer, range(3))
        assert writer.flush(LONG)
        put(writer, range(3, 6))
        assert writer.flush(LONG)
        assert (tmp_path / "run.jsonl").read_text() == ""
        fails[0] = False
        assert writer.flush(LONG)
        assert steps_in(sink.path) == list(range(6))
        assert writer.disabled == []
    assert caplog.text.count("JsonlSink keeps its rows and tries again") == 1


def test_rows_that_cannot_be_made_cost_their_step_only(caplog: pytest.LogCaptureFixture) -> None:
    sink = Memory()

    def fail() -> list[Row]:
        raise RuntimeError("CUDA error")

    with BackgroundWriter([sink]) as writer:
        writer.put(fail)
        writer.put(fail)
        put(writer, range(2))
    assert sink.steps == [0, 1]
    assert caplog.text.count("could not be made (RuntimeError: CUDA error)") == 1
    assert "the rows of 2 steps could not be made" in caplog.text


def test_an_exception_in_the_block_flushes(tmp_path: Path) -> None:
    sinks: list[Any] = [JsonlSink(tmp_path / "run.jsonl")]
    with contextlib.suppress(ImportError):
        sinks.append(ParquetSink(tmp_path / "run.parquet"))

    def train() -> None:
        with BackgroundWriter(sinks) as writer:
            put(writer, range(10))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    assert steps_in(tmp_path / "run.jsonl") == list(range(10))
    if len(sinks) == 2:
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(tmp_path / "run.parquet")
        assert table["step"].to_pylist() == list(range(10))


def test_rows_reach_the_file_without_a_flush_when_steps_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "_SECONDS_BETWEEN_FLUSHES", 0.01)
    flushed = threading.Event()

    class Noting(Memory):
        def flush(self) -> None:
            if self.rows:
                flushed.set()

    with BackgroundWriter([Noting()]) as writer:
        put(writer, range(1))
        assert flushed.wait(LONG)


def test_close_gives_up_on_a_stuck_sink_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    stuck, other = Stuck(held=True), Memory()
    writer = BackgroundWriter([stuck, other])
    put(writer, range(3))
    assert stuck.entered.wait(LONG)
    assert not writer.flush(0.01)
    writer.close(timeout=0.01)
    assert "Stuck was still busy 0.01 s after the end" in caplog.text
    writer._sinks[1].thread.join(LONG)
    assert (other.steps, other.calls[-1]) == ([0, 1, 2], "close")
    put(writer, range(1))
    assert writer.dropped_by == {"rows": 1}
    assert not writer.flush()
    writer.close()
    stuck.gate.set()


def test_a_sink_may_flush_and_close_its_own_writer() -> None:
    results: list[bool] = []

    class Closing(Memory):
        def write(self, rows: Sequence[Row], /) -> None:
            results.append(writer.flush())
            writer.close()

    sink = Closing()
    writer = BackgroundWriter([sink])
    put(writer, range(1))
    for lane in writer._lanes:
        lane.thread.join(LONG)
        assert not lane.thread.is_alive()
    writer.close()
    assert results == [False]
    assert sink.calls[-1] == "close"


def test_a_fork_has_no_part_in_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "run.jsonl"
    sink = JsonlSink(path)
    with BackgroundWriter([sink, Memory()]) as writer:
        put(writer, range(3))
        # The child finds this lock taken for ever.
        with writer._lock:
            child = os.fork()
            if child == 0:
                signal.alarm(int(LONG))
                caplog.clear()
                put(writer, range(50, 60))
                writer.flush()
                writer.close()
                warned = [r for r in caplog.records if "a forked process writes no rows" in r.getMessage()]
                os._exit(0 if len(warned) == 1 and writer.dropped == 0 else 1)
        assert os.waitpid(child, 0)[1] == 0
        put(writer, range(3, 6))
    assert steps_in(path) == list(range(6))


@pytest.mark.parametrize("fails", [False, True])
def test_a_wait_for_the_device_leaves_captures_of_other_threads_alone(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    mode = 0  # global, where every thread begins

    def exchange(new: int) -> int:
        nonlocal mode
        calls.append(new)
        before, mode = mode, new
        return before

    class Event:
        def synchronize(self) -> None:
            calls.append("wait")
            assert mode == clock.THREAD_LOCAL_CAPTURES
            if fails:
                raise RuntimeError("CUDA error")

    monkeypatch.setattr(_native, "CUDA_LIBRARY_PATH", Path("_cuda.so"))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.ops.bsgap, "_cuda_exchange_capture_mode", exchange, raising=False)
    question = Question(0.0, 1e-2, False, False, ("near_rank",))
    read = reading.Reading(3, "train", [], [], [], question)
    assert read.records() == {}
    assert calls == []  # nothing to wait for
    read = reading.Reading(3, "train", [], [], [], question)
    read._events = [Event(), Event()]  # type: ignore[list-item]
    with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
        read.records()
    assert calls == ([1, "wait", 0] if fails else [1, "wait", "wait", 0])
    assert mode == 0


def test_capacity_is_checked() -> None:
    with pytest.raises(ValueError, match="capacity: got 0, expected at least 1"):
        BackgroundWriter([], capacity=0)


PROGRAM = """
    import os, signal, sys
    from bsgap_kernels.tracking.background import BackgroundWriter
    from bsgap_kernels.tracking.rows import Row
    from bsgap_kernels.tracking.sinks import open_sinks

    def main():
        writer = BackgroundWriter(open_sinks(sys.argv[2:]), capacity=1000)
        for step in range(500):
            writer.put(lambda step=step: [Row(step, f"relu{i}#0", "batch.ratio", 0.1) for i in range(20)])
        how = sys.argv[1]
        if how == "error":
            raise ValueError("an error of the training")
        if how == "fork":
            if os.fork() == 0:
                return          # through the interpreter's exit, with the writer's handler
            os.wait()
        if how == "kill":
            writer.flush()
            writer.put(lambda: [Row(500, "relu1#0", "batch.ratio", 0.1)])
            os.kill(os.getpid(), signal.SIGKILL)

    main()
"""


@pytest.mark.parametrize(("how", "status"), [("error", 1), ("fork", 0), ("kill", -signal.SIGKILL)])
def test_what_was_put_is_written_however_the_process_ends(how: str, status: int, tmp_path: Path) -> None:
    targets = [tmp_path / "run.jsonl"]
    try:
        import pyarrow.parquet

        targets.append(tmp_path / "run.parquet")
    except ImportError:
        pass
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), how, *targets],
        capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert ("an error of the training" in done.stderr) == (how == "error")
    found = steps_in(targets[0])
    assert found[:10_000] == [step for step in range(500) for _ in range(20)]
    # The one row after the last flush may be lost by a kill, and no other.
    assert len(found) <= (10_001 if how == "kill" else 10_000)
    if how != "kill" and len(targets) == 2:
        assert pyarrow.parquet.read_table(targets[1]).num_rows == 10_000
