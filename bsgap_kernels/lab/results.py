"""Files of a run: config.yaml, metrics.jsonl, summary.json."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any

from bsgap_kernels.lab.config import RunOptions, UserError
from bsgap_kernels.tracking import SiteRecord
from bsgap_kernels.tracking.sinks.jsonl import JsonlSink

CONFIG_FILE = "config.yaml"
SWEEP_FILE = "sweep.yaml"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
REPORT_FILE = "report.html"
_RUN_FILES = (CONFIG_FILE, METRICS_FILE, SUMMARY_FILE)


class MetricWriter(JsonlSink):
    """A metrics.jsonl: rows (run, attempt, step, site, metric, value), one JSON object a line."""

    def add_records(self, step: int, view: str, records: dict[str, SiteRecord]) -> None:
        """Add everything one read of the sites gave, as metrics of that view."""
        for site, record in records.items():
            self.add(step, site, f"{view}.near_rank", record.near_rank)
            self.add(step, site, f"{view}.ratio", record.ratio)
            self.add(step, site, f"{view}.lower", record.lower)
            self.add(step, site, f"{view}.upper", record.upper)
            for column, value in record.summary.items():
                self.add(step, site, f"{view}.{column}", value)
        self.flush_if_due()


class NoWriter:
    """The writer of a process that writes nothing."""

    def __enter__(self) -> NoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def add(self, step: int, site: str, metric: str, value: float) -> None:
        """Nothing is kept."""

    def add_records(self, step: int, view: str, records: dict[str, SiteRecord]) -> None:
        """Nothing is kept."""


Writer = MetricWriter | NoWriter


def open_writer(directory: Path, run: str, *, write: bool = True) -> Writer:
    """The writer of a run's metrics.jsonl, or one that writes nothing."""
    return MetricWriter(directory / METRICS_FILE, run) if write else NoWriter()


def prepare_directory(directory: Path, *, overwrite: bool = False) -> None:
    """Make `directory`, or with `overwrite` take the files of earlier results out of it.

    Only files that this package writes are removed, so a mistyped path cannot cost anything else.

    Raises:
        UserError: it is a file; it holds something and `overwrite` is not set; or it holds no results to
            overwrite.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"out: {directory} is a file, expected a directory or a new path")
    if directory.is_dir() and any(directory.iterdir()):
        if not overwrite:
            raise UserError(
                f"out: {directory} already exists and is not empty; name another one or give --overwrite"
            )
        runs = [path.parent for path in directory.glob(f"*/{CONFIG_FILE}")]
        if not runs and not any((directory / name).is_file() for name in (CONFIG_FILE, SWEEP_FILE)):
            raise UserError(
                f"out: {directory} holds no {CONFIG_FILE} or {SWEEP_FILE}, so it is not overwritten"
            )
        for run in [*runs, directory]:
            for name in (*_RUN_FILES, SWEEP_FILE, REPORT_FILE):
                (run / name).unlink(missing_ok=True)
            if run is not directory and not any(run.iterdir()):
                run.rmdir()
    directory.mkdir(parents=True, exist_ok=True)


def write_config(path: Path, config: RunOptions) -> None:
    """Write the resolved options as YAML; the same file can be given back by --config."""
    import yaml

    with path.open("w", encoding="utf-8") as file:
        yaml.safe_dump(dataclasses.asdict(config), file, sort_keys=False, default_flow_style=None)


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Write summary.json, whole or not at all; non-finite numbers become null."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(_finite(summary), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
