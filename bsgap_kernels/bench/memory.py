"""Memory that a call takes beside its input, seen in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .cases import Case, select_cases
from .contenders import CONTENDERS, taking_part

PACKAGES = Path(__file__).resolve().parents[2]
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 17), "MALLOC_TRIM_THRESHOLD_": str(1 << 17)}
"""glibc then gives every block past 128 KiB back when it is freed: none is there to be used again unseen."""
PROMISED_MATRICES, PROMISED_BYTES = 4, 64 << 20


def promised_bytes(k: int) -> int:
    """What a call may take: four float64 matrices of the smaller side, and 64 MiB."""
    return PROMISED_MATRICES * 8 * k * k + PROMISED_BYTES


def status_bytes(field: str) -> int:
    """A size from the process's status: VmRSS (resident now) or VmHWM (resident at most)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {field}")


def extra_bytes(call: Callable[[], object]) -> int:
    """Most resident memory during a call less what was resident before it (Linux).

    The system counts pages by thread and adds them up later: off by some 100 KiB a thread.
    """
    # Not getrusage: its ru_maxrss of a new process starts at what the parent had. 5 forgets the peak so far.
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = status_bytes("VmRSS")
    call()
    return max(status_bytes("VmHWM") - before, 0)


def measure_here(case: Case, rtols: list[float], seed: int) -> list[dict[str, Any]]:
    """Extra memory of each of ours on the case's matrix; called in a process that has done nothing else."""
    (A,) = case.make(seed)
    # Small, yet past every limit below which less is done: what is loaded and started once is there then.
    (small,) = Case("", "", ((512, 128),)).make(seed)
    rows = []
    for rtol, chosen in taking_part(CONTENDERS, case, rtols).items():
        for c in chosen:
            if c.ours:
                c.run(small, rtol)
                used = extra_bytes(partial(c.run, A, rtol))
                rows.append({"matrix": case.name, "name": c.name, "rtol": rtol, "extra_bytes": used})
    return rows


def extra_memory(case: Case, rtols: list[float], seed: int) -> list[dict[str, Any]]:
    """Extra memory of each of ours at each threshold, and what is promised, on one matrix of the package."""
    asked = json.dumps({"case": case.name, "rtols": rtols, "seed": seed, "threads": torch.get_num_threads()})
    path = os.pathsep.join(filter(None, (str(PACKAGES), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import answer; answer()", asked],
        env={**os.environ, **MALLOC, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{case.name}: {(done.stderr.splitlines() or ['no reason given'])[-1]}")
    promised = promised_bytes(min(case.shapes[0]))
    return [{**row, "promised_bytes": promised} for row in json.loads(done.stdout)]


def answer() -> None:
    """What the fresh process does: reads the request from its argument, prints the rows as JSON."""
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    (case,) = select_cases([asked["case"]])
    print(json.dumps(measure_here(case, asked["rtols"], asked["seed"])))
