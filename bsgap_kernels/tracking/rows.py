"""Rows, the unit of everything that is recorded, and what a sink of rows is."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable


class Row(NamedTuple):
    """One value of one site at one step.

    metric carries its view, such as "batch.near_rank" or "probe.ratio". site is "" for a value of the whole
    run, such as a loss. note tells how the value was had where that was not by the whole activation, such as
    "rows 1/4" or a sketch. The first row of a site and view is its header: metric "batch.header", value 1,
    and for a note one JSON object of the facts that its numbers depend on.
    """

    step: int
    site: str
    metric: str
    value: float
    note: str = ""


HEADER = "header"
OVERHEAD = "tracking.overhead"
"""Seconds spent on tracking in a step, as a share of the rest of the step."""


def is_header(row: Row) -> bool:
    """Return true for a row that describes a site and is no number of it."""
    return row.metric.endswith(f".{HEADER}")


@runtime_checkable
class Sink(Protocol):
    """Where rows go. A sink is used by one thread at a time, which need not be the one that made it.

    An exception of `write` or `flush` disables the sink (`BackgroundWriter`), unless it is an OSError and the
    sink has an attribute `retries` that is true: such a sink keeps its rows and is called again.
    """

    def write(self, rows: Sequence[Row], /) -> None:
        """Take rows; they may stay in a buffer."""

    def flush(self) -> None:
        """Bring what is buffered to where it outlives the process, as far as the format allows."""

    def close(self) -> None:
        """Flush and end; a second call does nothing."""


class LineFormatter:
    """JSON lines of the rows of one attempt of one run.

    A line is {"run", "attempt", "step", "site", "metric", "value"[, "note"]}; a non-finite value is null.
    It is put together by hand, because a step has hundreds and `json.dumps` takes several times as long
    (`line_us` in benchmarks/results/tracking_memory.json).
    """

    def __init__(self, run: str, attempt: int) -> None:
        self._head = f'{{"run": {json.dumps(run)}, "attempt": {attempt}, "step": '
        self._tails: dict[tuple[str, str], str] = {}

    def line(self, step: int, site: str, metric: str, value: float, note: str = "") -> str:
        """The line of one value, with its newline."""
        tail = self._tails.get((site, metric))
        if tail is None:
            tail = f', "site": {json.dumps(site)}, "metric": {json.dumps(metric)}, "value": '
            self._tails[site, metric] = tail
        if value.__class__ is not float and value.__class__ is not int:
            # The repr of a bool or of a NumPy scalar is no JSON.
            value = float(value)
        text = repr(value) if math.isfinite(value) else "null"
        if note:
            text = f'{text}, "note": {json.dumps(note)}'
        return f"{self._head}{step}{tail}{text}}}\n"


def check_attempt(attempt: int, first_step: int | None) -> None:
    """Raise a ValueError where `attempt` or `first_step` is negative."""
    if attempt < 0:
        raise ValueError(f"attempt: got {attempt!r}, expected 0, or 1 and up for a resumed run")
    if first_step is not None and first_step < 0:
        raise ValueError(f"first_step: got {first_step!r}, expected a step of at least 0, or None")
