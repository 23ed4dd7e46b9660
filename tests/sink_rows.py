"""Rows that tests of sinks write, and how they are read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bsgap_kernels.tracking.rows import Row

SITES = ("relu1#0", "layers.2.8.act2#0")


def rows_of(steps: range, scale: float = 1.0) -> list[Row]:
    """One row a site and step."""
    return [Row(step, site, "probe.ratio", scale * step / 7) for step in steps for site in SITES]


def write(sink: Any, rows: list[Row]) -> None:
    """Write rows and close the sink."""
    sink.write(rows)
    sink.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def tensorboard_scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by tag, as TensorBoard's own reader has them."""
    module = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    events = module.EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
