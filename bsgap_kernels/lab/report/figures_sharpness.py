"""The report's figure of sharpness against batch size: φ in two spaces, and λ_max of the Hessian."""

from __future__ import annotations

import functools
import math
from typing import Any

from bokeh.models import LegendItem, Range1d, Span
from bokeh.plotting import figure

from bsgap_kernels.lab.report.by_batch import (
    Drawing,
    Series,
    add_legend,
    batch_figure,
    log_ticks,
    method_note,
    seed_note,
)
from bsgap_kernels.lab.report.landscape import SHARPNESS_FILE, SPACES
from bsgap_kernels.lab.report.plot import Block, Plot
from bsgap_kernels.lab.report.runs import Results, Run
from bsgap_kernels.lab.report.style import (
    DASH,
    LAYER_COLORS,
    MUTED,
    WIDTH,
    side_by_side,
    significant,
)

_HEIGHT, _LEFT_WIDTH = 350, 660
_NAMES = {"full": "full space", "subspace": "random subspace"}
_MARKERS = {"full": "circle", "subspace": "square"}
_TOOLTIPS = (
    ("ε", "@epsilon"),
    ("train loss f(x)", "@loss"),
    ("largest loss found", "@max_loss"),
    ("dimensions", "@dimension"),
    ("directions at the border", "@at_bound"),
    ("run", "@runs"),
)


def kinds(results: Results) -> list[tuple[str, float]]:
    """Every (space, ε) that some run has, full space first, the largest ε first."""
    found = {
        (entry.space, entry.epsilon)
        for run in results.runs
        if run.sharpness is not None
        for entry in run.sharpness.maxima
    }
    return sorted(found, key=lambda kind: (SPACES.index(kind[0]), -kind[1]))


def kind_text(space: str, epsilon: float) -> str:
    """A maximisation in words: `full space, ε = 0.001`."""
    return f"{_NAMES[space]}, ε = {epsilon:g}"


def phi(kind: tuple[str, float], run: Run) -> float | None:
    """φ of a run, None where it was not measured."""
    found = run.sharpness.of_kind(*kind) if run.sharpness is not None else None
    return None if found is None else found.phi


def train_loss(kind: tuple[str, float], run: Run) -> float | None:
    """f(x) where φ was taken, None where it is not recorded."""
    found = run.sharpness.of_kind(*kind) if run.sharpness is not None else None
    return None if found is None else found.loss


def eigenvalue(run: Run) -> float | None:
    """The Hessian's largest eigenvalue, None where it was not measured."""
    return None if run.sharpness is None else run.sharpness.eigenvalue


def sharpness_by_batch(results: Results) -> Plot | None:
    """φ at every ε on a log axis, and λ_max of the Hessian; None where no run has either."""
    measured = [run for _, _, runs in results.sized() for run in runs if run.sharpness is not None]
    if not measured:
        return None
    notes = [seed_note(results), *method_note(results), *_facts(measured)]
    drawn = [
        plot
        for plot in (_phi_figure(results, measured, notes), _eigenvalue_figure(results, measured, notes))
        if plot is not None
    ]
    without = [run.name for run in results.runs if run.sharpness is None]
    if without:
        shown = ", ".join(without[:8]) + (", …" if len(without) > 8 else "")
        notes.append(f"Without {SHARPNESS_FILE}: {shown}.")
    return Plot([Block(side_by_side(drawn, 2), _HEIGHT)], notes) if drawn else None


def _phi_figure(results: Results, measured: list[Run], notes: list[str]) -> figure | None:
    everything = kinds(results)
    values = [value for run in measured for kind in everything if (value := phi(kind, run)) is not None]
    if not values:
        return None
    plot, floor = _log_figure(results, "Sharpness φ", _LEFT_WIDTH, "φ", values)
    items = []
    drawing = Drawing(plot, *_TOOLTIPS, slots=len(everything) * len(results.methods))
    for index, kind in enumerate(everything):
        color, marker = LAYER_COLORS[index % 8], _MARKERS[kind[0]]
        series = Series(kind_text(*kind), functools.partial(_drawn, kind), color, marker)
        series.details = functools.partial(_details, kind)
        renderers = drawing.add_methods(results, series, floor)
        if renderers:
            items.append(LegendItem(label=series.name, renderers=renderers))
    add_legend(plot, items)
    low = [value for value in values if value <= 0]
    if low:
        notes.append(
            f"{len(low)} of {len(values)} values of φ are not above 0 (no larger loss was found) and "
            "have no place on a log axis."
        )
    return plot


