"""What a table of targets is made of: values of a result, and rows that compare one with its limit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Record = dict[str, Any]


def at_most(about: str, value: float | None, limit: float | None, unit: str) -> Record:
    """A target from above; `met` is None where nothing was measured."""
    met = None if value is None or limit is None else value <= limit
    return {"target": about, "value": value, "limit": limit, "unit": f"at most, {unit}", "met": met}


def at_least(about: str, value: float | None, limit: float, unit: str = "times") -> Record:
    """A target from below; `met` is None where nothing was measured."""
    met = None if value is None else value >= limit
    return {"target": about, "value": value, "limit": limit, "unit": f"at least, {unit}", "met": met}


def row_of(rows: Iterable[Record], **wanted: object) -> Record:
    """The first row with these fields, or an empty one."""
    return next((row for row in rows if all(row.get(k) == v for k, v in wanted.items())), {})


def right_median(row: Record) -> float | None:
    """Median of a row whose counts are right: a wrong count has no time."""
    wrong = row.get("check", row).get("wrong", 1)
    return None if "median_ms" not in row or wrong else float(row["median_ms"])


def over(other: float | None, own: float | None) -> float | None:
    """How many times as long the other one takes."""
    return None if other is None or own is None or own <= 0 else round(other / own, 3)
