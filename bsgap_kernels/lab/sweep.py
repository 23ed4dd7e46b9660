"""Batch sizes × seeds, one directory a run, and the table at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bsgap_kernels.lab import results
from bsgap_kernels.lab.config import SweepConfig
from bsgap_kernels.lab.data import load_data
from bsgap_kernels.lab.setup import set_up
from bsgap_kernels.lab.train import train


def sweep(config: SweepConfig, directory: Path) -> list[dict[str, Any]]:
    """Run every batch size with every seed into sub-directories of `directory`; return the summaries.

    Every run is checked before the first one starts, so that a mistake costs no training.

    Raises:
        UserError: an option does not fit, or `directory` holds something and `config.overwrite` is not set.
    """
    runs = config.runs()
    data = load_data(config.data, config.data_root, download=config.download, options=config.procedural)
    with torch.random.fork_rng():
        for run in runs:
            set_up(run, data).tracker.close()
    results.prepare_directory(directory, overwrite=config.overwrite)
    results.write_config(directory / results.SWEEP_FILE, config)
    return [train(run, directory / run.run, data=data) for run in runs]


def format_table(summaries: Sequence[dict[str, Any]]) -> str:
    """The sweep's table as text: one row a run, near-rank ratios of the probe at the end by layer."""
    sites = list(dict.fromkeys(site["site"] for summary in summaries for site in summary["sites"]))
    header = ["batch size", "seed", "steps", "train acc", "test acc", "gap", *sites, "metric %", "probe %"]
    rows = []
    for summary in summaries:
        ratios = {site["site"]: site["ratio"] for site in summary["sites"]}
        rows.append(
            [
                str(summary["batch_size"]),
                str(summary["seed"]),
                str(summary["steps"]),
                _number(summary["train_accuracy"]),
                _number(summary["test_accuracy"]),
                _number(summary["generalization_gap"]),
                *(_number(ratios.get(site)) for site in sites),
                _number(summary["metric_percent_of_step"], 0),
                _number(summary["probe_percent_of_step"], 0),
            ]
        )
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in [header, *rows]
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    note = (
        "gap: train minus test accuracy. Layer columns: near-rank ratio on the probe batch at the end.\n"
        "metric %, probe %: time per step of the metric on training batch and probe, in % of a step."
    )
    return "\n".join([*lines, note])


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None or value != value else f"{value:.{digits}f}"
