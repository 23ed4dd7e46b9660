"""Every CUDA kernel compiles for every architecture served, spills nothing and fits its shared memory."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import cuda_resources
import proven
import pytest

pytestmark = pytest.mark.torch_free

ROOT = Path(__file__).parent.parent


def check(rows: list[Any]) -> None:
    """Every kernel on every architecture, within its limits."""
    expected = {
        (k.name.replace(" ", ""), a) for k in cuda_resources.KERNELS for a in cuda_resources.ARCHITECTURES
    }
    assert {(r.kernel, r.architecture) for r in rows} == expected
    for r in rows:
        assert r.spill_stores == r.spill_loads == r.stack == 0, r
        assert r.static_shared + r.dynamic_shared <= 1024 * cuda_resources.ARCHITECTURES[r.architecture], r
        # 65536 registers of a multiprocessor, given out in eights.
        assert r.registers <= min(255, 65536 // r.threads // 8 * 8), r


@pytest.mark.slow
def test_kernels_fit_every_architecture() -> None:
    if cuda_resources.nvcc() is None:
        pytest.skip("needs nvcc")
    rows = cuda_resources.measure()
    check(rows)
    for r in rows:
        proven.note(r.kernel, proven.COMPILED, registers=r.registers, sm=r.architecture)


def test_committed_result_covers_every_kernel() -> None:
    rows = [
        cuda_resources.Resources(**row) for row in json.loads(cuda_resources.RESULT.read_text())["kernels"]
    ]
    check(rows)


def test_every_kernel_is_listed() -> None:
    listed = {(k.header, k.name.split("<")[0]) for k in cuda_resources.KERNELS}
    found = set()
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu*")):
        text = path.read_text()
        for match in re.finditer(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(", text):
            found.add((path.name, match.group(1)))
    assert listed == found
