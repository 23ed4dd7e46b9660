"""Runs that are stopped at a step, for tests of methods: one that goes on is one that nothing disturbed."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from lab_data import small_data

from bsgap_kernels.lab import loop
from bsgap_kernels.lab.config import TrainConfig
from bsgap_kernels.lab.stop import Stop
from bsgap_kernels.lab.train import train


def values(directory: Path) -> dict[tuple[int, str, str], Any]:
    """Every value by step, site and metric; times and resumptions apart."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    kept = [row for row in rows if not row["metric"].startswith(("time.", "resume."))]
    found = {(row["step"], row["site"], row["metric"]): row["value"] for row in kept}
    assert len(found) == len(kept)
    return found


def train_until(step: int, directory: Path, settings: TrainConfig) -> dict[str, Any]:
    """Train, and be asked to stop while the update before `step` is under way."""
    stop = Stop()
    original = loop.Loop._update

    def update(self: Any, *arguments: Any) -> Any:
        if self.done == step - 1:
            stop.ask(signal.SIGTERM)
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Loop, "_update", update)
        return train(settings, directory, data=small_data(), stop=stop)


def assert_goes_on(settings: TrainConfig, steps: tuple[int, ...], directory: Path) -> dict[str, Any]:
    """Stopped after each of these steps and run again, a run has the values and weights of the whole one."""
    whole = train(settings, directory / "whole", data=small_data())
    for step in steps:
        parts = directory / str(step)
        assert train_until(step, parts, settings)["steps"] == step
        again = train(settings, parts, data=small_data())
        assert values(parts) == values(directory / "whole")
        assert again["weights_sha256"] == whole["weights_sha256"]
        assert again["gradient_images"] == whole["gradient_images"]
    return whole
