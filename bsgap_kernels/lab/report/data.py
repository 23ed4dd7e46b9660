"""Read the result files of a run or a sweep, half-written ones included, into what the report shows.

Nothing here raises because of what a file holds: what cannot be read becomes a sentence in `problems`.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsgap_kernels.lab.report.rows import Rows, read_rows

CONFIG_FILE, METRICS_FILE, SUMMARY_FILE = "config.yaml", "metrics.jsonl", "summary.json"
RUN_FILES = (CONFIG_FILE, METRICS_FILE, SUMMARY_FILE)


class ReportError(ValueError):
    """There is nothing to report on; the message is one sentence that names the path and what is expected."""


@dataclass
class Site:
    """What one layer ended with on the probe batch; None where the files do not say."""

    name: str
    probe_shape: tuple[int, int] | None = None
    near_rank: float | None = None
    lower: float | None = None
    upper: float | None = None
    ratio: float | None = None
    null_near_rank: float | None = None
    null_ratio: float | None = None


@dataclass
class Trajectory:
    """Near-rank of one layer on the probe at every step that has one; NaN where it was null or −1."""

    steps: NDArray[np.int64]
    near_rank: NDArray[np.float64]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    ratio: NDArray[np.float64]

    def thinned(self, limit: int) -> Trajectory:
        """At most `limit` steps, evenly spaced in the recorded ones, first and last kept, no averages."""
        if len(self.steps) <= limit:
            return self
        kept = np.unique(np.linspace(0, len(self.steps) - 1, limit).round().astype(np.int64))
        return Trajectory(
            self.steps[kept], self.near_rank[kept], self.lower[kept], self.upper[kept], self.ratio[kept]
        )


@dataclass
class Run:
    """One run; None where the files do not say."""

    name: str
    batch_size: int | None = None
    full_batch: bool = False
    seed: int | None = None
    status: str | None = None
    steps: int | None = None
    epochs: float | None = None
    train_accuracy: float | None = None
    test_accuracy: float | None = None
    gap: float | None = None
    step_ms: float | None = None
    metric_ms: float | None = None
    metric_percent: float | None = None
    probe_ms: float | None = None
    facts: dict[str, str] = field(default_factory=dict)
    sites: dict[str, Site] = field(default_factory=dict)
    trajectories: dict[str, Trajectory] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Batch size in words: `128`, `1437 (full)`, `full`, or the run's name where it is unknown."""
        if self.batch_size is None:
            return "full" if self.full_batch else self.name
        return f"{self.batch_size} (full)" if self.full_batch else str(self.batch_size)


@dataclass
class Results:
    """Every run of a directory, ordered by batch size and seed."""

    directory: Path
    runs: list[Run]
    problems: list[str] = field(default_factory=list)

    @property
    def sites(self) -> list[str]:
        """Every layer, in forward order."""
        return list(dict.fromkeys(name for run in self.runs for name in (*run.sites, *run.trajectories)))

    @property
    def batch_labels(self) -> list[str]:
        """Every batch size in words, smallest first."""
        return list(dict.fromkeys(run.label for run in self.runs))

    def of(self, label: str) -> list[Run]:
        """The runs of one batch size, one a seed."""
        return [run for run in self.runs if run.label == label]


def load_results(directory: Path) -> Results:
    """Read a sweep directory or the directory of one run.

    Raises:
        ReportError: there is no such directory, or nothing in it can be used.
    """
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise ReportError(
            f"{directory} {what}; expected a directory of results as `bsgap sweep` or `bsgap train` writes it"
        )
    single = _is_run(directory)
    try:
        folders = [directory] if single else sorted(child for child in directory.iterdir() if _is_run(child))
    except OSError as error:
        raise ReportError(f"{directory} cannot be read: {error.strerror}") from error
    runs = [run for run in map(_load_run, folders) if run is not None]
    if not runs:
        raise ReportError(
            f"{directory} holds no results: expected {', '.join(RUN_FILES)} in it or in its sub-directories"
        )
    results = Results(directory, runs)
    usable = {run.name for run in runs}
    for folder in folders:
        if _name_of(folder) not in usable:
            results.problems.append(f"{folder.name}: nothing in it can be read, so it is left out.")
    if not single:
        _check_sweep(results)
    known = {run.batch_size for run in runs if run.full_batch and run.batch_size}
    for run in runs:
        if run.full_batch and run.batch_size is None and len(known) == 1:
            run.batch_size = next(iter(known))
        if run.batch_size is None:
            run.problems.append(
                "its batch size in samples is not recorded: it is not drawn against batch size."
            )
    runs.sort(key=lambda run: (run.batch_size or math.inf, run.full_batch, run.seed or 0, run.name))
    return results


