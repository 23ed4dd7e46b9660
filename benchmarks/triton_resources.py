"""Registers, spills and shared memory of the variants of the Triton kernels, without a GPU.

python benchmarks/triton_resources.py                # half an hour on an idle machine
python benchmarks/triton_resources.py checked        # what the tests compile: two minutes
python benchmarks/triton_resources.py 'probe.*sm_90' # variants whose name and architecture match

Adds what the installed Triton compiles to benchmarks/results/triton_resources.json, a list of rows for each
version; the rows of other versions, and of what was not asked for, are kept. Another version needs no
installation of its own: pip install --no-deps --target FOLDER triton==3.7.1, then PYTHONPATH=FOLDER.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from bsgap_kernels.triton.compiled import Resources, checked, resources, wanted
from bsgap_kernels.triton.config import check_compiler
from bsgap_kernels.triton.gram import triton_version

RESULT = Path(__file__).resolve().parent / "results" / "triton_resources.json"


def load() -> dict[str, list[Resources]]:
    """The committed rows by version of Triton, oldest first."""
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    return {version: [Resources(**row) for row in rows] for version, rows in found.items()}


def parts(version: str) -> tuple[int, ...]:
    """The numbers of a version, which its text does not sort by."""
    return tuple(int(part) for part in version.split("."))


def save(records: Mapping[str, Sequence[Resources]]) -> None:
    """One line a row; versions in order."""
    lists = []
    for version in sorted(records, key=parts):
        rows = ",\n".join("  " + json.dumps(asdict(row)) for row in records[version])
        lists.append(f'"{version}": [\n{rows}\n]')
    RESULT.write_text("{" + ",\n".join(lists) + "}\n", encoding="utf-8")


def main(pattern: str = "") -> None:
    """Compile what is asked for and write one row a variant and compute capability."""
    import triton

    records = load()
    rows = {(row.variant, row.capability): row for row in records.get(triton.__version__, [])}
    every = list(dict.fromkeys([*checked(), *wanted()]))  # probes are in both
    chosen = checked() if pattern == "checked" else every
    for variant, capability in chosen:
        if pattern != "checked" and not re.search(pattern, f"{variant.name}, sm_{capability}"):
            continue
        try:
            check_compiler(capability // 10, triton_version())
        except RuntimeError as error:
            print(f"{variant.name}, sm_{capability}: {error}", flush=True)
            continue
        row = rows[variant.name, capability] = resources(variant, capability)
        print(row, flush=True)
        order = [(v.name, c) for v, c in every]
        records[triton.__version__] = [rows[key] for key in order if key in rows]
        save(records)


if __name__ == "__main__":
    main(*sys.argv[1:])
