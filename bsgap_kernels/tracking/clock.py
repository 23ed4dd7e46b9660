"""Step time and tracking overhead."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from bsgap_kernels import _native

Span = tuple[torch.cuda.Event, torch.cuda.Event]
Beginning = tuple[float, "torch.cuda.Event | None"]

THREAD_LOCAL_CAPTURES = 1
"""cudaStreamCaptureModeThreadLocal: a thread's calls are refused during captures of its own only."""


@contextmanager
def beside_captures() -> Iterator[None]:
    """Let this thread wait for events, or ask, while another one captures a CUDA graph in global mode.

    Such a capture is broken by a wait on any thread that does not say so. The CUDA library can say it.
    """
    if _native.CUDA_LIBRARY_PATH is None or not torch.cuda.is_initialized():
        yield
        return
    before = torch.ops.bsgap._cuda_exchange_capture_mode(THREAD_LOCAL_CAPTURES)
    try:
        yield
    finally:
        torch.ops.bsgap._cuda_exchange_capture_mode(before)


@dataclass
class _Step:
    seconds: float
    own: float
    spans: list[Span] = field(default_factory=list)


class StepClock:
    """Times of tracked steps from one `end_step` to the next, without waiting for a device.

    Tracking's own time is what the host spends in it or, if that is more, what the device does between
    pairs of events on its stream; events are asked, never waited for, so a step is known some steps later.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._own = 0.0
        self._late = _Step(0.0, 0.0)
        self._tracked = False
        self._spans: list[Span] = []
        self._last: float | None = None
        self._steps: deque[_Step] = deque(maxlen=256)
        self.latest = (0.0, 0.0)
        """Seconds of the last step that is known, and tracking's share."""

    def begin(self) -> Beginning:
        """Tracking's own time begins; it may not begin again before it ends."""
        if self.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return time.perf_counter(), event
        return time.perf_counter(), None

    def end(self, beginning: Beginning) -> None:
        """Tracking's own time ends."""
        started, event = beginning
        if event is not None:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._spans.append((event, end))
        self._own += time.perf_counter() - started

    def end_step(self, *, tracked: bool) -> None:
        """A training step ends here; the first one has no beginning and is not known."""
        now = time.perf_counter()
        if tracked:
            if self._last is not None:
                seconds = now - self._last + self._late.own
                spans = self._late.spans + self._spans
                self._steps.append(_Step(seconds, self._late.own + self._own, spans))
            self._late = _Step(0.0, 0.0)
        elif self._tracked:
            # The numbers of all ranks arrive a step later: that time belongs to tracking, and is counted with
            # the next tracked step.
            self._late = _Step(0.0, self._own, self._spans)
        self._tracked = tracked
        self._last, self._own, self._spans = now, 0.0, []

    def finished(self) -> list[tuple[float, float]]:
        """(step, own) seconds of tracked steps that have become known since the last call."""
        known: list[tuple[float, float]] = []
        if not self._steps:
            return known
        with beside_captures():
            while self._steps and all(end.query() for _, end in self._steps[0].spans):
                step = self._steps.popleft()
                device = sum(start.elapsed_time(end) for start, end in step.spans) / 1e3
                self.latest = (step.seconds, max(step.own, device))
                known.append(self.latest)
        return known