def _is_run(path: Path) -> bool:
    return path.is_dir() and any((path / name).is_file() for name in RUN_FILES)


def _name_of(folder: Path) -> str:
    return folder.resolve().name


def _check_sweep(results: Results) -> None:
    """Name the runs that sweep.yaml announces and that are not there."""
    path = results.directory / "sweep.yaml"
    problems: list[str] = []
    sweep = _read_yaml(path, problems) if path.is_file() else {}
    results.problems += problems
    sizes, seeds = sweep.get("batch_sizes"), sweep.get("seeds")
    if not isinstance(sizes, list) or not isinstance(seeds, list):
        return
    present = {run.name for run in results.runs}
    missing = [name for size in sizes for seed in seeds if (name := f"b{size}-s{seed}") not in present]
    if missing:
        results.problems.append(
            f"{len(missing)} of {len(sizes) * len(seeds)} runs of the sweep are not there: "
            + ", ".join(missing[:12])
            + (", …" if len(missing) > 12 else ".")
        )


def _load_run(folder: Path) -> Run | None:
    """One run, or None where no file of it can be read."""
    run = Run(_name_of(folder))
    config = _read_yaml(folder / CONFIG_FILE, run.problems)
    summary = _read_json(folder / SUMMARY_FILE, run.problems)
    rows = read_rows(folder / METRICS_FILE, run.problems)
    if not config and not summary and not rows.series:
        return None
    _take_facts(run, config, summary)
    _take_sites(run, summary)
    _take_rows(run, rows)
    if run.status == "stopped":
        run.problems.append(
            f"it was stopped after {run.steps if run.steps is not None else 'unknown'} steps."
        )
    if not run.trajectories:
        run.problems.append("it has no probe rows, so it is missing from the figures over steps.")
    return run