def _eigenvalue_figure(results: Results, measured: list[Run], notes: list[str]) -> figure | None:
    values = [value for run in measured if (value := eigenvalue(run)) is not None]
    if not values:
        return None
    title = "Largest eigenvalue of the Hessian"
    width = WIDTH - _LEFT_WIDTH
    if min(values) > 0:
        plot, floor = _log_figure(results, title, width, "λ max of the train loss", values)
    else:
        plot, floor = batch_figure(results, title, width, _HEIGHT, "λ max of the train loss"), -math.inf
        plot.add_layout(Span(location=0, dimension="width", line_color=MUTED, line_width=1))
    series = Series("λ max", eigenvalue, LAYER_COLORS[6], "diamond")
    series.details = _eigenvalue_details
    tooltips = (("residual", "@residual"), ("train loss f(x)", "@loss"), ("run", "@runs"))
    Drawing(plot, *tooltips, slots=len(results.methods)).add_methods(results, series, floor)
    return plot


def _log_figure(
    results: Results, title: str, width: int, y_label: str, values: list[float]
) -> tuple[figure, float]:
    """A figure with a log y-axis about the values above 0, and where it ends below."""
    above = [value for value in values if value > 0] or [1.0]
    low, high = min(above) / 2.5, max(above) * 2.5
    options: dict[str, Any] = {"y_axis_type": "log", "y_range": Range1d(low, high)}
    plot = batch_figure(results, title, width, _HEIGHT, f"{y_label}, log scale", **options)
    log_ticks(plot, low, high)
    return plot, low


def _drawn(kind: tuple[str, float], run: Run) -> float | None:
    value = phi(kind, run)
    return value if value is not None and value > 0 else None


def _details(kind: tuple[str, float], runs: list[Run]) -> dict[str, str]:
    found = [run.sharpness.of_kind(*kind) for run in runs if run.sharpness is not None]
    maxima = [entry for entry in found if entry is not None]
    return {
        "epsilon": f"{kind[1]:g}",
        "loss": _span([entry.loss for entry in maxima]),
        "max_loss": _span([entry.max_loss for entry in maxima]),
        "at_bound": _span([entry.at_bound for entry in maxima]),
        "dimension": _span([entry.dimension for entry in maxima]),
        "runs": ", ".join(run.name for run in runs),
    }


def _eigenvalue_details(runs: list[Run]) -> dict[str, str]:
    known = [run.sharpness for run in runs if run.sharpness is not None]
    return {
        "residual": _span([entry.residual for entry in known]),
        "loss": _span([maximum.loss for entry in known for maximum in entry.maxima[:1]]),
        "runs": ", ".join(run.name for run in runs),
    }


def _span(values: list[float | None] | list[int | None]) -> str:
    """One number, or the range of several."""
    known = [value for value in values if value is not None]
    if not known:
        return DASH
    low, high = min(known), max(known)
    return significant(low) if low == high else f"{significant(low)} to {significant(high)}"


def _facts(measured: list[Run]) -> list[str]:
    """On how many images φ was taken, and how far the train losses are apart."""
    notes = []
    images = {
        (entry.images, entry.of, entry.mode)
        for run in measured
        if (entry := run.sharpness) is not None and entry.images is not None
    }
    if len(images) == 1:
        count, of, mode = next(iter(images))
        whole = f" of {of:,}" if of is not None else ""
        notes.append(f"Loss of {count:,}{whole} training images{f', {mode} mode' if mode else ''}.")
    losses = [
        maximum.loss
        for run in measured
        if run.sharpness is not None
        for maximum in run.sharpness.maxima
        if maximum.loss is not None
    ]
    if losses:
        ends = significant(min(losses)), significant(max(losses))
        notes.append(
            f"Train loss f(x) at these weights: {' to '.join(dict.fromkeys(ends))}. φ divides by 1 + f(x), "
            "and φ of networks with unequal train losses is not comparable."
        )
    return notes
