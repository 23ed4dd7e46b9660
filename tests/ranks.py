"""Scenarios that run on several ranks (gloo), for tests of them.

A worker module registers its scenarios and calls `main` when it is run as `python WORKER.py FOLDER`: torch
is imported once, the ranks of a scenario are forked from that process and meet through a file. FOLDER gets a
file a scenario, world and rank: empty if all went well, else the reason to skip, or a traceback.
"""

from __future__ import annotations

import copy
import math
import os
import re
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from bsgap_kernels.tracking import RankTracker, SiteRecord

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 60
SCENARIOS: dict[str, tuple[Callable[[int, int, Path], None], tuple[int, ...]]] = {}


class Skip(Exception):
    """What a scenario needs is not there."""


def scenario(*worlds: int) -> Callable[[Callable[[int, int, Path], None]], Callable[[int, int, Path], None]]:
    def add(function: Callable[[int, int, Path], None]) -> Callable[[int, int, Path], None]:
        SCENARIOS[function.__name__] = function, worlds
        return function

    return add


def alone(model: nn.Module, x: Tensor, **options: Any) -> dict[str, SiteRecord]:
    """The records of one process that has all rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tracker = RankTracker(copy.deepcopy(model), verbose=False, **options)
    with tracker:
        tracker._reader._model(x)
        return tracker.collect()


def same(found: dict[str, SiteRecord], expected: dict[str, SiteRecord]) -> None:
    assert list(found) == list(expected), (list(found), list(expected))
    for site, record in found.items():
        other = expected[site]
        for name in ("shape", "near_rank", "lower", "upper", "ratio"):
            assert getattr(record, name) == getattr(other, name), (site, name, record, other)
        assert record.summary.keys() == other.summary.keys()
        for name, value in record.summary.items():
            # A small mean is what float32 activations, rounded by shares of the batch, leave.
            near = 1e-6 if name == "mean_energy" else 1e-9
            agree = math.isclose(value, other.summary[name], rel_tol=1e-6, abs_tol=near)
            assert agree or (math.isnan(value) and math.isnan(other.summary[name])), (
                site,
                name,
                record,
                other,
            )


def raises(action: Callable[[], Any], *words: str) -> None:
    """A ValueError with these words in this order."""
    with pytest.raises(ValueError, match=".*".join(map(re.escape, words))):
        action()


def run_rank(name: str, rank: int, world: int, folder: Path) -> str:
    """What went wrong, or nothing."""
    torch.set_num_threads(1)
    function, _ = SCENARIOS[name]
    meeting = f"file://{folder / name}-{world}.store"
    try:
        dist.init_process_group(
            "gloo", init_method=meeting, rank=rank, world_size=world, timeout=timedelta(seconds=SECONDS / 3)
        )
        function(rank, world, folder)
        dist.barrier()
        dist.destroy_process_group()
    except Skip as reason:
        return f"skip: {reason}"
    except BaseException:
        return traceback.format_exc()
    return ""


def run(name: str, world: int, folder: Path) -> None:
    """Forks the ranks of a scenario, and ends those that have not come back in time."""
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            outcome = run_rank(name, rank, world, folder)
            (folder / f"{name}-{world}-{rank}.txt").write_text(outcome)
            os._exit(0)
        children.append(child)
    deadline = time.monotonic() + SECONDS
    while children and time.monotonic() < deadline:
        children = [child for child in children if os.waitpid(child, os.WNOHANG)[0] == 0]
        time.sleep(0.005)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def main() -> None:
    """Runs the scenarios of the calling script, or those named after the folder."""
    for chosen, (_, numbers) in SCENARIOS.items():
        if len(sys.argv) < 3 or chosen in sys.argv[2:]:
            for number in numbers:
                started = time.monotonic()
                run(chosen, number, Path(sys.argv[1]))
                print(f"{chosen} on {number}: {time.monotonic() - started:.1f} s", flush=True)


def cases(worker: str) -> list[Any]:
    """(name, world) of each scenario that a worker module has registered."""
    return [
        pytest.param(name, world, id=f"{name}-{world}")
        for name, (function, worlds) in SCENARIOS.items()
        if function.__module__ == worker
        for world in worlds
    ]


def outcomes_of(worker: str, folder: Path) -> Path:
    """The folder with what each rank of each scenario of a worker has to say."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("BSGAP_VIRTUAL_GPU", None)
    command = [sys.executable, str(ROOT / "tests" / f"{worker}.py"), str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def check(outcomes: Path, name: str, world: int) -> None:
    """Every rank came back and had nothing to say."""
    for rank in range(world):
        outcome = outcomes / f"{name}-{world}-{rank}.txt"
        assert outcome.exists(), f"rank {rank} of {world} never came back"
        text = outcome.read_text()
        if text.startswith("skip: "):
            pytest.skip(text.removeprefix("skip: "))
        assert text == "", f"rank {rank} of {world}: {text}"


needs_ranks = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or not hasattr(os, "fork"),
    reason="needs gloo, fork",
)
