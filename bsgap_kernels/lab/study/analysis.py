"""What the runs of a study show: effects with intervals over seeds, and a verdict on each declared claim."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from bsgap_kernels.lab.optional import require
from bsgap_kernels.lab.study.plan import Hypothesis, Plan

SHOWN = "showed"
SMALL = "showed, smaller than declared"
NONE = "not distinguishable from none"
OPPOSITE = "the opposite showed"
UNKNOWN = "not measured"


def measures_of(run: dict[str, Any]) -> dict[str, float | None]:
    """The measures of one run that hypotheses are about, from its summary and its sharpness.

    `run` holds `summary` and, where it was measured, `sharpness` (the contents of summary.json and
    sharpness.json). What is missing or not finite is None.
    """
    summary, sharpness = run["summary"], run.get("sharpness") or {}
    sites = summary.get("sites", [])
    # A count of -1 says that the activations were not finite.
    known = [site["ratio"] for site in sites if site.get("ratio") is not None and site["near_rank"] >= 0]
    phi = {
        entry["space"]: entry["phi"]
        for entry in sharpness.get("sharpness", [])
        if math.isclose(entry["epsilon"], 1e-3)
    }
    return {
        "near_rank_ratio": statistics.fmean(known) if known and len(known) == len(sites) else None,
        "test_accuracy": summary.get("test_accuracy"),
        "train_accuracy": summary.get("train_accuracy"),
        "generalization_gap": summary.get("generalization_gap"),
        "log10_sharpness_full": _log10(phi.get("full")),
        "log10_sharpness_subspace": _log10(phi.get("subspace")),
        "log10_hessian": _log10((sharpness.get("hessian") or {}).get("max_eigenvalue")),
    }


def _log10(value: float | None) -> float | None:
    return math.log10(value) if value is not None and math.isfinite(value) and value > 0 else None


def mean_interval(values: Sequence[float], level: float) -> tuple[float, float, float]:
    """Mean of independent values and its Student t interval, infinite for fewer than two values."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, -math.inf, math.inf
    t = float(require("scipy.stats").t.ppf(0.5 + level / 2, len(values) - 1))
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def slope_per_doubling(points: Sequence[tuple[float, float]]) -> float:
    """Least-squares slope of y over log2 x."""
    return float(
        statistics.linear_regression([math.log2(x) for x, _ in points], [y for _, y in points]).slope
    )


def effects(hypothesis: Hypothesis, runs: Sequence[dict[str, Any]]) -> tuple[dict[int, float], list[str]]:
    """The hypothesis's effect of each seed, and why seeds are left out.

    `runs` are all of one experiment and budget, each {"batch_size", "seed", "measures"}. A seed counts only
    with every batch size, so that no seed's slope is over other sizes than another's.
    """
    sizes = sorted({run["batch_size"] for run in runs})
    found: dict[int, float] = {}
    problems = []
    if len(sizes) == 1:
        return found, [f"batch {sizes[0]} is the only size"]
    for seed in sorted({run["seed"] for run in runs}):
        of_seed = {run["batch_size"]: run["measures"] for run in runs if run["seed"] == seed}
        names = [name for name in (hypothesis.measure, hypothesis.against) if name]
        missing = [size for size in sizes if any(of_seed.get(size, {}).get(name) is None for name in names)]
        if missing:
            listed = ", ".join(map(str, missing))
            problems.append(f"seed {seed} has no {' or '.join(names)} at batch {listed}")
            continue
        values = [of_seed[size][hypothesis.measure] for size in sizes]
        if hypothesis.against is None:
            found[seed] = slope_per_doubling(list(zip(sizes, values, strict=True)))
            continue
        others = [of_seed[size][hypothesis.against] for size in sizes]
        if len(set(values)) == 1 or len(set(others)) == 1:
            problems.append(f"seed {seed}: {' or '.join(names)} does not vary")
        else:
            found[seed] = float(require("scipy.stats").spearmanr(values, others).statistic)
    return found, problems


def verdict(hypothesis: Hypothesis, lower: float, upper: float) -> str:
    """Where an effect's interval lies: beyond the declared margin, beyond 0, over 0, or on the other side."""
    if hypothesis.direction == "falls":
        lower, upper = -upper, -lower
    if lower > hypothesis.margin:
        return SHOWN
    if lower > 0:
        return SMALL
    return OPPOSITE if upper < 0 else NONE


def judge(plan: Plan, runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every hypothesis on every experiment and budget: effect, interval, verdict, and what qualifies it.

    `runs` are {"experiment", "budget", "batch_size", "seed", "measures"}.
    """
    judged = []
    for experiment in plan.experiments:
        for budget in experiment.budgets:
            cell = [run for run in runs if (run["experiment"], run["budget"]) == (experiment.name, budget)]
            spread = training_spread(cell)
            for hypothesis in plan.hypotheses:
                found, problems = effects(hypothesis, cell)
                entry: dict[str, Any] = {
                    "experiment": experiment.name,
                    "budget": budget,
                    "hypothesis": hypothesis.name,
                    "level": plan.level(hypothesis),
                    "seeds": len(found),
                    "effects": found,
                    "problems": problems,
                    "equally_trained": spread is not None and spread <= plan.equally_trained,
                }
                if found:
                    mean, lower, upper = mean_interval(list(found.values()), entry["level"])
                    entry["verdict"] = verdict(hypothesis, lower, upper)
                    bounded = math.isfinite(lower) and math.isfinite(upper)
                    entry |= {"effect": mean, "lower": None, "upper": None}
                    if bounded:
                        entry |= {"lower": lower, "upper": upper}
                    else:
                        entry["problems"] = [*problems, "one seed has no interval"]
                else:
                    entry |= {"effect": None, "lower": None, "upper": None, "verdict": UNKNOWN}
                judged.append(entry)
    return judged


def training_spread(runs: Sequence[dict[str, Any]]) -> float | None:
    """Largest difference of mean train accuracy between batch sizes; None where one has none."""
    means = []
    for size in sorted({run["batch_size"] for run in runs}):
        values = [run["measures"]["train_accuracy"] for run in runs if run["batch_size"] == size]
        if not values or any(value is None for value in values):
            return None
        means.append(statistics.fmean(values))
    return max(means) - min(means) if means else None
