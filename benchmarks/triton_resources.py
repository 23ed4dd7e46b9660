"""Registers, spills and shared memory of every variant of the Triton kernels, without a GPU.

python benchmarks/triton_resources.py          # half an hour; writes benchmarks/results/triton_resources.json
python benchmarks/triton_resources.py probe    # only variants whose name has the word; other rows are kept
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import triton

from bsgap_kernels.triton.compiled import resources, wanted

RESULT = Path(__file__).resolve().parent / "results" / "triton_resources.json"


def main(word: str = "") -> None:
    """Compiles what is asked for and writes one row a variant and compute capability."""
    kept = {}
    if word:
        found = json.loads(RESULT.read_text())
        if found["triton"] != triton.__version__:
            raise SystemExit(f"the other rows are of triton {found['triton']}, this is {triton.__version__}")
        kept = {
            (row["variant"], row["capability"]): row for row in found["kernels"] if word not in row["variant"]
        }
    rows = []
    for variant, capability in wanted():
        row = kept.get((variant.name, capability))
        if word in variant.name:
            row = asdict(resources(variant, capability))
            print(row, flush=True)
        if row is not None:
            rows.append(row)
        text = ",\n".join("  " + json.dumps(row) for row in rows)
        RESULT.write_text(f'{{"triton": "{triton.__version__}", "kernels": [\n{text}\n]}}\n')


if __name__ == "__main__":
    main(*sys.argv[1:])
