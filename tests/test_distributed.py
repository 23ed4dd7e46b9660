"""The tracker over several ranks (gloo): what it counts is what one process counts on all rows.

The scenarios are in distributed_worker.py and run in processes of their own; a test here reads what came out.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import distributed_worker
import pytest
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or not hasattr(os, "fork"),
    reason="needs gloo, fork",
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what each rank of each scenario has to say."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("BSGAP_VIRTUAL_GPU", None)
    command = [sys.executable, str(ROOT / "tests" / "distributed_worker.py"), str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize(
    ("name", "world"),
    [
        pytest.param(name, world, id=f"{name}-{world}")
        for name, (_, worlds) in distributed_worker.SCENARIOS.items()
        for world in worlds
    ],
)
def test_ranks(name: str, world: int, outcomes: Path) -> None:
    for rank in range(world):
        outcome = outcomes / f"{name}-{world}-{rank}.txt"
        assert outcome.exists(), f"rank {rank} of {world} never came back"
        text = outcome.read_text()
        if text.startswith("skip: "):
            pytest.skip(text.removeprefix("skip: "))
        assert text == "", f"rank {rank} of {world}: {text}"
