"""What each change of the CPU engine brought: the same calls timed in builds of several commits.

python benchmarks/commits.py COMMIT [COMMIT ...]    # writes benchmarks/results/cpu_commits-ISA.json

Every commit is built in a worktree of its own (a minute each), then they are timed in turns: two rounds, in
each round a process per commit, which takes the median of its calls after emptying the cache before each. The
figure of a commit is the lower of its two medians: what else the machine does can only add to it. ISA is the
instruction set in use, which BSGAP_ISA can take down.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CASES = ("32x32", "65536x64", "65536x512", "2048x8192", "4096x256x32", "resnet56-channel")
BFLOAT16_CASE = "65536x512"
RTOL = 1e-2
ROUNDS, CALLS, SLOW_CALLS = 2, 9, 3


def time_here() -> dict[str, float]:
    """Milliseconds of every call with the package that this process finds, by what all commits have."""
    import torch

    from bsgap_kernels import ops
    from bsgap_kernels.bench.cases import CASES as ALL
    from bsgap_kernels.bench.measure import CacheFlush

    flush = CacheFlush()

    def median_ms(call: Callable[[], object], calls: int, repeats: int = 1) -> float:
        call()
        times = []
        for _ in range(calls):
            if repeats == 1:
                flush()
            time.sleep(0.005)
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            times.append((time.perf_counter() - start) * 1e3 / repeats)
        return statistics.median(times)

    result = {}
    for case in ALL:
        if case.name not in CASES:
            continue
        inputs = case.make()
        calls, repeats = SLOW_CALLS if case.slow else CALLS, case.calls
        if len(inputs) > 1:
            result[case.name] = median_ms(partial(ops.near_rank_grouped, inputs, rtol=RTOL), calls)
            continue
        (A,) = inputs
        result[case.name] = median_ms(partial(ops.near_rank, A, rtol=RTOL), calls, repeats)
        interval = partial(ops.near_rank_interval, A, rtol=RTOL)
        result[f"{case.name} interval"] = median_ms(interval, calls, repeats)
        if case.name == BFLOAT16_CASE:
            half = A.to(torch.bfloat16)
            result[f"{case.name} bfloat16"] = median_ms(partial(ops.near_rank, half, rtol=RTOL), calls)
    return result


def build(commit: str, folder: Path) -> Path:
    """A worktree of the commit with its compiled parts."""
    tree = folder / commit
    subprocess.run(
        ["git", "worktree", "add", "--detach", str(tree), commit], cwd=ROOT, check=True, capture_output=True
    )
    subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tree, check=True, capture_output=True, env={**os.environ, "BSGAP_CUDA": "0"},
    )  # fmt: skip
    return tree


def time_in(tree: Path) -> dict[str, float]:
    """`time_here` in a process that finds the package of a worktree."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--here"],
        cwd=tree, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tree)},
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    """Builds, times in turns, prints and writes the result."""
    parser = argparse.ArgumentParser(description="Times the CPU engine of several commits.")
    parser.add_argument("commits", nargs="*", metavar="COMMIT")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(time_here()))
        return
    if not options.commits:
        parser.error("at least one commit is needed")
    from bsgap_kernels._core import instruction_set
    from bsgap_kernels.bench.machine import describe

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in options.commits:
                commit, subject = _git("log", "-1", "--format=%H%n%s", name).splitlines()
                print(f"building {commit[:12]} {subject}", flush=True)
                rows.append(
                    {"commit": commit, "subject": subject, "tree": build(commit, Path(folder)), "rounds": []}
                )
            for index in range(ROUNDS):
                for row in rows:
                    print(f"round {index + 1}/{ROUNDS}: {row['subject']}", flush=True)
                    row["rounds"].append(time_in(row["tree"]))
        finally:
            for row in rows:
                _git("worktree", "remove", "--force", str(row["tree"]))
    for row in rows:
        del row["tree"]
        row["ms"] = {case: round(min(r[case] for r in row["rounds"]), 4) for case in row["rounds"][0]}
        print(row["commit"][:12], row["ms"])
    result = {"schema": 1, "rows": rows, **describe()}
    path = RESULTS / f"cpu_commits-{instruction_set()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


if __name__ == "__main__":
    main()
