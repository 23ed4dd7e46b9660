"""csrc/cuda/count_large.cuh on CPU threads under ThreadSanitizer, AddressSanitizer and UBSan.

That the sanitizers would see a fault is shown on copies of the sources: one without a barrier, one whose
shared memory is a number too short.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cuda_host import build

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs g++")


def run(program: Path, part: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run(
        [str(program), part], capture_output=True, text=True, check=False, timeout=300, env=environment
    )


def driver(mode: str) -> Path:
    try:
        return build.build("driver_large.cpp", mode)
    except build.NoRuntimeError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("mode", "part"),
    [("races", "counts"), ("races", "lanczos"), ("addresses", "certified"), ("addresses", "lanczos")],
)
def test_kernels_are_clean(mode: str, part: str) -> None:
    done = run(driver(mode), part)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_matrices_in_chunks() -> None:
    program = build.build("driver_large.cpp", "fibers", "BSGAP_SCRATCH_ELEMENTS=80000")
    done = run(program, "chunks")
    assert done.returncode == 0, done.stderr


PANEL_BARRIER = """    block_sync();
    // Behind the strip"""

# The block that arrives last makes the next vector; the first of the grid would wait for nobody.
LAST_BLOCK = "if (!last_to_arrive("
FIRST_BLOCK = "if (blockIdx.x == 0) return true;\n  if (!last_to_arrive("


@pytest.mark.parametrize(
    ("mode", "part", "file", "old", "new", "report"),
    [
        ("races", "counts", "ldlt.cuh", PANEL_BARRIER, PANEL_BARRIER.split("\n")[1], "data race"),
        ("races", "lanczos", "lanczos.cuh", LAST_BLOCK, FIRST_BLOCK, "data race"),
        (
            "addresses",
            "counts",
            "ldlt.cuh",
            " + kPanelColumns);",
            " + kPanelColumns - 1);",
            "heap-buffer-overflow",
        ),
    ],
    ids=["barrier within a block", "order between blocks", "shared memory"],
)
def test_a_planted_fault_is_reported(
    mode: str, part: str, file: str, old: str, new: str, report: str, tmp_path: Path
) -> None:
    driver(mode)  # skips where a runtime is missing
    csrc = tmp_path / "csrc"
    shutil.copytree(build.CSRC, csrc)
    source = csrc / "cuda" / file
    text = source.read_text()
    assert text.count(old) >= 1
    source.write_text(text.replace(old, new, 1))
    program = tmp_path / "driver"
    command = [str(build.COMPILER), str(build.HERE / "driver_large.cpp"), *build.COMMON, *build.MODES[mode]]
    subprocess.run([*command, f"-I{csrc}", f"-I{build.HERE}", "-o", str(program)], check=True)
    done = run(program, part)
    assert done.returncode != 0
    assert report in done.stderr
    assert f"csrc/cuda/{file}:" in done.stderr
