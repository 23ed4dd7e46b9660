"""Read the result files of a run or a sweep, half-written ones included, into what the report shows.

Nothing here raises because of what a file holds: what cannot be read becomes a sentence in `problems`.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from bsgap_kernels.lab.report.files import count, number, read_json, read_yaml, text
from bsgap_kernels.lab.report.landscape import load_curves, load_sharpness
from bsgap_kernels.lab.report.null import marchenko_pastur_near_rank
from bsgap_kernels.lab.report.rows import Rows, read_rows
from bsgap_kernels.lab.report.runs import PLAIN_METHOD, Reached, Results, Run, Site, Trajectory
from bsgap_kernels.lab.report.warmup import WARMUP_METHOD, WARMUP_METRICS, load_warmup

CONFIG_FILE, METRICS_FILE, SUMMARY_FILE = "config.yaml", "metrics.jsonl", "summary.json"
RUN_FILES = (CONFIG_FILE, METRICS_FILE, SUMMARY_FILE)
_RUN_NAME = re.compile(r"(?:(?P<method>[\w.+-]{1,60})-)?b(?P<size>\d{1,15}|full)-s(?P<seed>\d{1,15})")
_FACTS: tuple[str, ...] = (
    *("model", "data", "budget", "lr", "lr_rule", "momentum", "rtol", "atol", "unfold", "center", "device"),
    *("method", "augment", "precision", "threads", "micro_batch"),
)
# Options that say where a run was kept, not what it was.
_NO_OPTIONS = ("out", "overwrite", "fixture", "resume", "data_root")


class ReportError(ValueError):
    """There is nothing to report on; the message is one sentence that names the path and what is expected."""


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
    single = is_run(directory)
    try:
        folders = [directory] if single else sorted(child for child in directory.iterdir() if is_run(child))
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
    order = {method: place for place, method in enumerate(results.methods)}
    runs.sort(
        key=lambda run: (
            run.batch_size or math.inf,
            run.full_batch,
            order[run.method],
            run.seed or 0,
            run.name,
        )
    )
    for run in runs:
        # A method is told only where it tells runs apart.
        run.label = f"{run.batch_label} · {run.method}" if len(order) > 1 else run.batch_label
    results.curves = load_curves(directory, results.problems)
    return results


def is_run(path: Path) -> bool:
    """Return true for a directory with a run's files."""
    return path.is_dir() and any((path / name).is_file() for name in RUN_FILES)


def _name_of(folder: Path) -> str:
    return folder.resolve().name


def _check_sweep(results: Results) -> None:
    """Name the runs that sweep.yaml announces and that are not there."""
    path = results.directory / "sweep.yaml"
    problems: list[str] = []
    sweep = read_yaml(path, problems) if path.is_file() else {}
    results.problems += problems
    sizes, seeds = sweep.get("batch_sizes"), sweep.get("seeds")
    methods = sweep.get("methods") or [sweep.get("method") or PLAIN_METHOD]
    if not isinstance(sizes, list) or not isinstance(seeds, list) or not isinstance(methods, list):
        return
    names = [
        f"b{size}-s{seed}" if method == PLAIN_METHOD else f"{method}-b{size}-s{seed}"
        for method in methods
        for size in sizes
        for seed in seeds
    ]
    present = {run.name for run in results.runs}
    missing = [name for name in names if name not in present]
    if missing:
        results.problems.append(
            f"{len(missing)} of {len(names)} runs of the sweep are not there: "
            + ", ".join(missing[:12])
            + (", …" if len(missing) > 12 else ".")
        )


