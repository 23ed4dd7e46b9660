"""The words of the report: head, table, findings and notices, from the results alone, HTML-escaped."""

from __future__ import annotations

import re
from html import escape

from bsgap_kernels.lab.report.data import Results, Run, Site
from bsgap_kernels.lab.report.figures_batch import mean, sized
from bsgap_kernels.lab.report.style import DASH, significant

# Beyond this many layers the table would not fit the page: the layers then get tables of their own.
LAYERS_PER_TABLE = 8


def number(value: float | None, digits: int, factor: float = 1.0) -> str:
    """A number as text, a dash where there is none; minus as its own sign."""
    return DASH if value is None else f"{factor * value:.{digits}f}".replace("-", "−")


def facts(results: Results) -> list[tuple[str, str]]:
    """What the experiment is: (name, value) pairs; a fact that differs between runs lists its values."""
    runs = results.runs

    def joined(key: str) -> str | None:
        return ", ".join(dict.fromkeys(run.facts[key] for run in runs if key in run.facts)) or None

    seeds = sorted({run.seed for run in runs if run.seed is not None})
    shapes = dict.fromkeys(
        site.probe_shape for run in runs for site in run.sites.values() if site.probe_shape
    )
    rows = sorted({shape[0] for shape in shapes})
    rates = joined("lr")
    if rates and joined("momentum"):
        rates += f" (momentum {joined('momentum')})"
    tolerance = joined("rtol")
    if tolerance and joined("atol"):
        tolerance += f" (atol {joined('atol')})"
    pairs = [
        ("Model", joined("model")),
        ("Data", joined("data")),
        ("Batch sizes", ", ".join(results.batch_labels)),
        ("Seeds", ", ".join(map(str, seeds)) or None),
        ("Budget of a run", joined("budget")),
        ("Learning rate", rates),
        ("Tolerance rtol", tolerance),
        ("Unfolding", joined("unfold")),
        ("Probe batch", f"{', '.join(map(str, rows))} fixed training samples" if rows else None),
        ("Versions", joined("versions")),
    ]
    return [(name, value) for name, value in pairs if value]


def facts_html(results: Results) -> str:
    """The head's list of facts."""
    entries = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts(results)
    )
    return f'<dl class="facts">{"".join(entries)}</dl>'


def findings(results: Results) -> list[str]:
    """What the numbers say, as plain sentences that a reader can check in the table."""
    return [*_near_rank_findings(results), *_accuracy_findings(results), *_cost_findings(results)]


def _near_rank_findings(results: Results) -> list[str]:
    groups = sized(results)
    if len(groups) < 2:
        return []
    (_, first, first_runs), (_, last, last_runs) = groups[0], groups[-1]
    changes = []
    for layer in results.sites:
        ends = []
        for runs in (first_runs, last_runs):
            sites = [run.sites[layer] for run in runs if layer in run.sites]
            ends.append(mean([site.ratio for site in sites if site.ratio is not None]))
        if ends[0] is not None and ends[1] is not None:
            changes.append((ends[1] - ends[0], layer, ends[0], ends[1]))
    if not changes:
        return []
    falls = sum(change < 0 for change, *_ in changes)
    rises = sum(change > 0 for change, *_ in changes)
    _, layer, start, end = max(changes, key=lambda entry: abs(entry[0]))
    kind = "means over seeds, at the end of training" if len(first_runs) > 1 else "at the end of training"
    parts = [f"{verb} in {count}" for verb, count in (("falls", falls), ("rises", rises)) if count]
    how = " and ".join(parts) or "stays the same in all"
    return [
        f"From batch size {first} to {last}, the near-rank ratio on the probe {how} of {len(changes)} "
        f"layers; the largest change is in {layer}, from {start:.2f} to {end:.2f} ({kind})."
    ]


def _accuracy_findings(results: Results) -> list[str]:
    ends: list[tuple[str, float, float, float | None]] = []
    for _, label, runs in sized(results):
        train = mean([run.train_accuracy for run in runs if run.train_accuracy is not None])
        test = mean([run.test_accuracy for run in runs if run.test_accuracy is not None])
        updates = mean([float(run.steps) for run in runs if run.steps is not None])
        if train is not None and test is not None:
            ends.append((label, train, test, updates))
    if len(ends) < 2:
        return []
    (first, train, test, _), (last, last_train, last_test, _) = ends[0], ends[-1]
    sentences = [
        f"Between batch sizes {first} and {last}, test accuracy goes from {100 * test:.1f} % to "
        f"{100 * last_test:.1f} %, the generalisation gap from {_points(train - test)} to "
        f"{_points(last_train - last_test)} percentage points."
    ]
    steps = [entry[3] for entry in ends if entry[3]]
    if steps and max(steps) > 1.5 * min(steps):
        sentences.append(
            f"The runs had between {min(steps):,.0f} and {max(steps):,.0f} updates, so batch size and "
            "number of updates change together here: compare with a sweep at equal steps before blaming the "
            "batch size."
        )
    if max(entry[1] for entry in ends) - min(entry[1] for entry in ends) > 0.05:
        sentences.append(
            "Train accuracy differs by more than 5 points between batch sizes: the networks are not "
            "equally well trained."
        )
    return sentences


