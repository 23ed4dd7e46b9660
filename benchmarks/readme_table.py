"""Writes the README's cost table from a committed result, between its two marker comments.

python benchmarks/readme_table.py            # rewrite README.md
python benchmarks/readme_table.py --check    # exit code 1 if README.md differs from the result
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import marked

from bsgap_kernels.bench import SCHEMA
from bsgap_kernels.bench.tables import markdown_tables

NAME = "cost-table"
ROOT = Path(__file__).resolve().parents[1]


def load(path: Path) -> str:
    """The markdown table of a result file; ValueError for one that is unfinished or of another schema."""
    result = json.loads(path.read_text(encoding="utf-8"))
    if result.get("schema") != SCHEMA:
        raise ValueError(f"{path.name} has schema {result.get('schema')}, expected {SCHEMA}")
    if not result["complete"]:
        raise ValueError(f"{path.name} comes from an interrupted run")
    return markdown_tables(result)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: 0 done or equal, 1 different (--check), 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(description="Writes the README's cost table from a benchmark result.")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "cpu.json")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--check", action="store_true", help="compare only")
    options = parser.parse_args(arguments)
    try:
        table = load(options.results)
        old = options.readme.read_text(encoding="utf-8")
        new = marked.replaced(old, NAME, table)
    except (OSError, ValueError, KeyError) as error:
        print(f"readme_table: {options.readme.name}, {options.results.name}: {error}", file=sys.stderr)
        return 2
    if new == old:
        print(f"readme_table: {options.readme.name} matches {options.results.name}")
        return 0
    if options.check:
        print(f"readme_table: the table in {options.readme.name} differs; run benchmarks/readme_table.py")
        return 1
    options.readme.write_text(new, encoding="utf-8")
    print(f"readme_table: table written to {options.readme.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