def _load_run(folder: Path) -> Run | None:
    """One run, or None where no file of it can be read."""
    run = Run(_name_of(folder))
    config = read_yaml(folder / CONFIG_FILE, run.problems)
    summary = read_json(
        folder / SUMMARY_FILE,
        run.problems,
        holds="summary",
        otherwise=f"its numbers are taken from {METRICS_FILE}",
        missing="the run did not finish",
    )
    _take_facts(run, config, summary)
    if run.diverged:
        run.problems.append("training diverged, its loss at the end is not finite.")
    more = WARMUP_METRICS if run.method == WARMUP_METHOD else frozenset[str]()
    rows = read_rows(folder / METRICS_FILE, run.problems, more)
    if not config and not summary and not rows.series:
        return None
    _take_speed(run, summary)
    _take_sites(run, summary)
    _take_rows(run, rows)
    _take_law(run, config, summary)
    run.sharpness = load_sharpness(folder, run.problems)
    if run.method == WARMUP_METHOD:
        run.warmup = load_warmup(summary, rows.series)
    if run.status == "stopped":
        run.problems.append(
            f"it was stopped after {run.steps if run.steps is not None else 'unknown'} steps."
        )
    if not run.trajectories:
        run.problems.append("it has no probe rows, so it is missing from the figures over steps.")
    return run


def _take_facts(run: Run, config: dict[str, Any], summary: dict[str, Any]) -> None:
    """The head of the report and the row of the table."""
    from_name = _RUN_NAME.fullmatch(run.name)
    named: dict[str, str | None] = from_name.groupdict() if from_name else {}
    size = config.get("batch_size", named.get("size"))
    run.full_batch = size == "full"
    run.batch_size = count(summary.get("batch_size")) or count(size)
    if run.batch_size is None and named.get("size") not in (None, "full"):
        run.batch_size = int(named["size"] or 0)
    for value in (summary.get("seed"), config.get("seed"), int(named["seed"] or 0) if named else None):
        run.seed = count(value) if run.seed is None else run.seed
    methods = (
        text(content) for content in (summary.get("method"), config.get("method"), named.get("method"))
    )
    run.method = next(filter(None, methods), PLAIN_METHOD)
    run.synthetic = summary.get("synthetic") is True
    status = summary.get("status")
    run.status = status if isinstance(status, str) else None
    run.steps, run.epochs = count(summary.get("steps")), number(summary.get("epochs"))
    run.train_accuracy, run.test_accuracy = (
        number(summary.get("train_accuracy")),
        number(summary.get("test_accuracy")),
    )
    run.gap = number(summary.get("generalization_gap"))
    run.train_loss = _train_loss(run, summary)
    run.step_ms, run.metric_ms = number(summary.get("step_ms")), number(summary.get("metric_ms_per_step"))
    run.metric_percent = number(summary.get("metric_percent_of_step"))
    run.floor_ms = number(summary.get("metric_floor_ms"))
    run.probe_ms, run.probes = number(summary.get("probe_ms")), count(summary.get("probes"))
    run.until_fitted = number(summary.get("until_fitted", config.get("until_fitted")))
    run.ended = text(summary.get("ended"))
    hyper = summary.get("hyper")
    hyper = hyper if isinstance(hyper, dict) else {}
    for key in _FACTS:
        value = summary.get(key, config.get(key, hyper.get(key)))
        if isinstance(value, (str, int, float)):
            run.facts[key] = str(value)
    if "budget" not in run.facts:
        for unit in ("steps", "epochs"):
            if (amount := count(config.get(unit))) is not None:
                run.facts["budget"] = f"{amount} {unit}"
                break
    versions = summary.get("versions")
    if isinstance(versions, dict):
        run.facts["versions"] = ", ".join(
            f"{key} {value}" for key, value in versions.items() if value is not None
        )
    _take_options(run, config)


def _train_loss(run: Run, summary: dict[str, Any]) -> float | None:
    """The loss at the end; NaN where it was not finite, which a finished run writes as null."""
    if "train_loss" not in summary:
        return None
    written = summary["train_loss"]
    lost = run.status == "finished" if written is None else isinstance(written, float)
    found = number(written)
    return math.nan if found is None and lost else found


