"""Every CUDA kernel compiles for every architecture served, spills nothing and fits its shared memory."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import proven
import pytest

pytestmark = pytest.mark.torch_free

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def resources() -> Iterator[ModuleType]:
    """benchmarks/cuda_resources.py."""
    name = "cuda_resources"
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


def check(resources: ModuleType, rows: list[Any]) -> None:
    """Every kernel on every architecture, within its limits."""
    expected = {(k.name.replace(" ", ""), a) for k in resources.KERNELS for a in resources.ARCHITECTURES}
    assert {(r.kernel, r.architecture) for r in rows} == expected
    for r in rows:
        assert r.spill_stores == r.spill_loads == r.stack == 0, r
        assert r.static_shared + r.dynamic_shared <= 1024 * resources.ARCHITECTURES[r.architecture], r
        # 65536 registers of a multiprocessor, given out in eights.
        assert r.registers <= min(255, 65536 // r.threads // 8 * 8), r


@pytest.mark.slow
def test_kernels_fit_every_architecture(resources: ModuleType) -> None:
    if resources.nvcc() is None:
        pytest.skip("needs nvcc")
    rows = resources.measure()
    check(resources, rows)
    for r in rows:
        proven.note(r.kernel, proven.COMPILED, registers=r.registers, sm=r.architecture)


def test_committed_result_covers_every_kernel(resources: ModuleType) -> None:
    rows = [resources.Resources(**row) for row in json.loads(resources.RESULT.read_text())["kernels"]]
    check(resources, rows)


def test_every_kernel_is_listed(resources: ModuleType) -> None:
    listed = {(k.header, k.name.split("<")[0]) for k in resources.KERNELS}
    found = set()
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu*")):
        text = path.read_text()
        for match in re.finditer(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(", text):
            found.add((path.name, match.group(1)))
    assert listed == found
