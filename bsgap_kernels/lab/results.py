"""What a run writes: rows of metrics.jsonl, summary.json, and the weights at its end."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from bsgap_kernels.lab.files import sha256_of_tensors, write_atomically, write_text
from bsgap_kernels.tracking import SiteRecord
from bsgap_kernels.tracking.sinks.jsonl import JsonlSink

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
WEIGHTS_FILE = "weights.pt"
FINISHED, STOPPED = "finished", "stopped"


class MetricWriter(JsonlSink):
    """A metrics.jsonl: rows (run, attempt, step, site, metric, value), one JSON object a line."""

    def add_records(self, step: int, view: str, records: dict[str, SiteRecord], *, certified: bool) -> None:
        """Add everything one read of the sites gave, as metrics of that view; bounds only if `certified`."""
        for site, record in records.items():
            self.add(step, site, f"{view}.near_rank", record.near_rank)
            self.add(step, site, f"{view}.ratio", record.ratio)
            if certified:
                self.add(step, site, f"{view}.lower", record.lower)
                self.add(step, site, f"{view}.upper", record.upper)
            for column, value in record.summary.items():
                self.add(step, site, f"{view}.{column}", value)
        self.flush_if_due()

    def sync(self) -> None:
        """Bring every row so far to the disk."""
        self.flush()
        os.fsync(self._file.fileno())


class NoWriter:
    """The writer of a process that writes nothing."""

    attempt = 0

    def __enter__(self) -> NoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def add(self, step: int, site: str, metric: str, value: float) -> None:
        """Nothing is kept."""

    def add_records(self, step: int, view: str, records: dict[str, SiteRecord], *, certified: bool) -> None:
        """Nothing is kept."""

    def sync(self) -> None:
        """Nothing is kept."""


Writer = MetricWriter | NoWriter


def open_writer(directory: Path, run: str, first_step: int | None = None, *, write: bool = True) -> Writer:
    """The writer of a run's metrics.jsonl, or one that writes nothing.

    With `first_step` the run goes on there: the rows from that step on, which it writes again, are taken out,
    and its own carry the next attempt's number.
    """
    if not write:
        return NoWriter()
    path = directory / METRICS_FILE
    if first_step is None or not path.exists():
        return MetricWriter(path, run)
    return MetricWriter(path, run, attempt=last_attempt(path) + 1, first_step=first_step)


def last_attempt(path: Path) -> int:
    """The attempt of a file's last whole row; 0 if there is none."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - (1 << 16)))
        lines = file.read().split(b"\n")[:-1]
    for line in reversed(lines):
        try:
            return int(json.loads(line)["attempt"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0


def write_weights(path: Path, model: nn.Module) -> str:
    """Write a model's parameters and buffers, whole or not at all; return the SHA-256 of their bits."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    write_atomically(path, lambda file: torch.save({"model": state}, file))
    return sha256_of_tensors(state)


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Write summary.json, whole or not at all; non-finite numbers become null."""
    write_text(path, json.dumps(finite(summary), indent=2, allow_nan=False) + "\n")


def read_summary(path: Path) -> dict[str, Any]:
    """A summary.json, or nothing where there is none that can be read."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def finite(value: Any) -> Any:
    """The same with null for non-finite numbers, which JSON has not."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
