"""What methods ended with beside each other: accuracy, gap, near-rank on the way, sharpness, cost."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bsgap_kernels.lab.directories import COMPARISON_FILE
from bsgap_kernels.lab.files import write_text
from bsgap_kernels.lab.fitted import FITTED
from bsgap_kernels.lab.report.rows import read_rows
from bsgap_kernels.lab.report.statistics import estimate
from bsgap_kernels.lab.results import METRICS_FILE, finite, read_summary
from bsgap_kernels.lab.study.analysis import measures_of

_SHARPNESS_FILE = "sharpness.json"
# Reads of the probe that are kept of a run, its first and last among them.
_KEPT = 25

Cell = tuple[str, int]
"""Method and batch size."""


def compare(summaries: Sequence[dict[str, Any]], directory: Path) -> list[dict[str, Any]]:
    """What each run of a sweep ended with and cost, also written to comparison.json in its directory.

    A run: method, batch_size, seed, lr, steps, `ended` and the target `until_fitted`, accuracies and gap
    (shares of 1), `near_rank_ratio` (mean over the layers, on the probe at the end), `near_rank_path` (the
    same at up to 25 steps on the way: pairs of step and ratio), `sharpness` (φ in the full space at ε = 1e-3,
    if it was measured), `gradient_images` (of how many images a gradient was taken), `train_seconds`,
    `method_summary`. What is missing is null.
    """
    runs = [_measured(summary, directory / summary["run"]) for summary in summaries]
    shared = {name: summaries[0].get(name) for name in ("model", "data", "budget", "threads", "versions")}
    content = finite({**shared, "runs": runs})
    write_text(directory / COMPARISON_FILE, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return runs


def _measured(summary: dict[str, Any], directory: Path) -> dict[str, Any]:
    measures = measures_of({"summary": summary})
    kept = ("method", "hyper", "batch_size", "seed", "lr", "steps", "epochs", "train_loss", "test_loss")
    return {
        **{name: summary.get(name) for name in (*kept, "until_fitted", "ended")},
        "train_accuracy": measures["train_accuracy"],
        "test_accuracy": measures["test_accuracy"],
        "generalization_gap": measures["generalization_gap"],
        "near_rank_ratio": measures["near_rank_ratio"],
        "near_rank_path": _path(directory),
        "sharpness": _sharpness(directory),
        "gradient_images": summary.get("gradient_images"),
        "train_seconds": summary.get("train_seconds"),
        "method_summary": summary.get("method_summary"),
    }


def _sharpness(directory: Path) -> float | None:
    """φ in the full space at ε = 1e-3; it may be 0."""
    for entry in read_summary(directory / _SHARPNESS_FILE).get("sharpness", []):
        if entry["space"] == "full" and math.isclose(entry["epsilon"], 1e-3):
            found: float | None = entry["phi"]
            return found
    return None


def _path(directory: Path) -> list[list[float]]:
    """Steps and mean ratio over the layers, where every layer has one."""
    problems: list[str] = []
    series = read_rows(directory / METRICS_FILE, problems).series
    ratios = [values for (_, metric), values in series.items() if metric == "probe.ratio"]
    if not ratios:
        return []
    steps = sorted(set.intersection(*(set(values) for values in ratios)))
    kept = np.unique(np.linspace(0, len(steps) - 1, min(_KEPT, len(steps))).round().astype(int))
    return [[steps[i], math.fsum(values[steps[i]] for values in ratios) / len(ratios)] for i in kept]


def cells_of(runs: Sequence[dict[str, Any]]) -> dict[Cell, list[dict[str, Any]]]:
    """Runs that differ by their seed alone, by method and batch size, in the order they are in."""
    cells: dict[Cell, list[dict[str, Any]]] = {}
    for run in runs:
        cells.setdefault((run["method"], run["batch_size"]), []).append(run)
    return cells


def format_comparison(runs: Sequence[dict[str, Any]]) -> str:
    """The comparison as text: a row a method and batch size, means over seeds ± half their 95 % interval."""
    header = ["method", "batch", "lr", "test acc %", "gap %", "near-rank on the way", "sharpness"]
    header += ["gradients", "time s"]
    rows = [
        [
            method,
            str(batch_size),
            f"{found[0]['lr']:.3g}",
            mean_of(found, "test_accuracy", _percent),
            mean_of(found, "generalization_gap", _percent),
            _on_the_way(found),
            mean_of(found, "sharpness", lambda value: f"{value:.3g}"),
            mean_of(found, "gradient_images", lambda value: f"{value:,.0f}", spread=False),
            mean_of(found, "train_seconds", lambda value: f"{value:.1f}", spread=False),
        ]
        for (method, batch_size), found in cells_of(runs).items()
    ]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, ["-" * width for width in widths], *rows]
    ]
    notes = (
        "Means over seeds ± half their 95 % interval. gap: train minus test accuracy. near-rank: mean ratio\n"
        "of the layers on the probe, at the start, after a third, two thirds, all of the updates.\n"
        "sharpness: φ in the full space at ε = 1e-3. gradients: images whose gradient was taken."
    )
    if lost := _named([run for run in runs if _lost(run)]):
        notes += f"\nDiverged, the training loss at the end is not finite: {lost}."
    until_fitted = [run for run in runs if run.get("until_fitted") is not None]
    if unfitted := _named([run for run in until_fitted if run["ended"] != FITTED]):
        notes += f"\nNot fitted when they ended, so not as well trained as the others: {unfitted}."
    return "\n".join([*lines, notes])


def _named(runs: Sequence[dict[str, Any]]) -> str:
    return "; ".join(f"{run['method']} at {run['batch_size']}, seed {run['seed']}" for run in runs)


def _lost(run: dict[str, Any]) -> bool:
    loss = run.get("train_loss", 0.0)
    return loss is None or not math.isfinite(loss)


def mean_of(
    runs: Sequence[dict[str, Any]], name: str, say: Callable[[float], str], *, spread: bool = True
) -> str:
    """The mean over runs, ± half its 95 % interval if they are several; a dash where one has no value."""
    values = [run[name] for run in runs]
    found = None if None in values else estimate(values)
    if found is None:
        return "-"
    if not spread or found.half is None:
        return say(found.mean)
    return f"{say(found.mean)} ± {say(found.half)}"


def _percent(share: float) -> str:
    text = f"{100 * share:.1f}"
    return "0.0" if text == "-0.0" else text


def _on_the_way(runs: Sequence[dict[str, Any]]) -> str:
    paths = [run["near_rank_path"] for run in runs]
    if not all(paths):
        return "-"
    said = []
    for share in (0, 1 / 3, 2 / 3, 1):
        ratios = [_read_near(path, share * path[-1][0]) for path in paths]
        mean = math.fsum(ratios) / len(ratios)
        said.append(f"{mean:.3f}" if math.isfinite(mean) else "-")
    return " → ".join(said)


def _read_near(path: list[list[float]], step: float) -> float:
    """The ratio at the read nearest to a step; NaN if that is a sixth of the run away or more."""
    found, ratio = min(path, key=lambda point: abs(point[0] - step))
    near = 6 * abs(found - step) < path[-1][0] or path[-1][0] == 0
    return ratio if near and ratio is not None else math.nan
