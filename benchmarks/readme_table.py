"""Writes the cost tables from the committed results, between their marker comments.

python benchmarks/readme_table.py            # rewrite README.md and docs/cpu.md
python benchmarks/readme_table.py --check    # exit code 1 if a page differs from the results

README.md shows the widest instruction set that was measured, docs/cpu.md the others.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import marked

from bsgap_kernels.bench import SCHEMA
from bsgap_kernels.bench.machine import ISA_NAMES
from bsgap_kernels.bench.tables import markdown_tables

NAME = "cost-table"
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README, PAGE = ROOT / "README.md", ROOT / "docs" / "cpu.md"


def load(path: Path) -> str:
    """The markdown tables of a result file; ValueError for one that is unfinished or of another schema."""
    result = json.loads(path.read_text(encoding="utf-8"))
    if result.get("schema") != SCHEMA:
        raise ValueError(f"{path.name} has schema {result.get('schema')}, expected {SCHEMA}")
    if not result["complete"]:
        raise ValueError(f"{path.name} comes from an interrupted run")
    if path.stem != f"cpu-{result['machine']['instruction_set']}":
        raise ValueError(f"{path.name} holds figures of {result['machine']['instruction_set']}")
    return markdown_tables(result)


def pages() -> dict[Path, str]:
    """Both pages with the tables of all instruction sets that were measured, the widest first."""
    paths = [path for isa in ISA_NAMES if (path := RESULTS / f"cpu-{isa}.json").exists()]
    if not paths:
        raise ValueError(f"no cpu-*.json in {RESULTS.name}")
    first, *others = map(load, paths)
    parts = {README: first, PAGE: "\n\n".join(others) or "No other instruction set was measured yet."}
    return {
        page: marked.replaced(page.read_text(encoding="utf-8"), NAME, part) for page, part in parts.items()
    }


def main(arguments: Sequence[str]) -> int:
    """Command line: 0 written or equal, 1 different (--check), 2 for input that cannot be used."""
    try:
        return marked.write(pages(), arguments)
    except (OSError, ValueError, KeyError) as error:
        print(f"readme_table: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
