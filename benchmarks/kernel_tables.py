"""Writes the tables of docs/kernels.md from committed results, between their marker comments.

python benchmarks/kernel_tables.py            # rewrite docs/kernels.md
python benchmarks/kernel_tables.py --check    # exit code 1 if it differs from the results

Results: `BSGAP_PROVEN_JSON=benchmarks/results/kernels_proven.json make test-all`, cuda_resources.py,
triton_resources.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import marked
import triton_resources

from bsgap_kernels.triton.compiled import Resources, wanted

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "kernels.md"


def proven_table(rows: list[dict[str, str]]) -> str:
    """A line for every kernel and way."""
    lines = ["| kernel | shown by | seen |", "|---|---|---|"]
    before = ""
    for row in rows:
        kernel = "" if row["kernel"] == before else f"`{row['kernel']}`"
        lines.append(f"| {kernel} | {row['way']} | {row['seen']} |")
        before = row["kernel"]
    return "\n".join(lines)


def cuda_table(result: dict[str, Any]) -> str:
    """Registers of each kernel on each architecture; spills and stack are none, as the tests assert."""
    kernels: dict[str, dict[str, Any]] = {}
    for row in result["kernels"]:
        kernels.setdefault(row["kernel"], {})[row["architecture"]] = row
    architectures = list(next(iter(kernels.values())))
    lines = [
        "| kernel | threads | shared memory, bytes | " + " | ".join(f"sm_{a}" for a in architectures) + " |",
        "|---|--:|--:|" + "--:|" * len(architectures),
    ]
    for kernel, rows in kernels.items():
        first = rows[architectures[0]]
        shared = max(row["static_shared"] + row["dynamic_shared"] for row in rows.values())
        registers = " | ".join(str(rows[a]["registers"]) for a in architectures)
        lines.append(f"| `{kernel}` | {first['threads']} | {shared} | {registers} |")
    spilled = sum(row["spill_stores"] + row["spill_loads"] + row["stack"] for row in result["kernels"])
    return "\n".join(
        [*lines, "", f"Registers of a thread, nvcc {result['nvcc']}; {spilled} bytes spilled in all."]
    )


def triton_table(records: dict[str, list[Resources]]) -> str:
    """Registers and shared memory of each variant, of the newest Triton that is recorded with all of them."""
    every = {(variant.name, capability) for variant, capability in wanted()}
    version = [v for v, rows in records.items() if every <= {(r.variant, r.capability) for r in rows}][-1]
    variants: dict[str, dict[int, Resources]] = {}
    found = {(row.variant, row.capability): row for row in records[version]}
    for variant, capability in wanted():
        variants.setdefault(variant.name, {})[capability] = found[variant.name, capability]
    capabilities = sorted({capability for _, capability in every})
    lines = [
        "| variant | " + " | ".join(f"sm_{c}" for c in capabilities) + " |",
        "|---|" + "--:|" * len(capabilities),
    ]
    for name, rows in variants.items():
        cells = [
            f"{rows[c].registers}×{32 * rows[c].warps}, {rows[c].shared_bytes / 1024:.0f} K"
            if c in rows
            else ""
            for c in capabilities
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"Registers × threads and shared memory of a block, Triton {version}."])


def spill_table(records: dict[str, list[Resources]]) -> str:
    """Of each version of Triton: how many variants spill, the largest frame, the costliest loop."""
    lines = [
        "| Triton | variants recorded | of them spill | largest frame of a thread | most of a loop's time |",
        "|---|--:|--:|---|---|",
    ]
    for version, rows in records.items():
        frame = max(rows, key=lambda row: row.spilled_bytes)
        cost = max(rows, key=lambda row: row.spill_share)
        spilling = sum(row.spilled_bytes > 0 for row in rows)
        cells = (
            f"{frame.spilled_bytes} bytes: {frame.variant}, sm_{frame.capability}" if spilling else "none",
            f"{100 * cost.spill_share:.1f} %: {cost.variant}, sm_{cost.capability}"
            if cost.spill_share
            else "none",
        )
        lines.append(f"| {version} | {len(rows)} | {spilling} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """Every table by the name of its markers."""

    def load(name: str) -> Any:
        return json.loads((RESULTS / name).read_text(encoding="utf-8"))

    return {
        "proven": proven_table(load("kernels_proven.json")),
        "cuda": cuda_table(load("cuda_resources.json")),
        "triton": triton_table(triton_resources.load()),
        "triton-spills": spill_table(triton_resources.load()),
    }


def with_tables(text: str) -> str:
    """The page with every table between its markers; ValueError if a pair of markers is not there."""
    for name, table in tables().items():
        text = marked.replaced(text, name, table)
    return text


if __name__ == "__main__":
    sys.exit(marked.write({PAGE: with_tables(PAGE.read_text(encoding="utf-8"))}, sys.argv[1:]))
