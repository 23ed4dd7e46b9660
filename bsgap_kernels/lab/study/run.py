"""The runs of a study, and its result: what every run ended with, and a verdict on every claim."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bsgap_kernels.bench.machine import describe
from bsgap_kernels.lab.checks import UserError
from bsgap_kernels.lab.config import SweepConfig
from bsgap_kernels.lab.directories import SHARPNESS_FILE
from bsgap_kernels.lab.files import write_text
from bsgap_kernels.lab.results import SUMMARY_FILE, finite, read_summary
from bsgap_kernels.lab.stop import NEVER, Stop
from bsgap_kernels.lab.study.analysis import judge, measures_of
from bsgap_kernels.lab.study.plan import Experiment, Plan
from bsgap_kernels.lab.sweep import sweep

RESULT_FILE = "study.json"
SCHEMA = 1
_KEPT = (
    "steps", "epochs", "lr", "train_accuracy", "test_accuracy", "generalization_gap", "train_loss",
    "test_loss", "images_per_second", "train_seconds", "time_to_accuracy", "weights_sha256",
)  # fmt: skip
_KEPT_OF_SITES = ("site", "probe_shape", "near_rank", "lower", "upper", "ratio", "null_near_rank")
_KEPT_OF_SHARPNESS = ("space", "dimension", "epsilon", "phi", "loss", "max_loss", "at_bound", "evaluations")


def cells(plan: Plan) -> Iterator[tuple[Experiment, str, str]]:
    """Every experiment with every budget, and the name of the directory of its sweep."""
    for experiment in plan.experiments:
        for budget in experiment.budgets:
            yield experiment, budget, f"{experiment.name}-{budget.replace(' ', '-')}"


def sweep_of(plan: Plan, experiment: Experiment, budget: str, jobs: int) -> SweepConfig:
    """The sweep of an experiment under a budget, its sharpness included."""
    return dataclasses.replace(experiment.sweep(budget, plan), jobs=jobs)


def run_study(
    plan: Plan,
    directory: Path,
    *,
    jobs: int = 2,
    stop: Stop = NEVER,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any] | None:
    """Run what is left of a study into `directory` and return its result; None if it was asked to stop.

    Each experiment and budget is a sweep in a directory of its own, with its report. Runs that are done are
    skipped, runs that were stopped go on.

    Raises:
        UserError: a run failed, or the directory holds results of another plan.
        StoppedError: the process of a run was asked to stop, and this one was not.
    """
    started = time.perf_counter()
    every = list(cells(plan))
    for number, (experiment, budget, name) in enumerate(every, start=1):
        config = sweep_of(plan, experiment, budget, jobs)
        what = f"{experiment.name} at {budget} ({config.budget}), {len(config.runs())} runs"
        say(f"{number} of {len(every)}: {what}")
        sweep(config, directory / name, stop=stop)
        if stop:
            return None
    return result_of(plan, directory, time.perf_counter() - started)


def result_of(plan: Plan, directory: Path, seconds: float | None = None) -> dict[str, Any]:
    """The content of study.json, from the files of the runs.

    Raises:
        UserError: a run is missing or not finished.
    """
    runs = []
    for experiment, budget, name in cells(plan):
        for config in experiment.sweep(budget, plan).runs():
            runs.append(_run(experiment.name, budget, directory / name / config.run))
    judged = judge(plan, runs)
    for run in runs:
        del run["measures"]
    return {
        "schema": SCHEMA,
        "plan_sha256": plan.sha256,
        "seconds": seconds,
        "runs": runs,
        "hypotheses": judged,
        **describe(),
    }


def _run(experiment: str, budget: str, directory: Path) -> dict[str, Any]:
    summary = read_summary(directory / SUMMARY_FILE)
    if summary.get("status") != "finished":
        raise UserError(f"{directory}: the run is not finished; run the study again")
    sites: list[Any] = summary["sites"] if isinstance(summary.get("sites"), list) else [None]
    if not all(isinstance(site, dict) for site in sites) or not {"batch_size", "seed"} <= summary.keys():
        raise UserError(f"{directory / SUMMARY_FILE}: holds no summary of a run; run the study again")
    sharpness = read_summary(directory / SHARPNESS_FILE)
    hessian = sharpness.get("hessian")
    return {
        "experiment": experiment,
        "budget": budget,
        "batch_size": summary["batch_size"],
        "seed": summary["seed"],
        **{key: summary.get(key) for key in _KEPT},
        "sites": [{key: site.get(key) for key in _KEPT_OF_SITES} for site in sites],
        "sharpness": [
            {key: entry.get(key) for key in _KEPT_OF_SHARPNESS} for entry in sharpness.get("sharpness", [])
        ],
        "sharpness_images": sharpness.get("images"),
        "hessian": hessian and {key: hessian.get(key) for key in ("max_eigenvalue", "residual")},
        "measures": measures_of({"summary": summary, "sharpness": sharpness}),
    }


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON, one run a line, so that a difference can be read.

    The file is there whole or not at all; non-finite numbers become null.
    """
    result = finite(result)
    runs = ",\n".join(f"  {json.dumps(run, allow_nan=False)}" for run in result["runs"])
    rest = json.dumps({**result, "runs": []}, indent=1, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, rest.replace('"runs": []', f'"runs": [\n{runs}\n ]', 1) + "\n")
