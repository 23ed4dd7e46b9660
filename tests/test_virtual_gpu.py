"""The path of a CUDA tensor, from the op to the kernels' own source, on a machine without a GPU.

Tests of the ops and of the tracker run again in a process where CPU tensors take that path (virtual_gpu.py).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import cuda_host
import pytest

ROOT = Path(__file__).resolve().parents[1]

COUNTS = {"count_small_kernel", "gram_kernel, sides within a tile", "gram_kernel, sides beyond a tile"}
LARGE = {"ldlt_panel_kernel", "ldlt_update_kernel"}
PROBED = {"omega_kernel", "product_kernel"}


@pytest.mark.skipif(cuda_host.COMPILER is None, reason="needs g++")
@pytest.mark.parametrize(
    ("file", "selection", "tests", "kernels"),
    [
        pytest.param(
            "test_ops.py",
            "grouped or batches or non_finite or range or zero_and or digits or in_place or alias"
            " or odd_thresholds or torch_cov or accumulating or probed",
            70,
            COUNTS | LARGE | PROBED | {"summary_kernel"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "test_op_registration.py",
            "opcheck or compiles or wrappers",
            23,
            COUNTS | {"summary_kernel"},
            marks=pytest.mark.slow,
        ),
        (
            "test_tracker.py",
            "",
            25,
            {"count_small_kernel", "gram_kernel, sides within a tile"},
        ),
        pytest.param(
            "test_accumulator.py",
            "not any_chunks and not thousand and not column_sums and not (lost and (chunks or window))",
            30,
            {"count_small_kernel", "gram_kernel, sides within a tile"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "test_tracker_modes.py",
            "micro_batches or wide or autocast or (checkpointed and not compiled)",
            7,
            {"count_small_kernel", "gram_kernel, sides within a tile"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "test_tracker_numbers.py",
            "by_place or sampled or certified",
            7,
            {"count_small_kernel", "gram_kernel, sides within a tile"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "test_bench_cuda.py",
            "hook",
            2,
            {"count_small_kernel", "gram_kernel, sides within a tile"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "test_complex.py",
            "",
            16,
            {"count_small_kernel", "gram_kernel, sides within a tile"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "test_hermitian.py",
            "",
            16,
            {"count_small_kernel", "gram_kernel, sides within a tile"},
            marks=pytest.mark.slow,
        ),
        ("test_device_sums.py", "measured", 1, {"gram_kernel, sides within a tile"}),
        ("test_without_nvcc.py", "", 3, {"gram_kernel, sides within a tile"}),
    ],
    ids=[
        "ops",
        "registration of ops",
        "tracker",
        "accumulator",
        "modes",
        "numbers",
        "hook path of the benchmark",
        "complex",
        "hermitian",
        "device sums",
        "without nvcc",
    ],
)
def test_the_private_ops_of_cuda(file: str, selection: str, tests: int, kernels: set[str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", str(ROOT / "tests" / file)]
    if selection:
        command += ["-k", selection]
    environment = {**os.environ, "BSGAP_VIRTUAL_GPU": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= tests
    launched = set(re.findall(r"^virtual GPU: \d+ x (.*)$", done.stdout, re.MULTILINE))
    assert launched >= kernels, launched
