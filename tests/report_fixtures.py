"""Fixture runs for the tests of the report: invented numbers in the schema of real results, never results.

Every directory made here says so in its config (`fixture: true`). The numbers have the shape of real ones:
near-rank falls over training, faster for larger batches, and intervals are mostly single numbers.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import yaml

LENET = {"relu1#0": (512, 4704), "relu2#0": (512, 1600), "relu3#0": (512, 120), "relu4#0": (512, 84)}
SUMMARY_COLUMNS = (
    "sigma_max",
    "frobenius_norm",
    "stable_rank",
    "participation_ratio",
    "effective_rank",
    "rankme",
    "srank",
    "pca_rank",
    "feature_rank",
    "alpha_req",
)
TRAIN_ROWS = 1437


def layers(count: int) -> dict[str, tuple[int, int]]:
    """`count` layers of a made-up network, wide first."""
    return {f"stage{index}.relu#0": (512, max(1024 >> index, 40)) for index in range(count)}


def write_run(
    directory: Path,
    batch_size: int | str,
    seed: int = 0,
    *,
    steps: int = 60,
    sites: dict[str, tuple[int, int]] | None = None,
    every_metric: bool = True,
    wide_intervals: bool = False,
) -> Path:
    """One finished run, exactly in the schema; `every_metric=False` leaves out what the report skips."""
    sites = sites or LENET
    run = f"b{batch_size}-s{seed}"
    folder = directory / run
    folder.mkdir(parents=True)
    rows = TRAIN_ROWS if batch_size == "full" else int(batch_size)
    config = {
        "fixture": True,
        "data": "digits",
        "model": "lenet5",
        "lr": 0.02,
        "momentum": 0.9,
        "epochs": 20,
        "steps": None,
        "rtol": 0.01,
        "atol": None,
        "unfold": "flatten",
        "batch_size": batch_size,
        "seed": seed,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    random = np.random.default_rng([rows, seed])
    final: dict[str, dict[str, object]] = {}
    accuracies = {"train": 1 - 0.002 * math.log2(rows), "test": 0.99 - 0.004 * math.log2(rows) + 0.002 * seed}
    step_ms, metric_ms, probe_ms = 0.6 + 0.01 * rows, 0.4 + 0.006 * rows, 2.5

    with (folder / "metrics.jsonl").open("w") as file:

        def add(step: int, site: str, metric: str, value: float | None) -> None:
            row = {"run": run, "attempt": 0, "step": step, "site": site, "metric": metric, "value": value}
            file.write(json.dumps(row) + "\n")

        for step in range(steps + 1):
            for depth, (site, shape) in enumerate(sites.items()):
                smallest = min(shape)
                fall = (1 - math.exp(-4 * step / steps)) * min(
                    0.95, 0.09 * math.log2(rows) * (1 - 0.5 * depth / len(sites))
                )
                count = round(smallest * (1 - fall) + random.normal(0, 0.008 * smallest))
                count = min(max(count, 1), smallest)
                spread = 4 if wide_intervals and step % 3 else 0
                probe = {
                    "near_rank": count,
                    "ratio": count / smallest,
                    "lower": max(count - spread, 0),
                    "upper": min(count + spread, smallest),
                }
                if step == steps:
                    final[site] = dict(probe)
                for view in ("probe", "batch") if every_metric else ("probe",):
                    for name, value in probe.items():
                        add(step, site, f"{view}.{name}", value)
                    for column in SUMMARY_COLUMNS if every_metric else ():
                        # The slope cannot be fitted to few eigenvalues; what is not finite is null.
                        add(step, site, f"{view}.{column}", None if column == "alpha_req" else 12.5)
            if step < steps:
                add(step, "", "train.loss", 2.3 * math.exp(-5 * step / steps))
                add(step, "", "train.accuracy", 1 - math.exp(-5 * step / steps))
                add(step, "", "lr", 0.02)
                add(step, "", "time.step_ms", round(step_ms, 4))
                add(step, "", "time.metric_ms", round(metric_ms, 4))
            add(step, "", "time.probe_ms", round(probe_ms, 4))
            if step and (step % max(steps // 4, 1) == 0 or step == steps):
                done = 1 - math.exp(-6 * step / steps)
                for split, name in (("train", "train_eval"), ("test", "test")):
                    add(step, "", f"{name}.loss", 0.1)
                    add(
                        step,
                        "",
                        f"{name}.accuracy",
                        accuracies[split] if step == steps else done * accuracies[split],
                    )

    summary = {
        "run": run,
        "status": "finished",
        "model": "lenet5",
        "data": "digits",
        "batch_size": rows,
        "seed": seed,
        "lr": 0.02,
        "budget": "20 epochs",
        "steps": steps,
        "epochs": 20.0,
        "train_accuracy": accuracies["train"],
        "test_accuracy": accuracies["test"],
        "generalization_gap": accuracies["train"] - accuracies["test"],
        "train_loss": 0.01,
        "test_loss": 0.05,
        "sites": [
            {
                "site": site,
                "batch_shape": [rows, shape[1]],
                "probe_shape": list(shape),
                **final[site],
                "null_near_rank": min(shape),
                "null_ratio": 1.0,
            }
            for site, shape in sites.items()
        ],
        "metric_ms_per_step": metric_ms,
        "probe_ms_per_step": probe_ms * (steps + 1) / steps,
        "step_ms": step_ms,
        "metric_percent_of_step": 100 * metric_ms / step_ms,
        "versions": {"python": "3.11.7", "bsgap_kernels": "0.1.0", "torch": "2.15.0", "triton": None},
        "rtol": 0.01,
        "unfold": "flatten",
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return folder


def write_sweep(
    directory: Path,
    batch_sizes: tuple[int | str, ...] = (16, 128, "full"),
    seeds: tuple[int, ...] = (0,),
    *,
    steps: dict[int | str, int] | int = 60,
    **options: object,
) -> Path:
    """A finished sweep; `steps` is one number or a number per batch size."""
    directory.mkdir(parents=True, exist_ok=True)
    sweep = {"fixture": True, "batch_sizes": list(batch_sizes), "seeds": list(seeds)}
    (directory / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    for size in batch_sizes:
        for seed in seeds:
            count = steps[size] if isinstance(steps, dict) else steps
            write_run(directory, size, seed, steps=count, **options)  # type: ignore[arg-type]
    return directory
