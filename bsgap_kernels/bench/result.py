"""Rows of a result, and the file that it is written to."""

from __future__ import annotations

import json
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


def contender_row(contender: Named, samples: Samples, verdict: Verdict | None) -> dict[str, Any]:
    """Times and verdict of a contender, or why there are none."""
    row: dict[str, Any] = {"name": contender.name, "ours": contender.ours}
    if samples.error is not None or verdict is None or not samples.times_ms:
        return {**row, "error": samples.error or "not timed"}
    return {
        **row,
        **samples.row(),
        "times_ms": [round(t, 5) for t in samples.times_ms],
        "check": {**asdict(verdict), "verdict": verdict.word},
    }


def compare(record: dict[str, Any]) -> None:
    """Adds the best peer (the quickest with no wrong count) and how many times as fast each is as it."""
    rows = [row for row in record["contenders"] if "error" not in row]
    peers = [r for r in rows if not r["ours"] and r["name"] != MATRIX_RANK and not r["check"]["wrong"]]
    best = min(peers, key=lambda r: float(r["median_ms"]), default=None)
    standard = next((r for r in rows if r["name"] == MATRIX_RANK), None)
    record["best_peer"] = best["name"] if best else None
    for row in rows:
        row["vs_matrix_rank"] = round(standard["median_ms"] / row["median_ms"], 3) if standard else None
        row["vs_best_peer"] = round(best["median_ms"] / row["median_ms"], 3) if best else None


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
