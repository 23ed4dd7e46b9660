"""TensorBoard event files."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import filterfalse, groupby
from operator import attrgetter
from pathlib import Path

from bsgap_kernels.tracking.rows import Row, check_attempt, is_header
from bsgap_kernels.tracking.sinks._optional import require


def tag_of(row: Row) -> str:
    """The name of a row's series: metric/site, or the metric alone of a value of the whole run."""
    return f"{row.metric}/{row.site}" if row.site else row.metric


class TensorBoardSink:
    """Write rows as scalars `metric/site` to event files in `directory`/`run`.

    All values of a step are one event. TensorBoard keeps float32. A later attempt tells TensorBoard to drop
    what an earlier one wrote at steps >= first_step (None: the step of the first row written).

    Args:
        directory: what `tensorboard --logdir` is given.
        run: name of the run, the folder under it.
        attempt: 0, and one more each time the run is resumed.
        first_step: the first step that a resumed run does again.

    Raises:
        ImportError: tensorboard is not installed.
        ValueError: a negative attempt or first_step.
    """

    def __init__(
        self, directory: str | Path, run: str = "run", *, attempt: int = 0, first_step: int | None = None
    ) -> None:
        name = type(self).__name__
        # First: without it torch.utils.tensorboard says less.
        require("tensorboard", name, "tensorboard")
        writer = require("torch.utils.tensorboard", name, "tensorboard")
        self._summary = require("tensorboard.compat.proto.summary_pb2", name, "tensorboard").Summary
        self._event = require("tensorboard.compat.proto.event_pb2", name, "tensorboard")
        check_attempt(attempt, first_step)
        # TensorBoard writes to gs:// and the like by itself.
        remote = "://" in str(directory)
        folder = f"{str(directory).rstrip('/')}/{run}" if remote else str(Path(directory).expanduser() / run)
        self._writer = writer.FileWriter(folder)
        self._closed = False
        self._resumed = attempt == 0
        if first_step is not None and not self._resumed:
            self._resume(first_step)

    def write(self, rows: Sequence[Row], /) -> None:
        """Write rows, those of one step as one event."""
        if rows and not self._resumed:
            self._resume(rows[0].step)
        value = self._summary.Value
        for step, group in groupby(filterfalse(is_header, rows), attrgetter("step")):
            values = [value(tag=tag_of(row), simple_value=row.value) for row in group]
            self._writer.add_summary(self._summary(value=values), step)

    def flush(self) -> None:
        """Write what TensorBoard's own queue holds."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        if not self._closed:
            self._closed = True
            self._writer.close()

    def _resume(self, first_step: int) -> None:
        self._resumed = True
        # How TensorBoard marks a restart: readers forget what came before at later steps.
        self._writer.add_event(self._event.Event(file_version="brain.Event:2"), first_step)
        session = self._event.SessionLog(status=self._event.SessionLog.START)
        self._writer.add_event(self._event.Event(session_log=session), first_step)
