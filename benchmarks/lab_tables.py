"""Writes the tables of docs/lab.md about the trainer from committed results, between their marker comments.

python benchmarks/lab_tables.py            # rewrite docs/lab.md
python benchmarks/lab_tables.py --check    # exit code 1 if it differs from the results

Results: kill_test.py, trainer_throughput.py, full_batch_memory.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import marked

from bsgap_kernels.bench.machine import processor

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "lab.md"


def where(result: dict[str, Any]) -> str:
    """Where and with what a result was measured."""
    torch = result["versions"]["torch"]
    return f"{processor(result)}, torch {torch}, commit {result['commit'][:12]}"


def kills(result: dict[str, Any]) -> str:
    """Every run that was killed or stopped, beside the undisturbed one."""
    whole = result["undisturbed"]
    lines = [
        "| run | disturbed | weights, SHA-256 | rows equal |",
        "|---|---|---|--:|",
        f"| undisturbed | – | `{whole['weights_sha256'][:16]}…` | {whole['rows']:,} |",
    ]
    for name, signal, runs in (("kills", "SIGKILL", "killed"), ("stops", "SIGTERM", "stopped")):
        for index, run in enumerate(result[runs]):
            rows = run["rows"]
            equal = f"{rows['equal']:,} of {rows['compared'] + rows['missing']:,}"
            cells = [
                f"{runs} {index}",
                f"{len(run[name])} × {signal}",
                f"`{run['weights_sha256'][:16]}…`",
                equal,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    phases = ", ".join(f"{count} at {phase}" for phase, count in result["totals"]["kills_by_phase"].items())
    same = f"{result['totals']['runs_identical']} of {result['totals']['runs']} runs identical in every bit"
    return "\n".join([*lines, "", f"{same}; of the kills {phases}. {where(result)}."])


def throughput(result: dict[str, Any]) -> str:
    """The trainer beside a bare loop of the same training."""
    lines = [
        "| model | batch | bare loop, images/s | trainer, images/s | time, trainer / bare |",
        "|---|--:|--:|--:|--:|",
    ]
    for case in result["cases"]:
        rates = case["images_per_second"]
        cells = [case["model"], str(case["batch_size"]), f"{rates['bare']:,.0f}", f"{rates['trainer']:,.0f}"]
        lines.append(f"| {' | '.join(cells)} | {case['ratio']:.3f} |")
    met = sum(case["met"] for case in result["cases"])
    target = f"at most {result['target_ratio']:g} is the target, met by {met} of {len(result['cases'])}"
    return "\n".join([*lines, "", f"Metric off; {target}. {where(result)}."])


def memory(result: dict[str, Any]) -> str:
    """Peak memory of a full batch against the data's size."""
    lines = ["| images | updates, in passes, MiB | updates, in one pass, MiB |", "|--:|--:|--:|"]
    peaks: dict[int, dict[bool, float]] = {}
    for row in result["rows"]:
        peaks.setdefault(row["images"], {})[row["micro_batch"] is None] = row["steps_bytes"] / 2**20
    lines += [f"| {images:,} | {peak[False]:.1f} | {peak[True]:.1f} |" for images, peak in peaks.items()]
    return "\n".join(
        [*lines, "", f"`{result['model']}` at full batch, beside the data itself. {where(result)}."]
    )


TABLES = {
    "kill-table": (kills, "kill_test"),
    "throughput-table": (throughput, "trainer_throughput"),
    "memory-table": (memory, "full_batch_memory"),
}


def written(text: str) -> str:
    """The page with every table in it; ValueError if it lacks a marker."""
    for name, (table, result) in TABLES.items():
        content = json.loads((RESULTS / f"{result}.json").read_text(encoding="utf-8"))
        text = marked.replaced(text, name, table(content))
    return text


if __name__ == "__main__":
    sys.exit(marked.write({PAGE: written(PAGE.read_text(encoding="utf-8"))}, sys.argv[1:]))
