"""What is being timed, on standard error."""

from __future__ import annotations

import sys


class Progress:
    """One line that is overwritten on a terminal, one line a case elsewhere."""

    def __init__(self, title: str) -> None:
        self._title, self._live, self._width = title, sys.stderr.isatty(), 0
        if not self._live:
            print(title, file=sys.stderr, flush=True)

    def __call__(self, text: str) -> None:
        """Says what goes on."""
        if self._live:
            line = f"{self._title}: {text}"
            print("\r" + line.ljust(self._width), end="", file=sys.stderr, flush=True)
            self._width = len(line)

    def done(self) -> None:
        """Clears the line."""
        if self._live:
            print("\r" + " " * self._width + "\r", end="", file=sys.stderr, flush=True)