def _read_yaml(path: Path, problems: list[str]) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{path.name} is missing.")
        return {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        problems.append(f"{path.name} cannot be read.")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{path.name} holds no options.")
        return {}
    return content


def _read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        problems.append(
            f"{path.name} is missing (the run did not finish): its numbers are taken from {METRICS_FILE}."
        )
        return {}
    except (OSError, ValueError, RecursionError):
        problems.append(f"{path.name} cannot be read: its numbers are taken from {METRICS_FILE}.")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{path.name} holds no summary: its numbers are taken from {METRICS_FILE}.")
        return {}
    return content


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _count(value: Any) -> int | None:
    number = _number(value)
    return int(number) if number is not None and 0 <= number < 2**53 else None


def _take_facts(run: Run, config: dict[str, Any], summary: dict[str, Any]) -> None:
    """The head of the report and the row of the table."""
    from_name = re.fullmatch(r"b(\d{1,15}|full)-s(\d{1,15})", run.name)
    size = config.get("batch_size", from_name[1] if from_name else None)
    run.full_batch = size == "full"
    run.batch_size = _count(summary.get("batch_size")) or _count(size)
    if run.batch_size is None and from_name and from_name[1] != "full":
        run.batch_size = int(from_name[1])
    for value in (summary.get("seed"), config.get("seed"), int(from_name[2]) if from_name else None):
        run.seed = _count(value) if run.seed is None else run.seed
    status = summary.get("status")
    run.status = status if isinstance(status, str) else None
    run.steps, run.epochs = _count(summary.get("steps")), _number(summary.get("epochs"))
    run.train_accuracy, run.test_accuracy = (
        _number(summary.get("train_accuracy")),
        _number(summary.get("test_accuracy")),
    )
    run.gap = _number(summary.get("generalization_gap"))
    run.step_ms, run.metric_ms = _number(summary.get("step_ms")), _number(summary.get("metric_ms_per_step"))
    run.metric_percent = _number(summary.get("metric_percent_of_step"))
    run.probe_ms = _number(summary.get("probe_ms_per_step"))
    for key in (
        "model",
        "data",
        "budget",
        "lr",
        "lr_rule",
        "momentum",
        "rtol",
        "atol",
        "unfold",
        "center",
        "device",
    ):
        value = summary.get(key, config.get(key))
        if isinstance(value, (str, int, float)):
            run.facts[key] = str(value)
    if "budget" not in run.facts:
        for unit in ("steps", "epochs"):
            if (amount := _count(config.get(unit))) is not None:
                run.facts["budget"] = f"{amount} {unit}"
                break
    versions = summary.get("versions")
    if isinstance(versions, dict):
        run.facts["versions"] = ", ".join(
            f"{key} {value}" for key, value in versions.items() if value is not None
        )


def _take_sites(run: Run, summary: dict[str, Any]) -> None:
    sites = summary.get("sites")
    for entry in sites if isinstance(sites, list) else []:
        if not isinstance(entry, dict) or not isinstance(entry.get("site"), str):
            run.problems.append(f"{SUMMARY_FILE} holds a layer without a name.")
            continue
        shape = entry.get("probe_shape")
        sizes = [_count(size) for size in shape] if isinstance(shape, list) else []
        site = Site(entry["site"])
        # A count of -1 says that the activations were not finite: ratio and bounds then say nothing.
        failed = (_number(entry.get("near_rank")) or 0) < 0
        for key in ("near_rank", "lower", "upper", "ratio", "null_near_rank", "null_ratio"):
            if not failed or key.startswith("null"):
                setattr(site, key, _number(entry.get(key)))
        if len(sizes) == 2 and sizes[0] is not None and sizes[1] is not None:
            site.probe_shape = (sizes[0], sizes[1])
        run.sites[site.name] = site


def _take_rows(run: Run, rows: Rows) -> None:
    """Trajectories, and whatever the summary did not say."""
    names = dict.fromkeys(site for site, metric in rows.series if site and metric.startswith("probe."))
    for name in (
        *(name for name in run.sites if name in names),
        *(name for name in names if name not in run.sites),
    ):
        by_metric = {
            metric: rows.series.get((name, f"probe.{metric}"), {})
            for metric in ("near_rank", "lower", "upper", "ratio")
        }
        steps = np.array(sorted(set().union(*by_metric.values())), dtype=np.int64)
        columns = {
            metric: np.array([values.get(step, math.nan) for step in steps.tolist()], dtype=np.float64)
            for metric, values in by_metric.items()
        }
        failed = (columns["near_rank"] < 0) | np.isnan(columns["near_rank"])
        if failed.any():
            run.problems.append(
                f"{name}: {int(failed.sum())} of {len(steps)} near-ranks on the probe have no value "
                f"(first at step {int(steps[failed][0])}): the activations were not finite there, or "
                "nothing was written."
            )
        for values in columns.values():
            values[failed] = math.nan
        run.trajectories[name] = Trajectory(steps, **columns)
        site = run.sites.setdefault(name, Site(name))
        for metric, values in columns.items():
            if getattr(site, metric) is None and len(values) and math.isfinite(values[-1]):
                setattr(site, metric, float(values[-1]))
    if run.steps is None and rows.last_step is not None:
        run.steps = rows.last_step
    run.train_accuracy = (
        _last(rows, "train_eval.accuracy") if run.train_accuracy is None else run.train_accuracy
    )
    run.test_accuracy = _last(rows, "test.accuracy") if run.test_accuracy is None else run.test_accuracy
    if run.gap is None and run.train_accuracy is not None and run.test_accuracy is not None:
        run.gap = run.train_accuracy - run.test_accuracy
    updates = len(rows.series.get(("", "time.step_ms"), {}))
    run.step_ms = _per_step(rows, "time.step_ms", updates) if run.step_ms is None else run.step_ms
    run.metric_ms = _per_step(rows, "time.metric_ms", updates) if run.metric_ms is None else run.metric_ms
    run.probe_ms = _per_step(rows, "time.probe_ms", updates) if run.probe_ms is None else run.probe_ms
    if run.metric_percent is None and run.metric_ms is not None and run.step_ms:
        run.metric_percent = 100 * run.metric_ms / run.step_ms


def _last(rows: Rows, metric: str) -> float | None:
    values = rows.series.get(("", metric), {})
    finite = [step for step, value in values.items() if math.isfinite(value)]
    return values[max(finite)] if finite else None


def _per_step(rows: Rows, metric: str, updates: int) -> float | None:
    """Total time of `metric` divided by the number of updates."""
    finite = [value for value in rows.series.get(("", metric), {}).values() if math.isfinite(value)]
    return sum(finite) / updates if finite and updates else None
