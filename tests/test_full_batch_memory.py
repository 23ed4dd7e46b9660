"""The committed result of benchmarks/full_batch_memory.py: its verdict follows from its rows."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def benchmark_script() -> ModuleType:
    path = ROOT / "benchmarks" / "full_batch_memory.py"
    spec = importlib.util.spec_from_file_location("full_batch_memory", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(passes: tuple[int, int], one: tuple[int, int]) -> list[dict[str, Any]]:
    """Two sizes in both ways with these peaks."""
    return [
        {"micro_batch": micro_batch, "steps_bytes": peak, "run_bytes": peak}
        for micro_batch, peaks in ((128, passes), (None, one)) for peak in peaks
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("passes", "one", "met"),
    [
        ((100, 110), (100, 800), True),
        ((100, 112), (100, 800), False),
        ((100, 100), (100, 300), False),  # activations were not seen
    ],
)
def test_the_criterion(
    passes: tuple[int, int], one: tuple[int, int], met: bool, benchmark_script: ModuleType
) -> None:
    assert benchmark_script.verdict(rows(passes, one))["met"] is met


def test_a_peak_of_the_evaluation_counts_too(benchmark_script: ModuleType) -> None:
    measured = rows((100, 100), (100, 800))
    measured[1]["run_bytes"] = 200
    assert not benchmark_script.verdict(measured)["met"]


def test_the_result_is_whole_and_says_what_its_rows_do(benchmark_script: ModuleType) -> None:
    result = json.loads(benchmark_script.RESULT.read_text(encoding="utf-8"))
    assert {key: result[key] for key in ("growth", "met")} == benchmark_script.verdict(result["rows"])
    ways = (benchmark_script.MICRO_BATCH, None)
    expected = [(images, way) for way in ways for images in benchmark_script.IMAGES]
    assert [(row["images"], row["micro_batch"]) for row in result["rows"]] == expected
