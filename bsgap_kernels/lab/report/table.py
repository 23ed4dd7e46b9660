"""The report's table: one row a run, means over seeds with their intervals, HTML-escaped."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

from bsgap_kernels.lab.fitted import BUDGET, FITTED, STALLED
from bsgap_kernels.lab.report.figures_batch import ratio
from bsgap_kernels.lab.report.figures_speed import reached_targets, seconds_to
from bsgap_kernels.lab.report.runs import Results, Run, Site
from bsgap_kernels.lab.report.statistics import estimate
from bsgap_kernels.lab.report.style import DASH, many_methods, significant

# Beyond this many columns of layers and speeds the table would not fit the page: the layers then get tables
# of their own.
LAYERS_PER_TABLE = 8
_ENDS = {FITTED: "fitted", STALLED: "stalled", BUDGET: "not fitted"}


def number(value: float | None, digits: int, factor: float = 1.0) -> str:
    """A number as text, a dash where there is none; minus as its own sign."""
    return DASH if value is None else f"{factor * value:.{digits}f}".replace("-", "−")


@dataclass(frozen=True)
class Column:
    """One column: its head, the number of a run, and how that number is written."""

    head: str
    measure: Callable[[Run], float | None]
    say: Callable[[float | None], str]
    note: Callable[[Run], str] | None = None
    """Of a run, below its number."""


def outcomes(results: Results) -> tuple[list[Column], list[Column]]:
    """The columns before the layers, and those after them."""
    before = [
        Column("steps", lambda run: None if run.steps is None else float(run.steps), _thousands, _ended),
        Column("train<br>acc. (%)", lambda run: run.train_accuracy, _percent),
        Column("test<br>acc. (%)", lambda run: run.test_accuracy, _percent),
        Column("gap<br>(points)", lambda run: run.gap, _percent),
    ]
    if any(_costs_otherwise(run) for run in results.runs):
        before.insert(1, Column("gradients<br>(images)", _gradient_images, _thousands))
    after = [
        Column("metric<br>(ms/step)", lambda run: run.metric_ms, significant),
        Column("metric<br>(% of step)", lambda run: run.metric_percent, significant),
    ]
    if any(run.floor_ms is not None for run in results.runs):
        after.append(Column("its floor<br>(ms/step)", lambda run: run.floor_ms, significant))
    if any(run.images_per_second is not None for run in results.runs):
        after.append(Column("images<br>per s", lambda run: run.images_per_second, significant))
    target = table_target(results)
    if target is not None:
        head = f"{100 * target:g} % test<br>acc. (s)"
        after.append(Column(head, functools.partial(seconds_to, target), significant))
    return before, after


def _ended(run: Run) -> str:
    """Why a run that was to train until fitted is at its end."""
    return "" if run.until_fitted is None or run.ended is None else _ENDS.get(run.ended, run.ended)


def _gradient_images(run: Run) -> float | None:
    return None if run.gradient_images is None else float(run.gradient_images)


def _costs_otherwise(run: Run) -> bool:
    """Whether steps and batch size do not say of how many images a gradient was taken."""
    return run.gradient_images is not None and run.gradient_images != run.usual_images


def table_target(results: Results) -> float | None:
    """The highest accuracy that every run reached, else the highest that any did."""
    targets = reached_targets(results)
    by_all = [
        target
        for target in targets
        if all(seconds_to(target, run) is not None for run in results.runs if run.time_to_accuracy)
    ]
    found = by_all or targets
    return found[-1] if found else None


def _thousands(value: float | None) -> str:
    return DASH if value is None else f"{value:,.0f}"


def _percent(value: float | None) -> str:
    return number(value, 1, 100)


def table_html(results: Results) -> str:
    """One row a run; the layers in the same table as long as they fit, else in tables of their own."""
    layers = results.sites
    before, after = outcomes(results)
    # Four of the columns before the layers and two of those after them are always there; where there are many
    # methods, their names take the place of two.
    columns = len(layers) + len(before) - 4 + len(after) - 2 + 2 * many_methods(results)
    if columns <= LAYERS_PER_TABLE:
        return _table(results, before, layers, after)
    parts = [_table(results, before, [], after)]
    for start in range(0, len(layers), LAYERS_PER_TABLE):
        parts.append(_table(results, [], layers[start : start + LAYERS_PER_TABLE], []))
    return "".join(parts)


def has_means(results: Results) -> bool:
    """Whether the table has rows of means over seeds."""
    return any(len(results.of(label)) > 1 for label in results.labels)


def _table(results: Results, before: list[Column], layers: list[str], after: list[Column]) -> str:
    heads = ["<th>batch<br>size</th>", "<th>seed</th>", *(f"<th>{column.head}</th>" for column in before)]
    heads += [f'<th class="layer">{_breakable(layer)}</th>' for layer in layers]
    heads += [f"<th>{column.head}</th>" for column in after]
    group = ""
    if layers:
        group = f'<tr class="group"><td colspan="{2 + len(before)}"></td>'
        group += f'<th colspan="{len(layers)}">near-rank ratio on the probe, at the end</th>'
        group += f'<td colspan="{len(after)}"></td></tr>' if after else "</tr>"
    rows = []
    for label in results.labels:
        runs = results.of(label)
        rows += [_row(run, before, layers, after) for run in runs]
        if len(runs) > 1:
            rows.append(_mean_row(label, runs, before, layers, after))
    head = f"<thead>{group}<tr>{''.join(heads)}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def _row(run: Run, before: list[Column], layers: list[str], after: list[Column]) -> str:
    cells = [escape(run.label), DASH if run.seed is None else str(run.seed)]
    cells += [_cell(run, column) for column in before]
    cells += [_ratio_cell(run.sites.get(layer)) for layer in layers]
    cells += [_cell(run, column) for column in after]
    mark = "" if run.status == "finished" else ' class="unfinished"'
    return f'<tr{mark} data-run="{escape(run.name)}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _cell(run: Run, column: Column) -> str:
    note = column.note(run) if column.note else ""
    return column.say(column.measure(run)) + (f"<small>{escape(note)}</small>" if note else "")


def _mean_row(
    label: str, runs: list[Run], before: list[Column], layers: list[str], after: list[Column]
) -> str:
    ratios = [
        Column(layer, functools.partial(ratio, layer), functools.partial(number, digits=3))
        for layer in layers
    ]
    cells = [escape(label), f"mean of {len(runs)}"]
    cells += [_mean_cell(runs, column) for column in (*before, *ratios, *after)]
    content = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr class="mean" data-label="{escape(label)}">{content}</tr>'


def _mean_cell(runs: list[Run], column: Column) -> str:
    """A mean over seeds ± half its interval; it says over how many where some run has no value."""
    found = estimate([value for run in runs if (value := column.measure(run)) is not None])
    if found is None:
        return DASH
    # Rounding alone is no spread, and what is the same in every run needs none.
    alike = found.half is None or found.half <= 1e-9 * abs(found.mean)
    spread = "" if alike else f"± {column.say(found.half)}"
    if found.count < len(runs):
        spread += f" (n = {found.count})"
    return f"{column.say(found.mean)}<small>{spread.strip()}</small>"


def _breakable(layer: str) -> str:
    """A layer's name that may be broken where its parts meet."""
    return "<wbr>".join(escape(part) for part in re.split(r"(?<=[._])|(?=#)", layer))


def _ratio_cell(site: Site | None) -> str:
    if site is None:
        return DASH
    return f"<b>{number(site.ratio, 3)}</b><small>null {number(site.null_ratio, 3)}</small>"
