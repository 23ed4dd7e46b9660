"""The committed result of benchmarks/full_batch_memory.py: its verdict follows from its rows."""

from __future__ import annotations

import json
from typing import Any

import full_batch_memory
import pytest


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
def test_the_criterion(passes: tuple[int, int], one: tuple[int, int], met: bool) -> None:
    assert full_batch_memory.verdict(rows(passes, one))["met"] is met


def test_a_peak_of_the_evaluation_counts_too() -> None:
    measured = rows((100, 100), (100, 800))
    measured[1]["run_bytes"] = 200
    assert not full_batch_memory.verdict(measured)["met"]


def test_the_result_is_whole_and_says_what_its_rows_do() -> None:
    result = json.loads(full_batch_memory.RESULT.read_text(encoding="utf-8"))
    assert {key: result[key] for key in ("growth", "met")} == full_batch_memory.verdict(result["rows"])
    ways = (full_batch_memory.MICRO_BATCH, None)
    expected = [(images, way) for way in ways for images in full_batch_memory.IMAGES]
    assert [(row["images"], row["micro_batch"]) for row in result["rows"]] == expected
