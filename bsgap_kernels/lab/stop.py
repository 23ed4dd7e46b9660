"""Signals that ask a run to stop: it ends its step, saves a checkpoint and exits."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StoppedError(Exception):
    """Work was left half done because a process was asked to stop."""


class Stop:
    """Whether a run was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def ask(self, number: int) -> None:
        """Ask to stop as by this signal."""
        self.signal = signal.Signals(number)

    def check(self) -> None:
        """Leave what is under way if asked to stop.

        Raises:
            StoppedError: it was.
        """
        if self:
            raise StoppedError

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as a shell gives for a process that it ended; 0 if there was none."""
        return 0 if self.signal is None else 128 + int(self.signal)


NEVER = Stop()


@contextmanager
def on_signals() -> Iterator[Stop]:
    """Inside the block SIGTERM and the first SIGINT (Ctrl-C) only ask to stop; a second SIGINT interrupts.

    Handlers are put back at the end. Only the main thread can set them: elsewhere nothing asks to stop.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.ask(number)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
