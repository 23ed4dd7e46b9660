"""Methods × batch sizes × seeds, one directory a run, and the table at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bsgap_kernels.lab.config import SweepConfig, TrainConfig, UserError
from bsgap_kernels.lab.data import ImageData
from bsgap_kernels.lab.directories import open_sweep
from bsgap_kernels.lab.launchers import Job, launch
from bsgap_kernels.lab.saved import load_run
from bsgap_kernels.lab.setup import data_of, set_up
from bsgap_kernels.lab.sharpness_run import SharpnessOptions, are_drawn, curves_of
from bsgap_kernels.lab.stop import NEVER, Stop, StoppedError
from bsgap_kernels.lab.threads import use_threads


class FailedRunsError(UserError):
    """Some runs of a sweep failed; `summaries` are those of the others, in their order."""

    def __init__(self, sentence: str, summaries: list[dict[str, Any]]) -> None:
        super().__init__(sentence)
        self.summaries = summaries


def sweep(config: SweepConfig, directory: Path, *, stop: Stop = NEVER) -> list[dict[str, Any]]:
    """Run every method at every batch size with every seed into sub-directories of `directory`.

    Every run is checked before the first one starts, so that a mistake costs no training. Runs that are done
    are skipped, runs that were stopped go on. A run that fails does not stop the others. Returns the
    summaries in the order of `config.runs()`, without those of runs that failed or were not reached.
    Once `stop` is set, no further run starts, and those under way are left where they can go on.

    Raises:
        UserError: an option does not fit, or `directory` holds something else and `config.overwrite` is not
            set; or, after all other runs, one failed.
        StoppedError: after all other runs, the process of one was asked to stop and this one was not.
    """
    runs = config.runs()
    data = data_of(runs[0])
    _check(runs, data)
    sharpness = SharpnessOptions(images=config.sharpness_images) if config.sharpness else None
    if sharpness is not None and (sharpness.images or 0) > len(data.train_labels):
        raise UserError(
            f"sharpness_images: got {sharpness.images}, expected at most the {len(data.train_labels)} "
            f"training images of {data.name}"
        )
    open_sweep(directory, config)
    jobs = [Job(run, directory / run.run, sharpness) for run in runs]
    summaries: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    stopped: dict[str, str] = {}
    for outcome in launch(jobs, config, data, stop):
        if outcome.stopped and not stop:
            stopped[outcome.run] = "its process was asked to stop"
        if outcome.summary is not None:
            summaries[outcome.run] = outcome.summary
        else:
            failures[outcome.run] = outcome.problem
    if sharpness is not None and not stop and not stopped:
        with contextlib.suppress(StoppedError):
            _draw_curves([job for job in jobs if job.config.run in summaries], data, sharpness, stop)
    done = [summaries[run.run] for run in runs if run.run in summaries]
    told = "; ".join(f"{run}: {problem}" for run, problem in (failures | stopped).items())
    if failures:
        count = len(failures | stopped)
        raise FailedRunsError(
            f"{count} of {len(runs)} runs failed ({told}); the others are in {directory}", done
        )
    if stopped and not stop:
        raise StoppedError(
            f"{len(stopped)} of {len(runs)} runs stopped ({told}); the same command on the same --out goes "
            "on there"
        )
    return done


def _check(runs: Sequence[TrainConfig], data: ImageData) -> None:
    with torch.random.fork_rng():
        for run in runs:
            set_up(run, data).close()


def _draw_curves(jobs: Sequence[Job], data: ImageData, options: SharpnessOptions, stop: Stop) -> None:
    """The loss between the smallest and the largest batch of each method's first seed."""
    for method in dict.fromkeys(job.config.method for job in jobs):
        own = [job for job in jobs if job.config.method == method]
        first_seed = [job for job in own if job.config.seed == own[0].config.seed]
        by_size = sorted(first_seed, key=lambda job: _rows(job.config, data))
        a, b = by_size[0].directory, by_size[-1].directory
        if len(by_size) > 1 and not are_drawn(a, b, options):
            with use_threads(by_size[0].config.threads):
                curves_of(a, b, options, saved=(load_run(a, data), load_run(b, data)), stop=stop)
            print(f"{a.name}, {b.name}: loss between them drawn", flush=True)


def _rows(config: TrainConfig, data: ImageData) -> int:
    return len(data.train_labels) if config.batch_size == "full" else int(config.batch_size)


def format_table(summaries: Sequence[dict[str, Any]]) -> str:
    """Two tables as text, a row a run: what it ended with, and what reading its layers cost."""
    sites = list(dict.fromkeys(site["site"] for summary in summaries for site in summary["sites"]))
    heads = ["batch size", "seed"]
    several = len({summary["method"] for summary in summaries}) > 1
    if several:
        heads.insert(0, "method")
    until_fitted = any(summary["until_fitted"] is not None for summary in summaries)
    ended = ["ended"] if until_fitted else []
    outcomes = [[*heads, "steps", *ended, "train acc", "test acc", "gap", *sites]]
    costs = [[*heads, "step ms", "metric ms", "metric %", "floor ms", "probe ms", "probes"]]
    for summary in summaries:
        ratios = {site["site"]: site["ratio"] for site in summary["sites"]}
        head = [summary["method"]] if several else []
        head += [str(summary["batch_size"]), str(summary["seed"])]
        outcomes.append(
            [
                *head,
                str(summary["steps"]),
                *([summary["ended"] or "-"] if until_fitted else []),
                _number(summary["train_accuracy"]),
                _number(summary["test_accuracy"]),
                _number(summary["generalization_gap"]),
                *(_number(ratios.get(site)) for site in sites),
            ]
        )
        costs.append(
            [
                *head,
                _milliseconds(summary["step_ms"]),
                _milliseconds(summary["metric_ms_per_step"]),
                _number(summary["metric_percent_of_step"], 1),
                _milliseconds(summary["metric_floor_ms"]),
                _milliseconds(summary["probe_ms"]),
                str(summary["probes"]),
            ]
        )
    notes = ["gap: train minus test accuracy. Layer columns: near-rank ratio on the probe batch at the end."]
    if until_fitted:
        notes.append(
            "ended: fitted at the target of train accuracy; stalled, its loss stopped falling; or its budget."
        )
    cost_notes = [
        "step: without the metric. metric: reading every layer on the training batch, mean per step and in",
        "% of it. floor: half a Gram matrix a layer at the float32 peak of the cores, measured in this run.",
        "probe: one reading of the probe batch, with certified intervals and spectra; probes: readings.",
    ]
    return "\n".join([*_aligned(outcomes), *notes, "", *_aligned(costs), *cost_notes])


def _aligned(rows: list[list[str]]) -> list[str]:
    """Lines of a table whose first row is its head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in [rows[0], ["-" * width for width in widths], *rows[1:]]
    ]


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None or value != value else f"{value:.{digits}f}"