def _take_options(run: Run, config: dict[str, Any], prefix: str = "") -> None:
    """Every option as text, for the comparison of two runs; a group's options carry its name."""
    for name, value in config.items():
        if not isinstance(name, str) or name in _NO_OPTIONS:
            continue
        if isinstance(value, dict) and not prefix:
            _take_options(run, value, f"{name}.")
            continue
        items = value if isinstance(value, list) else [value]
        words = ", ".join("none" if item is None else str(item) for item in items)
        run.options[prefix + name] = words if len(words) <= 200 else f"{words[:199]}…"


def _take_speed(run: Run, summary: dict[str, Any]) -> None:
    """Throughput, and when each target of test accuracy was reached."""
    run.gradient_images = count(summary.get("gradient_images"))
    run.images_per_second = number(summary.get("images_per_second"))
    run.train_seconds = number(summary.get("train_seconds"))
    targets = summary.get("time_to_accuracy")
    for key, reached in targets.items() if isinstance(targets, dict) else ():
        try:
            target = float(key)
        except ValueError:
            target = math.nan
        seconds = number(reached.get("seconds")) if isinstance(reached, dict) else None
        if not 0 < target <= 1 or (reached is not None and seconds is None):
            run.problems.append(f"{SUMMARY_FILE}: a time to accuracy cannot be read and is left out.")
        elif seconds is None:
            run.time_to_accuracy[target] = None
        else:
            steps, epochs = count(reached.get("steps")), number(reached.get("epochs"))
            run.time_to_accuracy[target] = Reached(seconds, steps, epochs)


def _take_law(run: Run, config: dict[str, Any], summary: dict[str, Any]) -> None:
    """Marchenko and Pastur's prediction for each layer, where shape and threshold are known."""
    tolerances = [number(summary.get(key, config.get(key))) for key in ("rtol", "atol")]
    rtol, atol = tolerances
    if (rtol is None and atol is None) or min(rtol or 0.0, atol or 0.0) < 0:
        return
    for site in run.sites.values():
        if site.probe_shape:
            site.law_near_rank = marchenko_pastur_near_rank(
                *site.probe_shape,
                # A bound on the singular values alone leaves the relative threshold at 0.
                rtol=rtol or 0.0,
                atol=atol,
                center=config.get("center") is True,
            )


def _take_sites(run: Run, summary: dict[str, Any]) -> None:
    sites = summary.get("sites")
    for entry in sites if isinstance(sites, list) else []:
        if not isinstance(entry, dict) or not isinstance(entry.get("site"), str):
            run.problems.append(f"{SUMMARY_FILE} holds a layer without a name.")
            continue
        shape = entry.get("probe_shape")
        sizes = [count(size) for size in shape] if isinstance(shape, list) else []
        site = Site(entry["site"])
        # A count of -1 says that the activations were not finite: ratio and bounds then say nothing.
        failed = (number(entry.get("near_rank")) or 0) < 0
        for key in ("near_rank", "lower", "upper", "ratio", "null_near_rank", "null_ratio"):
            if not failed or key.startswith("null"):
                setattr(site, key, number(entry.get(key)))
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
        # Of a run that diverged one sentence says it for all layers.
        if failed.any() and not run.diverged:
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
    if run.probe_ms is None:
        run.probes = len(rows.series.get(("", "time.probe_ms"), {})) or None
        run.probe_ms = _per_step(rows, "time.probe_ms", run.probes or 0)
    if run.metric_percent is None and run.metric_ms is not None and run.step_ms:
        run.metric_percent = 100 * run.metric_ms / run.step_ms


def _last(rows: Rows, metric: str) -> float | None:
    values = rows.series.get(("", metric), {})
    finite = [step for step, value in values.items() if math.isfinite(value)]
    return values[max(finite)] if finite else None


def _per_step(rows: Rows, metric: str, times: int) -> float | None:
    """Total time of `metric` divided by the number of updates, or of readings."""
    finite = [value for value in rows.series.get(("", metric), {}).values() if math.isfinite(value)]
    return sum(finite) / times if finite and times else None
