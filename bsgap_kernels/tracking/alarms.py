"""Alarms: a metric that falls under a bound, and values that stop being finite."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import filterfalse
from typing import NamedTuple

from bsgap_kernels.tracking.rows import Row, is_header

_LOG = logging.getLogger(__name__)
# Has no value with fewer than three eigenvalues to fit, whatever the activation.
_MAY_BE_UNDEFINED = ("alpha_req",)
# Counts tell of a non-finite activation by -1.
_COUNTS = ("near_rank", "centred_near_rank", "dormant_units")


class AlarmEvent(NamedTuple):
    """What went off: which value, where and when. below is None for a value that is not finite."""

    step: int
    site: str
    metric: str
    value: float
    rank: int
    below: float | None

    def __str__(self) -> str:
        """One line that names layer, step and rank."""
        what = "is not finite" if self.below is None else f"fell below {self.below:g}"
        where = f"layer {self.site}" if self.site else "the run"
        return f"{where}, step {self.step}, rank {self.rank}: {self.metric} = {self.value:g} {what}"


@dataclass(frozen=True)
class Alarm:
    """Go off when a metric falls below a bound.

    It goes off at the step that crosses the bound, and again only after the value was back at the bound or
    above.

    Args:
        site: glob pattern over site names.
        metric: glob pattern over metrics with their view, such as "batch.ratio".
        below: the bound.
        action: called with an `AlarmEvent`, on a background thread some steps later; it stops a training by
            setting a flag that the loop reads. None logs a warning. It is also called when a matching site's
            values stop being finite, with `below` None in the event.

    Raises:
        TypeError, ValueError: action cannot be called, or below is not finite.
    """

    site: str = "*"
    metric: str = "batch.ratio"
    below: float = 0.05
    action: Callable[[AlarmEvent], object] | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.below):
            raise ValueError(f"below: got {self.below!r}, expected a finite number")
        if self.action is not None and not callable(self.action):
            raise TypeError(f"action: got {type(self.action).__name__}, expected a callable or None")


class AlarmSink:
    """A sink that looks at rows and sets off alarms; it keeps nothing but what is beyond a bound now.

    Values that stop being finite are always reported: by a log line when the first value of a site (in one
    view) becomes non-finite, and again after all of them have been finite. A count of -1 is such a value.

    Args:
        alarms: the alarms; none still reports non-finite values.
        rank: of this process, for the events.
    """

    def __init__(self, alarms: Sequence[Alarm] = (), *, rank: int = 0) -> None:
        self._alarms = tuple(alarms)
        self._rank = rank
        self._matching: dict[tuple[str, str], list[int]] = {}
        self._low: set[tuple[int, str, str]] = set()
        self._not_finite: dict[tuple[str, str], set[str]] = {}

    def write(self, rows: Sequence[Row], /) -> None:
        """Look at rows."""
        for row in filterfalse(is_header, rows):
            if self._is_finite(row):
                self._look_at_bounds(row)

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def _is_finite(self, row: Row) -> bool:
        view, _, name = row.metric.partition("@")[0].rpartition(".")
        finite = math.isfinite(row.value) and not (row.value < 0 and name in _COUNTS)
        if finite:
            # Almost always: nothing is kept for a site that never fails.
            bad = self._not_finite.get((row.site, view))
            if bad:
                bad.discard(row.metric)
        elif name not in _MAY_BE_UNDEFINED:
            bad = self._not_finite.setdefault((row.site, view), set())
            first = not bad
            bad.add(row.metric)
            if first:
                event = AlarmEvent(row.step, row.site, row.metric, row.value, self._rank, None)
                _LOG.warning("%s", event)
                for alarm in self._alarms:
                    if alarm.action is not None and fnmatchcase(row.site, alarm.site):
                        self._act(alarm, event)
        return finite

    def _look_at_bounds(self, row: Row) -> None:
        key = (row.site, row.metric)
        alarms = self._matching.get(key)
        if alarms is None:
            alarms = self._matching[key] = [
                number
                for number, alarm in enumerate(self._alarms)
                if fnmatchcase(row.site, alarm.site) and fnmatchcase(row.metric, alarm.metric)
            ]
        for number in alarms:
            alarm = self._alarms[number]
            state = (number, row.site, row.metric)
            if row.value >= alarm.below:
                self._low.discard(state)
            elif state not in self._low:
                self._low.add(state)
                self._act(
                    alarm, AlarmEvent(row.step, row.site, row.metric, row.value, self._rank, alarm.below)
                )

    def _act(self, alarm: Alarm, event: AlarmEvent) -> None:
        if alarm.action is None:
            _LOG.warning("%s", event)
            return
        try:
            alarm.action(event)
        except BaseException:
            # SystemExit too: on this thread it would end the alarms, not the training.
            _LOG.warning("the action of an alarm raised, for %s", event, exc_info=True)
