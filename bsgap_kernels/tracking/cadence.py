"""How often a tracker reads: every so many steps, or as often as an overhead budget allows."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median

_STEADY = 5
"""Tracked steps that are looked at before the cadence is set, and the fewest between two settings."""
_WINDOW = 32


class Cadence:
    """Which steps are tracked.

    With a budget the interval is the smallest at which tracking takes no more than `max_overhead` of the time
    of an untracked step. It is set from medians over the last tracked steps, and again when it would
    change by more than a quarter. Nothing but the interval changes. `log` holds (step, every) from which
    step on which interval holds, and given back as `replay` gives the same steps again.
    """

    def __init__(
        self,
        every: int = 1,
        max_overhead: float | None = None,
        replay: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        self.every = every
        self.max_overhead = max_overhead
        self.log: list[tuple[int, int]] = [(0, every)]
        # Two settings of one step stay in their order: the later one holds.
        self._replay = sorted(replay or (), key=lambda setting: setting[0])
        self._replaying = bool(replay)
        self._next = 0
        self._own: deque[float] = deque(maxlen=_WINDOW)
        self._step: deque[float] = deque(maxlen=_WINDOW)
        self._since = 0
        if self._replay:
            self.log = []

    def due(self, step: int) -> bool:
        """Whether this step is tracked; called once a step, in order."""
        while self._replay and self._replay[0][0] <= step:
            first, every = self._replay.pop(0)
            self._set(first, every)
        if step < self._next:
            return False
        self._next = step + self.every
        return True

    def observe(self, step: int, step_seconds: float, own_seconds: float) -> None:
        """Times of one tracked step, its own share included; the same numbers on every rank."""
        if self.max_overhead is None or self._replaying:
            return
        self._own.append(own_seconds)
        self._step.append(max(step_seconds - own_seconds, 1e-9))
        self._since += 1
        if self._since < _STEADY:
            return
        wanted = max(1, math.ceil(median(self._own) / (self.max_overhead * median(self._step))))
        if not 0.8 * self.every <= wanted <= 1.25 * self.every:
            self._set(step + 1, wanted)
            self._since = 0

    def _set(self, first: int, every: int) -> None:
        """From step `first` on; the last tracked step was the one before it."""
        self.every = every
        self.log.append((first, every))
        self._next = first - 1 + every if first > 0 else 0

    def state_dict(self) -> dict[str, object]:
        """What a resumed run needs to track the same steps."""
        return {"every": self.every, "next": self._next, "log": list(self.log)}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on as the run that saved the state."""
        self.every = int(state["every"])  # type: ignore[call-overload]
        self._next = int(state["next"])  # type: ignore[call-overload]
        self.log = [(int(step), int(every)) for step, every in state["log"]]  # type: ignore[attr-defined]
