"""What an option may hold, each check with the sentence that says what came and what is expected."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterable
from typing import Any


class UserError(ValueError):
    """A mistake of the user that one sentence explains; the command line prints it without a traceback."""


_MOST_LETTERS = 1000


def one_sentence(message: str) -> str:
    """A message on one line; of a long one, which quotes what came, the beginning and the end."""
    text = " ".join(message.split())
    if len(text) <= _MOST_LETTERS:
        return text
    half = _MOST_LETTERS // 2
    return f"{text[:half]} … {text[-half:]}"


def items(value: Any) -> Iterable[Any]:
    """The parts of a comma-separated text, of a list, or the value alone."""
    if isinstance(value, str):
        return [item for item in value.strip("[] ").split(",") if item.strip()]
    return value if isinstance(value, (list, tuple)) else [value]


def one_of(option: str, value: Any, allowed: Collection[str]) -> None:
    """Raise a UserError unless `value` is among `allowed`."""
    if value not in allowed:
        raise UserError(f"{option}: got {value!r}, expected one of {', '.join(allowed)}")


def integer(option: str, value: Any, minimum: int = 1, maximum: int | None = None) -> None:
    """Raise a UserError unless `value` is an integer of at least `minimum` and at most `maximum`."""
    valid = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
    if not valid or (maximum is not None and value > maximum):
        bound = "" if maximum is None else f" and at most {maximum}"
        raise UserError(f"{option}: got {value!r}, expected an integer of at least {minimum}{bound}")


def number(
    option: str, value: Any, minimum: float, below: float = math.inf, maximum: float = math.inf
) -> None:
    """Raise a UserError unless `value` is a finite number in [minimum, below) and at most `maximum`."""
    valid = isinstance(value, (int, float)) and not isinstance(value, bool) and minimum <= value < below
    valid = valid and abs(value) <= sys.float_info.max
    if not valid or value > maximum:
        bound = f" and below {below:g}" if math.isfinite(below) else ""
        bound += f" and at most {maximum:g}" if math.isfinite(maximum) else ""
        raise UserError(f"{option}: got {value!r}, expected a finite number of at least {minimum:g}{bound}")


def positive(option: str, value: Any) -> None:
    """Raise a UserError unless `value` is a finite number above 0."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value == 0:
        raise UserError(f"{option}: got {value!r}, expected a positive number")
    number(option, value, minimum=0.0)


def switch(option: str, value: Any) -> None:
    """Raise a UserError unless `value` is true or false."""
    if not isinstance(value, bool):
        raise UserError(f"{option}: got {value!r}, expected true or false")
