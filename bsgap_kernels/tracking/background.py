"""Hands rows to sinks in the background, so that a training step waits for none of them."""

from __future__ import annotations

import atexit
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from bsgap_kernels.tracking.rows import Row, Sink

_LOG = logging.getLogger(__name__)
_SECONDS_BETWEEN_FLUSHES = 2.0
_SECONDS_BETWEEN_LOOKS = 0.1
_SECONDS_AT_EXIT = 30.0
MakeRows = Callable[[], Sequence[Row]]


class BackgroundWriter:
    """Make rows and write them to sinks on threads of their own.

        with BackgroundWriter(open_sinks("run.jsonl")) as writer:
            for step in range(steps):
                ...
                writer.put(lambda: rows_of(numbers_on_the_gpu))     # returns at once

    One thread calls what was put, in order, which may wait for a device there, and one thread a sink writes:
    a sink that hangs holds up neither the training nor another sink. The first looks ten times a second,
    since a thread that wakes at every step takes the interpreter from the training for longer than its work
    lasts. `capacity` steps wait for their rows, and twice as many for each sink. A step that finds a queue
    full is dropped for what it leads to, counted, and logged as a warning the first time and at the end.

    A sink that raises is disabled with a warning that names it, and the others go on. One that keeps its rows
    over an OSError (`JsonlSink`) is tried again instead. Sinks are flushed about every two seconds, and when
    the writer is closed: by `close`, by leaving the block, also by an exception, or when the interpreter
    exits. A process that is killed loses those seconds. A forked process has no part in it: there `put`,
    `flush` and `close` do nothing, with one warning.

    Args:
        sinks: the sinks; they are the writer's from now on, which closes them.
        capacity: steps whose rows are still to be made, at most.

    Raises:
        ValueError: capacity is less than 1.
    """

    def __init__(self, sinks: Sequence[Sink], *, capacity: int = 256) -> None:
        if capacity < 1:
            raise ValueError(f"capacity: got {capacity!r}, expected at least 1")
        self._process = os.getpid()
        self._warned_of_fork = False
        self._lock = threading.Lock()
        self._closed = False
        self._reported = False
        # Twice: what waited for a slow device comes to the sinks all at once.
        self._sinks = [_SinkLane(sink, 2 * capacity) for sink in sinks]
        self._source = _SourceLane(self._sinks, capacity)
        self._lanes: list[_Lane] = [self._source, *self._sinks]
        for lane in self._lanes:
            lane.thread.start()
        atexit.register(self._at_exit)

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def dropped(self) -> int:
        """Steps dropped so far, a step that k sinks did not get counting k times."""
        return sum(self.dropped_by.values())

    @property
    def dropped_by(self) -> dict[str, int]:
        """Steps dropped so far by what they did not get to; "rows" stands for before any sink."""
        counts: dict[str, int] = {}
        for lane in self._lanes:
            if lane.dropped:
                counts[lane.name] = counts.get(lane.name, 0) + lane.dropped
        return counts

    @property
    def disabled(self) -> list[str]:
        """Names of the sinks that raised and get no more rows."""
        return [lane.name for lane in self._sinks if lane.disabled]

    def put(self, make_rows: MakeRows) -> None:
        """Have `make_rows` called and its rows written, later, on another thread. Never blocks or raises."""
        if os.getpid() != self._process and self._is_forked():
            return
        if self._closed:
            self._source.drop("it is closed")
        else:
            self._source.offer(make_rows)

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all that was put has been written and the sinks are flushed.

        Returns whether that was so within `timeout` seconds. Called on a thread of the writer (an alarm's
        action) it waits for nothing and returns False.
        """
        if self._is_forked() or self._is_own_thread():
            return False
        ticket = _Ticket(len(self._lanes))
        with self._lock:
            if self._closed:  # nobody would look at it behind the last one
                return False
            self._source.force(ticket)
        return ticket.done.wait(timeout)

    def close(self, timeout: float = 60.0) -> None:
        """Write all that was put, close the sinks and end the threads, within `timeout` seconds.

        What takes longer is left to itself with a warning. A second call does nothing.
        """
        if self._is_forked() or self._reported:
            return
        with self._lock:
            if not self._closed:
                self._closed = True
                self._source.force(_Ticket(len(self._lanes), last=True))
        if self._is_own_thread():
            return
        deadline = time.monotonic() + timeout
        for lane in self._lanes:
            lane.thread.join(max(0.0, deadline - time.monotonic()))
        atexit.unregister(self._at_exit)
        self._report(timeout)

    def _at_exit(self) -> None:
        self.close(_SECONDS_AT_EXIT)

    def _report(self, timeout: float) -> None:
        with self._lock:
            if self._reported:
                return
            self._reported = True
        for lane in self._lanes:
            if lane.thread.is_alive():
                _LOG.warning(
                    "%s was still busy %g s after the end: up to %d steps did not get there",
                    lane.name, timeout, max(1, lane.waiting),
                )  # fmt: skip
            lane.report()

    def _is_own_thread(self) -> bool:
        return any(lane.thread is threading.current_thread() for lane in self._lanes)

    def _is_forked(self) -> bool:
        # Before any lock: the fork may have come while a thread held it.
        if os.getpid() == self._process:
            return False
        if not self._warned_of_fork:
            self._warned_of_fork = True
            _LOG.warning("a forked process writes no rows: make a BackgroundWriter in the process that puts")
        return True


class _Ticket:
    """Passes through the queues behind what was put before; done once every lane has seen it."""

    def __init__(self, lanes: int, *, last: bool = False) -> None:
        self.last = last
        self.done = threading.Event()
        self._left = lanes
        self._lock = threading.Lock()

    def arrive(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left == 0:
                self.done.set()


class _Lane:
    """A queue that never blocks who fills it, and the thread that empties it."""

    def __init__(self, name: str, capacity: int) -> None:
        self.name = name
        self.dropped = 0
        self._capacity = capacity
        # Its put and qsize are single calls into C, with no lock of Python's that a thread could hold.
        self._queue: queue.SimpleQueue[MakeRows | Sequence[Row] | _Ticket] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name=f"bsgap {name}", daemon=True)

    @property
    def waiting(self) -> int:
        return self._queue.qsize()

    def offer(self, item: MakeRows | Sequence[Row]) -> None:
        if self._queue.qsize() >= self._capacity:
            self.drop(f"its queue of {self._capacity} steps is full")
        else:
            self._queue.put(item)

    def force(self, ticket: _Ticket) -> None:
        self._queue.put(ticket)

    def drop(self, reason: str) -> None:
        self.dropped += 1
        if self.dropped == 1:
            _LOG.warning("%s: 1 step is dropped, for %s; the end will tell how many", self.name, reason)

    def report(self) -> None:
        if self.dropped:
            _LOG.warning("%s: %d steps were dropped in all", self.name, self.dropped)

    def _run(self) -> None:
        raise NotImplementedError


class _SourceLane(_Lane):
    """Calls what was put and hands the rows to the lanes of the sinks."""

    def __init__(self, sinks: Sequence[_SinkLane], capacity: int) -> None:
        super().__init__("rows", capacity)
        self._sinks = sinks
        self._failed = 0
        self._hurry = threading.Event()

    def offer(self, item: MakeRows | Sequence[Row]) -> None:
        waiting = self._queue.qsize()
        if waiting >= self._capacity:
            self.drop(f"its queue of {self._capacity} steps is full")
        else:
            self._queue.put(item)
        if 2 * (waiting + 1) >= self._capacity:
            self._hurry.set()

    def force(self, ticket: _Ticket) -> None:
        super().force(ticket)
        self._hurry.set()

    def report(self) -> None:
        super().report()
        if self._failed:
            _LOG.warning("rows: the rows of %d steps could not be made", self._failed)

    def _run(self) -> None:
        while True:
            # Never in `get`: a waiting thread would be woken by each `put`.
            self._hurry.wait(_SECONDS_BETWEEN_LOOKS)
            self._hurry.clear()
            while not self._queue.empty():
                item = self._queue.get()
                if isinstance(item, _Ticket):
                    for sink in self._sinks:
                        sink.force(item)
                    item.arrive()
                    if item.last:
                        return
                else:
                    self._hand_on(item)
                # Else it lives until the next step, and so do the device buffers that it holds.
                del item

    def _hand_on(self, item: MakeRows | Sequence[Row]) -> None:
        try:
            rows = item() if callable(item) else item
        except BaseException as error:
            # SystemExit too: it would end this thread without a word.
            self._failed += 1
            if self._failed == 1:
                _LOG.warning("rows: a step's rows could not be made (%s)", _describe(error))
            return
        if rows:
            for sink in self._sinks:
                sink.offer(rows)


class _SinkLane(_Lane):
    """Writes rows to one sink until it raises."""

    def __init__(self, sink: Sink, capacity: int) -> None:
        super().__init__(type(sink).__name__, capacity)
        self.disabled = False
        self._sink = sink
        self._unflushed = False
        self._flushed = time.monotonic()
        self._unwritten = 0
        self._warned = False

    def offer(self, item: MakeRows | Sequence[Row]) -> None:
        if self.disabled:
            self._unwritten += 1
        else:
            super().offer(item)

    def report(self) -> None:
        super().report()
        if self._unwritten:
            _LOG.warning("%s: %d steps came after it was disabled", self.name, self._unwritten)
        lost = getattr(self._sink, "lost", 0)
        if lost:
            _LOG.warning("%s: %d rows were lost", self.name, lost)

    def _run(self) -> None:
        while True:
            try:
                item = self._queue.get(timeout=_SECONDS_BETWEEN_FLUSHES if self._unflushed else None)
            except queue.Empty:
                self._flush()
                continue
            if isinstance(item, _Ticket):
                self._flush()
                if item.last:
                    self._close()
                item.arrive()
                if item.last:
                    return
            elif not callable(item):
                self._write(item)
            del item

    def _write(self, rows: Sequence[Row]) -> None:
        if self.disabled:
            self._unwritten += 1
            return
        self._unflushed = True
        try:
            self._sink.write(rows)
        except BaseException as error:
            self._fail(error)
        if time.monotonic() - self._flushed > _SECONDS_BETWEEN_FLUSHES:
            self._flush()

    def _flush(self) -> None:
        self._unflushed = False
        self._flushed = time.monotonic()
        if self.disabled:
            return
        try:
            self._sink.flush()
        except BaseException as error:
            self._fail(error)

    def _close(self) -> None:
        # A disabled sink too: what it had before may still be brought to an end, such as Parquet's footer.
        try:
            self._sink.close()
        except BaseException as error:
            _LOG.warning("%s could not be closed (%s)", self.name, _describe(error))

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, OSError) and getattr(self._sink, "retries", False):
            self._unflushed = True
            if not self._warned:
                self._warned = True
                _LOG.warning("%s keeps its rows and tries again (%s)", self.name, _describe(error))
        else:
            self.disabled = True
            _LOG.warning(
                "%s is disabled, the other sinks go on (%s)", self.name, _describe(error), exc_info=error
            )


def _describe(error: BaseException) -> str:
    """An exception in one line: its class and message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
