"""Registers, spills and shared memory of every variant of the Triton kernels, without a GPU.

python benchmarks/triton_resources.py     # half an hour; writes benchmarks/results/triton_resources.json
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import triton

from bsgap_kernels.triton.compiled import resources, wanted

RESULT = Path(__file__).resolve().parent / "results" / "triton_resources.json"


def main() -> None:
    """Compiles everything and writes one row a variant and compute capability."""
    rows = []
    for variant, capability in wanted():
        row = asdict(resources(variant, capability))
        print(row, flush=True)
        rows.append(row)
        text = ",\n".join("  " + json.dumps(row) for row in rows)
        RESULT.write_text(f'{{"triton": "{triton.__version__}", "kernels": [\n{text}\n]}}\n')


if __name__ == "__main__":
    main()
