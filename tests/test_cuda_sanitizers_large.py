"""csrc/cuda/count_large.cuh on CPU threads under ThreadSanitizer, AddressSanitizer and UBSan.

That the sanitizers would see a fault is shown on copies of the sources: one without a barrier, one whose
shared memory is a number too short.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import proven
import pytest
from cuda_host import build

pytestmark = [pytest.mark.torch_free, pytest.mark.skipif(build.COMPILER is None, reason="needs g++")]


PARTS = {
    "counts": {"ldlt_panel_kernel", "ldlt_update_kernel", "ldlt_finish_kernel", "write_counts_kernel"},
    "certified": {"ldlt_panel_kernel", "ldlt_update_kernel", "plan_thresholds_kernel", "plan_retry_kernel"},
    "lanczos": {"lanczos_start_kernel", "lanczos_step_kernel", "ritz_vector_kernel", "rayleigh_kernel"},
    "top": {"plan_top_kernel", "plan_retry_kernel", "describe_kernel", "ldlt_begin_kernel"},
    "spectrum": {"householder_kernel", "bisection_kernel", "sturm_counts_kernel"},
}
"""Arguments of the driver, and kernels that must have run there."""
SHORT = ("top", "spectrum")
"""Parts that a thread for each CUDA thread makes too slow at 129 rows: on fewer, by BSGAP_TEST_SMALL_SIDE."""


def run(program: Path, part: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run(
        [str(program), part], capture_output=True, text=True, check=False, timeout=300, env=environment
    )


def driver(mode: str, *defines: str) -> Path:
    try:
        return build.build("driver_large.cpp", mode, *defines)
    except build.NoRuntimeError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("mode", "part"),
    [
        ("races", "counts"),
        ("addresses", "certified"),
        *(
            pytest.param(mode, part, marks=pytest.mark.slow)
            for mode in ("races", "addresses")
            for part in ("lanczos", "top", "spectrum")
        ),
    ],
)
def test_kernels_are_clean(mode: str, part: str) -> None:
    done = run(driver(mode, *(["BSGAP_TEST_SMALL_SIDE=16"] if part in SHORT else [])), part)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    kernels = proven.note_program(done.stdout, proven.RACES if mode == "races" else proven.ADDRESSES)
    assert PARTS[part] <= set(kernels)


def test_matrices_in_chunks() -> None:
    program = build.build("driver_large.cpp", "fibers", "BSGAP_SCRATCH_ELEMENTS=80000")
    done = run(program, "chunks")
    assert done.returncode == 0, done.stderr


PANEL_BARRIER = """    block_sync();
    // Behind the strip"""

# The block that arrives last makes the next vector; the first of the grid would wait for nobody.
LAST_BLOCK = "if (!last_to_arrive("
FIRST_BLOCK = "if (blockIdx.x == 0) return true;\n  if (!last_to_arrive("


@pytest.mark.slow
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
