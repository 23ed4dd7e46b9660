"""The study's tables in Markdown, from its plan and its result alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from bsgap_kernels.lab.study.analysis import mean_interval
from bsgap_kernels.lab.study.plan import Hypothesis, Plan

_Cell = Callable[[Sequence[dict[str, Any]]], str]
"""What a column says of the runs of one batch size."""


def verdicts(plan: Plan, result: dict[str, Any]) -> str:
    """Every claim with its effect, interval and verdict in every experiment and budget."""
    lines = [
        "| claim | experiment | budget | effect | interval | would count | seeds | verdict |",
        "|---|---|---|--:|---|--:|--:|---|",
    ]
    for hypothesis in plan.hypotheses:
        for entry in result["hypotheses"]:
            if entry["hypothesis"] == hypothesis.name:
                lines.append(_verdict(hypothesis, entry))
    return "\n".join(lines)


def _verdict(hypothesis: Hypothesis, entry: dict[str, Any]) -> str:
    sign = "−" if hypothesis.direction == "falls" else "+"
    interval = "–"
    if entry["lower"] is not None:
        interval = f"[{_signed(entry['lower'])}, {_signed(entry['upper'])}] at {100 * entry['level']:.4g} %"
    verdict = entry["verdict"]
    if not entry["equally_trained"]:
        verdict += "; not equally trained"
    mark = "**" if hypothesis.primary else ""
    cells = [
        f"{mark}{hypothesis.claim}{mark}",
        entry["experiment"],
        entry["budget"],
        _signed(entry["effect"]),
        interval,
        f"beyond {sign}{hypothesis.margin:g}" if hypothesis.margin else f"beyond {sign}0",
        str(entry["seeds"]),
        verdict,
    ]
    return f"| {' | '.join(cells)} |"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3g}".replace("-", "−")


def outcomes(plan: Plan, result: dict[str, Any]) -> str:
    """What the runs of each batch size ended with: means over seeds, with 95 % intervals of the mean."""
    return _table(_groups(plan, result), [*_WHERE, *_MEASURES])


def ends(plan: Plan, result: dict[str, Any]) -> str:
    """A few of the outcomes, of the smallest and the largest batch alone."""
    cells: dict[tuple[str, str], list[list[dict[str, Any]]]] = {}
    for runs in _groups(plan, result):
        cells.setdefault((runs[0]["experiment"], runs[0]["budget"]), []).append(runs)
    extremes = [runs for groups in cells.values() for runs in (groups[0], groups[-1])]
    wanted = ("train acc.", "test acc.", "near-rank ratio", "φ full, 1e-3")
    return _table(extremes, [*_WHERE, *(column for column in _MEASURES if column[0] in wanted)])


def _table(groups: Sequence[Sequence[dict[str, Any]]], columns: Sequence[tuple[str, _Cell]]) -> str:
    lines = [
        f"| {' | '.join(head for head, _ in columns)} |",
        "|---|---" + "|--:" * (len(columns) - 2) + "|",
    ]
    lines += [f"| {' | '.join(cell(runs) for _, cell in columns)} |" for runs in groups]
    return "\n".join(lines)


def layers(plan: Plan, result: dict[str, Any]) -> str:
    """Near-rank of every layer on the probe at the end: means over seeds, and the shape's Gaussian null."""
    parts = []
    for experiment in plan.experiments:
        groups = [runs for runs in _groups(plan, result) if runs[0]["experiment"] == experiment.name]
        sites = groups[0][0]["sites"]
        heads = [
            f"{site['site'].split('#')[0]} (of {min(site['probe_shape'])}, null {site['null_near_rank']})"
            for site in sites
        ]
        lines = [
            f"| {experiment.name} | batch | {' | '.join(heads)} |",
            "|---|--:" + "|--:" * len(sites) + "|",
        ]
        for runs in groups:
            means = [
                f"{statistics.fmean(run['sites'][index]['near_rank'] for run in runs):.0f}"
                for index in range(len(sites))
            ]
            lines.append(f"| {runs[0]['budget']} | {runs[0]['batch_size']} | {' | '.join(means)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _groups(plan: Plan, result: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The runs of every experiment, budget and batch size."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for run in result["runs"]:
        groups.setdefault((run["experiment"], run["budget"], run["batch_size"]), []).append(run)
    return list(groups.values())


def _ratio(run: dict[str, Any]) -> float | None:
    ratios = [site["ratio"] for site in run["sites"]]
    return None if any(ratio is None for ratio in ratios) else statistics.fmean(ratios)


def _phi(run: dict[str, Any], space: str) -> float | None:
    found = [
        entry["phi"] for entry in run["sharpness"] if entry["space"] == space and entry["epsilon"] == 1e-3
    ]
    return found[0] if found else None


def _interval(
    runs: Sequence[dict[str, Any]], measure: Callable[[dict[str, Any]], float | None], digits: int
) -> str:
    values = [value for run in runs if (value := measure(run)) is not None]
    if not values:
        return "–"
    mean, _, upper = mean_interval(values, 0.95)
    text = f"{mean:.{digits}f}"
    if len(values) > 1:
        text += f" ± {upper - mean:.{digits}f}"
    return text if len(values) == len(runs) else f"{text} ({len(values)} of {len(runs)})"


def _mean(measure: Callable[[dict[str, Any]], float | None], digits: int) -> _Cell:
    return lambda runs: _interval(runs, measure, digits)


_WHERE: list[tuple[str, _Cell]] = [
    ("experiment", lambda runs: runs[0]["experiment"]),
    ("budget", lambda runs: runs[0]["budget"]),
    ("batch", lambda runs: str(runs[0]["batch_size"])),
    ("updates", lambda runs: f"{runs[0]['steps']:,}"),
]
_MEASURES: list[tuple[str, _Cell]] = [
    ("train acc.", _mean(lambda run: run["train_accuracy"], 3)),
    ("test acc.", _mean(lambda run: run["test_accuracy"], 3)),
    ("near-rank ratio", _mean(_ratio, 3)),
    ("φ full, 1e-3", _mean(lambda run: _phi(run, "full"), 1)),
    ("φ subspace, 1e-3", _mean(lambda run: _phi(run, "subspace"), 1)),
    ("train loss", _mean(lambda run: run["train_loss"], 4)),
    ("λ_max of the Hessian", _mean(lambda run: (run["hessian"] or {}).get("max_eigenvalue"), 1)),
]