def _points(value: float) -> str:
    return number(value, 1, 100)


def _cost_findings(results: Results) -> list[str]:
    percents = [run.metric_percent for run in results.runs if run.metric_percent is not None]
    times = [run.metric_ms for run in results.runs if run.metric_ms is not None]
    if not percents or not times:
        return []
    layers = len(results.sites)
    plural = "s" * (layers != 1)
    what = f"Near-rank, interval and spectral summary of {layers} layer{plural} on the training batch"
    if len(percents) == 1:
        return [f"{what} took {significant(times[0])} ms per step, {significant(percents[0])} % of the step."]
    return [
        f"{what} took {significant(min(times))} to {significant(max(times))} ms per step, "
        f"{significant(min(percents))} % to {significant(max(percents))} % of the step."
    ]


def table_html(results: Results) -> str:
    """One row a run; the layers in the same table as long as they fit, else in tables of their own."""
    layers = results.sites
    if len(layers) <= LAYERS_PER_TABLE:
        return _table(results, layers, outcomes=True)
    parts = [_table(results, [], outcomes=True)]
    for start in range(0, len(layers), LAYERS_PER_TABLE):
        parts.append(_table(results, layers[start : start + LAYERS_PER_TABLE], outcomes=False))
    return "".join(parts)


def _table(results: Results, layers: list[str], *, outcomes: bool) -> str:
    heads = ["<th>batch<br>size</th>", "<th>seed</th>"]
    if outcomes:
        heads += [
            "<th>steps</th>",
            "<th>train<br>acc. (%)</th>",
            "<th>test<br>acc. (%)</th>",
            "<th>gap<br>(points)</th>",
        ]
    heads += [f'<th class="layer">{_breakable(layer)}</th>' for layer in layers]
    if outcomes:
        heads += ["<th>metric<br>(ms/step)</th>", "<th>metric<br>(% of step)</th>"]
    group = ""
    if layers:
        before, after = (6, 2) if outcomes else (2, 0)
        group = f'<tr class="group"><td colspan="{before}"></td>'
        group += f'<th colspan="{len(layers)}">near-rank ratio on the probe, at the end</th>'
        group += f'<td colspan="{after}"></td></tr>' if after else "</tr>"
    rows = "".join(_row(run, layers, outcomes=outcomes) for run in results.runs)
    head = f"<thead>{group}<tr>{''.join(heads)}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>'


def _row(run: Run, layers: list[str], *, outcomes: bool) -> str:
    cells = [escape(run.label), DASH if run.seed is None else str(run.seed)]
    if outcomes:
        cells += [
            DASH if run.steps is None else f"{run.steps:,}",
            number(run.train_accuracy, 1, 100),
            number(run.test_accuracy, 1, 100),
            number(run.gap, 1, 100),
        ]
    cells += [_ratio_cell(run.sites.get(layer)) for layer in layers]
    if outcomes:
        cells += [significant(run.metric_ms), significant(run.metric_percent)]
    mark = "" if run.status == "finished" else ' class="unfinished"'
    return f'<tr{mark} data-run="{escape(run.name)}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _breakable(layer: str) -> str:
    """A layer's name that may be broken where its parts meet."""
    return "<wbr>".join(escape(part) for part in re.split(r"(?<=[._])|(?=#)", layer))


def _ratio_cell(site: Site | None) -> str:
    if site is None:
        return DASH
    return f"<b>{number(site.ratio, 3)}</b><small>null {number(site.null_ratio, 3)}</small>"


def notices_html(results: Results) -> str:
    """The box that says what is missing or damaged; empty where nothing is."""
    lines = [escape(problem) for problem in results.problems]
    unfinished = [run for run in results.runs if run.status != "finished"]
    for run in results.runs:
        lines += [f"<b>{escape(run.name)}</b>: {escape(problem)}" for problem in run.problems]
        if run.status != "finished" and not run.problems:
            lines.append(f"<b>{escape(run.name)}</b>: its summary does not say that it finished.")
    if not lines:
        return ""
    intro = "Something is missing or could not be read; the report shows what is there."
    if unfinished:
        intro += f" {len(unfinished)} of {len(results.runs)} runs did not finish (marked * in the table)."
    items = "".join(f"<li>{line}</li>" for line in lines)
    heading = "<h2>Incomplete results</h2>"
    return f'<section class="notice" role="note">{heading}<p>{intro}</p><ul>{items}</ul></section>'
