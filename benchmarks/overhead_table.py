"""Writes the tables of docs/tracking.md from benchmarks/results/overhead-*.json, between their markers.

python benchmarks/overhead_table.py            # rewrite the page
python benchmarks/overhead_table.py --check    # exit code 1 if it differs
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import marked

from bsgap_kernels.bench.machine import ISA_NAMES, processor

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "tracking.md"
NAME = "overhead-table"


def number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(result: dict[str, Any]) -> str:
    """Steps of every model under every way of tracking, targets, and where they were timed."""
    lines = [
        "| model | way | step ms | added ms | in hooks ms | cost, % of a step |",
        "|---|---|--:|--:|--:|--:|",
    ]
    notes = []
    for model in result["models"]:
        about = model["name"]
        for way in model["ways"]:
            numbers = [way[key] for key in ("median_ms", "added_ms", "inside_ms", "percent")]
            cells = ["–" if value is None else number(value) for value in numbers]
            lines.append(f"| {about} | {way['name']} | {' | '.join(cells)} |")
        counts = model["counts"]
        notes.append(f"{about}: {counts['equal']} of {counts['sites']} counts equal those of the naive hooks")
    for target in result["targets"]:
        kind, _, unit = target["unit"].partition(", ")
        verdict = f"{kind} {target['limit']:g}: {'met' if target['met'] else 'missed'}"
        notes.append(f"{target['target']}: {target['value']:.3g} {unit} ({verdict})")
    versions = result["versions"]["torch"]
    where = f"{processor(result)}, torch {versions}, commit {result['commit'][:12]}, {result['date'][:10]}"
    head = f"{processor(result)}:"
    how = "Every site at every step, unfolded by channel"
    return "\n".join([head, "", *lines, "", f"{how}. {where}. {'; '.join(notes)}."])


def load() -> list[dict[str, Any]]:
    """The result of each instruction set that was measured, the widest first; ValueError for one misnamed."""
    results = []
    for isa in ISA_NAMES:
        path = RESULTS / f"overhead-{isa}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["machine"]["instruction_set"] != isa:
            raise ValueError(f"{path.name} holds figures of {result['machine']['instruction_set']}")
        results.append(result)
    return results


def written(results: list[dict[str, Any]]) -> str:
    """The page with a table of each result in it."""
    tables = "\n\n".join(map(table, results))
    return marked.replaced(PAGE.read_text(encoding="utf-8"), NAME, tables)


if __name__ == "__main__":
    sys.exit(marked.write({PAGE: written(load())}, sys.argv[1:]))
