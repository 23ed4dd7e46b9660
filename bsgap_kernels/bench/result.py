"""Rows of a result, and the file that it is written to."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from .contenders import MATRIX_RANK
from .measure import Samples
from .truth import Verdict


class Named(Protocol):
    """What a row says of whom it is about."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def ours(self) -> bool: ...  # noqa: D102
    @property
    def finest_rtol(self) -> float: ...  # noqa: D102


def contender_row(contender: Named, samples: Samples, verdict: Verdict | None) -> dict[str, Any]:
    """Times and verdict of a contender, or why there are none."""
    row: dict[str, Any] = {"name": contender.name, "ours": contender.ours}
    if contender.finest_rtol:
        row["finest_rtol"] = round(contender.finest_rtol, 9)
    if samples.error is not None or verdict is None or not samples.times_ms:
        return {**row, "error": samples.error or "not timed"}
    return {
        **row,
        **samples.row(),
        "times_ms": [round(t, 5) for t in samples.times_ms],
        "check": {**asdict(verdict), "verdict": verdict.word},
    }


def compare(record: dict[str, Any]) -> None:
    """Adds the best peer and how many times as fast each is as it.

    It is the quickest with no wrong count here, of those that are right by construction.
    """
    rows = [row for row in record["contenders"] if "error" not in row]
    peers = [r for r in rows if not r["ours"] and not r["check"]["wrong"]]
    best = quickest(row for row in peers if right_by_construction(row, record["rtol"]))
    standard = next((r for r in rows if r["name"] == MATRIX_RANK), None)
    record["best_peer"] = best["name"] if best else None
    for row in rows:
        row["vs_matrix_rank"] = round(standard["median_ms"] / row["median_ms"], 3) if standard else None
        row["vs_best_peer"] = round(best["median_ms"] / row["median_ms"], 3) if best else None


def right_by_construction(row: dict[str, Any], rtol: float) -> bool:
    """Whether a contender's row is right at an rtol for any matrix, but for a band of 1 % around τ."""
    return bool(row.get("finest_rtol", 0.0) <= rtol)


def quickest(rows: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The row with the shortest median."""
    return min(rows, key=lambda row: float(row["median_ms"]), default=None)


def write_result(path: Path | None, result: dict[str, Any]) -> None:
    """Writes FILE.partial, which becomes FILE once the result is complete."""
    if path is None:
        return
    unfinished = unfinished_path(path)
    unfinished.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if result["complete"]:
        unfinished.replace(path)


def unfinished_path(path: Path) -> Path:
    """Where the finished cases of a run are until it is complete."""
    return path.with_name(path.name + ".partial")
