"""The CUDA kernels on CPU threads under ThreadSanitizer, AddressSanitizer and UBSan: no race, no bad address.

That the sanitizers would see one is shown too: a barrier left out of the tridiagonalisation, and a write
beyond the block's shared memory, are reported where they are.
"""

from __future__ import annotations

import subprocess

import proven
import pytest
from cuda_host import build

pytestmark = [pytest.mark.torch_free, pytest.mark.skipif(build.COMPILER is None, reason="needs g++")]


def run(mode: str, *arguments: str, defines: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    try:
        program = build.build("driver.cpp", mode, *defines)
    except build.NoRuntimeError as error:
        pytest.skip(str(error))
    return subprocess.run(
        [str(program), *arguments], capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.parametrize(("mode", "way"), [("races", proven.RACES), ("addresses", proven.ADDRESSES)])
def test_kernels_are_clean(mode: str, way: str) -> None:
    done = run(mode)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    kernels = {"count_small_kernel", "summary_kernel", "fill_table_kernel"}
    assert set(proven.note_program(done.stdout, way)) == kernels


# 20 rows: a warp, 33: a block.
@pytest.mark.parametrize("rows", [20, 33])
def test_a_missing_barrier_is_reported(rows: int) -> None:
    assert run("races", "one", str(rows)).stderr == ""
    done = run("races", "one", str(rows), defines=("BSGAP_PLANT_MISSING_BARRIER",))
    assert done.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in done.stderr
    assert "csrc/cuda/tridiagonal.cuh:" in done.stderr


def test_a_write_out_of_bounds_is_reported() -> None:
    assert run("addresses", "one", "33").stderr == ""
    done = run("addresses", "one", "33", defines=("BSGAP_PLANT_OUT_OF_BOUNDS",))
    assert done.returncode != 0
    assert "ERROR: AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "csrc/cuda/tridiagonal.cuh:" in done.stderr
