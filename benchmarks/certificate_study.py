"""Counts false intervals over thousands of matrices with a known count.

Run from a checkout: python benchmarks/certificate_study.py [--per-family 250] [--seed 1]. Takes about two
minutes on one core and writes benchmarks/results/certificates.json. The matrices and how their counts are known:
tests/certificate_families.py.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import certificate_families as families  # noqa: E402 - a module of the tests, not of the package

from bsgap_kernels import _core  # noqa: E402

MIN_RTOL = 1e-4  # where separated spectra should give a single number


def share(single: int, asked: int) -> float | None:
    """Share of single-number intervals, None where none was asked for."""
    return round(single / asked, 4) if asked else None


def run(per_family: int, seed: int, mpmath_matrices: int) -> dict[str, Any]:
    """All families, both modes, both entry points."""
    tally: dict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
    modes: dict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
    seconds: dict[str, float] = defaultdict(float)
    sides = [10**9, 0]
    false: list[dict[str, object]] = []
    groups = families.groups(per_family, seed, mpmath_matrices=mpmath_matrices, mpmath_side=40)
    while True:
        group = next(groups, None)
        if group is None:
            break
        start = time.perf_counter()
        answers = families.intervals(group)
        name = group[0].family
        seconds[name] += time.perf_counter() - start
        for case, found in zip(group, answers, strict=True):
            tally[name]["matrices"] += 1
            sides = [min(sides[0], *case.matrix.shape), max(sides[1], *case.matrix.shape)]
            for interval in found:
                right = interval.lower <= case.count <= interval.upper
                if not right:
                    what = {"family": name, "shape": list(case.matrix.shape), "count": case.count}
                    options = {"dtype": str(case.matrix.dtype), "rtol": case.rtol, "atol": case.atol}
                    false.append(what | options | vars(interval))
                single = interval.lower == interval.upper
                for row in (tally[name], modes[f"{interval.mode}, {interval.entry}"]):
                    row["intervals"] += 1
                    row["false"] += not right
                    row["single"] += single
                    if case.separated and max(case.rtol, 0.0) >= MIN_RTOL:
                        row["separated"] += 1
                        row["separated_single"] += single

    def rows(table: dict[str, defaultdict[str, int]]) -> dict[str, dict[str, object]]:
        return {
            name: {key: row[key] for key in ("matrices", "intervals", "false") if key in row}
            | {"single_share": share(row["single"], row["intervals"]), "separated": row["separated"]}
            | {"separated_single_share": share(row["separated_single"], row["separated"])}
            | ({"seconds": round(seconds[name], 2)} if name in seconds else {})
            for name, row in table.items()
        }

    keys = ("matrices", "intervals", "false", "single", "separated", "separated_single")
    total = {key: sum(row[key] for row in tally.values()) for key in keys}
    return {
        "what": "near_rank_interval on matrices with a known count (benchmarks/certificate_study.py)",
        "seed": seed,
        "shapes": f"{sides[0]} to {sides[1]} rows and columns",
        "matrices": total["matrices"],
        "intervals": total["intervals"],
        "false_intervals": total["false"],
        "single_share": share(total["single"], total["intervals"]),
        "separated_rtol_min": MIN_RTOL,
        "separated_margin": families.SEPARATION,
        "separated_single_share": share(total["separated_single"], total["separated"]),
        "families": rows(tally),
        "modes": rows(modes),
        "false": false,
        "seconds": round(sum(seconds.values()), 2),
        "machine": {
            "processor": processor(),
            "instruction_set": _core.instruction_set(),
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "mpmath": mpmath.__version__,
        },
        "commit": commit(),
    }


def processor() -> str:
    """The processor's name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """The commit that was run, marked where the tree had changes."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def print_table(result: dict[str, Any]) -> None:
    """The JSON for people."""
    print(f"{'':28}{'matrices':>9}{'intervals':>10}{'false':>6}{'single':>8}{'single, separated':>19}")
    for name, row in (result["families"] | result["modes"]).items():
        matrices = row.get("matrices", "")
        share_separated = "–" if row["separated"] == 0 else f"{row['separated_single_share']:.1%}"
        single = f"{row['single_share']:.1%}"
        print(
            f"{name:28}{matrices:>9}{row['intervals']:>10}{row['false']:>6}{single:>8}{share_separated:>19}"
        )
    print(
        f"{result['matrices']} matrices, {result['intervals']} intervals, {result['false_intervals']} false. "
        f"Single numbers at rtol >= {MIN_RTOL} without singular values within 1 % of the threshold: "
        f"{result['separated_single_share']:.1%}. {result['seconds']} s in the intervals."
    )


def main() -> int:
    """Runs the study, prints the table, writes the JSON; exit code 1 if an interval was false."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--per-family", type=int, default=250)
    parser.add_argument("--mpmath-matrices", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "certificates.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = run(options.per_family, options.seed, options.mpmath_matrices)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print_table(result)
    return 1 if result["false_intervals"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
