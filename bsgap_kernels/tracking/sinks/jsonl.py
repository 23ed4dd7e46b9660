"""JSON lines: the truth, which every other sink is a copy of."""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from io import FileIO
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from bsgap_kernels.tracking.rows import LineFormatter, Row, check_attempt
from bsgap_kernels.tracking.sinks._files import local_path, lock

_LOG = logging.getLogger(__name__)
_CADENCE = re.compile(rb'"metric": "cadence\.every", "value": (\d+)')
ROWS_CUT = "resume.rows_cut"
# A killed run loses no more than this; at full batch a step may take seconds.
_SECONDS_BETWEEN_FLUSHES = 2.0
# What is held while the file cannot be written to (a full disk) before rows are given up.
_MAX_PENDING_BYTES = 64 * 2**20
_Self = TypeVar("_Self", bound="JsonlSink")


class JsonlSink:
    """Append rows to a .jsonl file, one JSON object a line (`LineFormatter`).

    Rows are buffered, and written every `buffer_rows` or two seconds, on `flush`, and when the block is left,
    also by an exception. Whole lines go to the system at once: what has been written survives the process.

    Attempt 0 starts the file and refuses one that holds something. A later attempt appends, after taking out
    the rows of this run at steps >= first_step, which it is about to write again, and a last line that a kill
    left torn. All other lines, other runs' too, stay byte for byte; the file is replaced whole or not at all.
    How many rows went is written as a row of its own, `resume.rows_cut`. Earlier steps without rows,
    where most are closer together, are named in a warning. first_step None stands for the step
    of the first row written. The rule loses nothing if the rows before the checkpoint were flushed when it
    was made.

    Args:
        path: the file.
        run: name of the run, in every row.
        attempt: 0, and one more each time the run is resumed.
        first_step: the first step that a resumed run does again.
        buffer_rows: rows held at most.

    Raises:
        FileExistsError: attempt 0, and the file holds something.
        ValueError: a negative attempt or first_step, or a URI for a path.
        BlockingIOError: another sink, of any process, has the file open.
        OSError: the file cannot be opened or written. After an OSError of `write` or `flush` no row is lost:
            what was not written is tried again at the next call, up to 64 MiB; `lost` counts rows beyond.
    """

    retries = True

    def __init__(
        self,
        path: str | Path,
        run: str = "run",
        *,
        attempt: int = 0,
        first_step: int | None = None,
        buffer_rows: int = 4096,
    ) -> None:
        check_attempt(attempt, first_step)
        self.path = local_path(path)
        self.run = run
        self.attempt = attempt
        self.lost = 0
        self._line = LineFormatter(run, attempt).line
        self._lines: list[str] = []
        self._pending = bytearray()
        self._buffer_rows = buffer_rows
        self._first_step = first_step
        self._closed = False
        refuse_existing(self.path, attempt)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: a buffer of Python's would be written a second time by a process forked meanwhile.
        self._file = self._open()
        self._resumed = attempt == 0
        if first_step is not None:
            self._resume(first_step)
        self._flushed = time.monotonic()

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, step: int, site: str, metric: str, value: float, note: str = "") -> None:
        """Add one value to the buffer; a non-finite one becomes null."""
        if not self._resumed:
            self._resume(step)
        self._lines.append(self._line(step, site, metric, value, note))

    def write(self, rows: Sequence[Row], /) -> None:
        """Add rows, and write what is buffered when it is much or old."""
        if len(self._pending) > _MAX_PENDING_BYTES:
            self.lost += len(rows)
        else:
            for row in rows:
                self.add(*row)
        self.flush_if_due()

    def flush_if_due(self) -> None:
        """Write what is buffered if it is `buffer_rows` rows or the last time is two seconds ago."""
        due = time.monotonic() - self._flushed > _SECONDS_BETWEEN_FLUSHES
        if due or len(self._lines) >= self._buffer_rows:
            self.flush()

    def flush(self) -> None:
        """Write what is buffered."""
        self._flushed = time.monotonic()
        if self._lines:
            self._pending += "".join(self._lines).encode()
            self._lines.clear()
        while self._pending:
            # A disk that fills up takes a part and raises at the next call: the rest stays.
            try:
                del self._pending[: self._file.write(self._pending) or 0]
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from error

    def close(self) -> None:
        """Write what is buffered and close the file."""
        if self._closed:
            return
        try:
            self.flush()
        finally:
            self._closed = True
            self._file.close()

    def _open(self) -> FileIO:
        file = self.path.open("ab", buffering=0)
        try:
            lock(file, self.path)
        except BlockingIOError:
            file.close()
            raise
        return file

    def _resume(self, first_step: int) -> None:
        self._resumed = True
        if self.attempt == 0:
            return
        self._file.close()
        cut = cut_back(self.path, self.run, first_step)
        self._file = self._open()
        if cut:
            self._lines.append(self._line(first_step, "", ROWS_CUT, cut))


def refuse_existing(path: Path, attempt: int) -> None:
    """Raise a FileExistsError where a first attempt would write to a file that holds something."""
    if attempt == 0 and path.exists() and path.stat().st_size > 0:
        raise FileExistsError(
            f"path: {path} already holds rows; name another file, or give attempt=1 and up to resume its run"
        )


def cut_back(path: Path, run: str, first_step: int) -> int:
    """Take the rows of `run` at steps >= first_step and a torn last line out of a file; return how many.

    Rows of earlier steps that are missing are named in a warning: steps further apart than most are.
    Reads the whole file once. Lines of another form than `LineFormatter` gives are kept.
    """
    head = re.escape(f'{{"run": {json.dumps(run)}, "attempt": '.encode())
    step_of = re.compile(head + rb'\d+, "step": (\d+), ').match
    path = path.resolve()
    kept = path.with_name(path.name + ".resume")
    cut, steps, cadences = 0, set(), [1]
    with path.open("rb") as source, kept.open("wb") as target:
        for line in source:
            match = step_of(line)
            if not line.endswith(b"\n") or (match is not None and int(match[1]) >= first_step):
                cut += 1
            else:
                if match is not None:
                    steps.add(int(match[1]))
                    if cadence := _CADENCE.search(line):
                        cadences.append(int(cadence[1]))
                target.write(line)
    if cut:
        shutil.copymode(path, kept)
        kept.replace(path)
    else:
        kept.unlink()
    if missing := _missing(sorted(steps), first_step, max(cadences)):
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more ranges" if missing[3:] else "")
        _LOG.warning("%s: rows of run %s are missing before step %d: steps %s", path, run, first_step, shown)
    return cut


def _missing(steps: list[int], first_step: int, cadence: int) -> list[str]:
    """Ranges of steps without rows that are longer than the run's usual interval, or its `cadence`."""
    intervals = Counter(after - before for before, after in pairwise(steps))
    if not intervals:
        return []
    most = max(intervals.values())
    usual = max(cadence, *(interval for interval, times in intervals.items() if times == most))
    gaps = [(before, after) for before, after in pairwise([*steps, first_step]) if after - before > usual]
    return [f"{before + 1} to {after - 1}" for before, after in gaps]
