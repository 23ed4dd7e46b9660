"""The report's figure of speed: training images per second, and training time to a test accuracy."""

from __future__ import annotations

import functools

from bokeh.models import LegendItem
from bokeh.plotting import figure

from bsgap_kernels.lab.report.by_batch import (
    Drawing,
    Series,
    add_legend,
    batch_figure,
    method_note,
    seed_note,
)
from bsgap_kernels.lab.report.plot import Block, Plot
from bsgap_kernels.lab.report.runs import Results, Run
from bsgap_kernels.lab.report.statistics import estimate
from bsgap_kernels.lab.report.style import DASH, LAYER_COLORS, LAYER_MARKERS, WIDTH, side_by_side, significant

_HEIGHT, _LEFT_WIDTH = 320, 470
# The targets drawn: the highest that some run reached.
_SHOWN_TARGETS = 3


def throughput(run: Run) -> float | None:
    """Training images per second."""
    return run.images_per_second


def seconds_to(target: float, run: Run) -> float | None:
    """Training time until the test accuracy first reached `target`; None where it never did."""
    reached = run.time_to_accuracy.get(target)
    return None if reached is None else reached.seconds


def reached_targets(results: Results) -> list[float]:
    """Every target that some run reached, ascending."""
    targets = {
        target for run in results.runs for target, at in run.time_to_accuracy.items() if at is not None
    }
    return sorted(targets)


def speed_by_batch(results: Results) -> Plot | None:
    """Throughput, and time to each of the highest accuracies reached; None where no run has either."""
    runs = [run for _, _, group in results.sized() for run in group]
    targets = reached_targets(results)[-_SHOWN_TARGETS:]
    fast = [run for run in runs if run.images_per_second is not None]
    timed = [run for run in runs if any(seconds_to(target, run) is not None for target in targets)]
    if not fast and not timed:
        return None
    width = WIDTH if not fast or not timed else _LEFT_WIDTH
    plots, notes = [], [seed_note(results), *method_note(results)]
    if fast:
        plots.append(_throughput_figure(results, width))
    if timed:
        plots.append(_target_figure(results, targets, WIDTH - width if fast else WIDTH))
        notes += _missing_note(runs, targets)
    return Plot([Block(side_by_side(plots, 2), _HEIGHT)], notes)


def _throughput_figure(results: Results, width: int) -> figure:
    plot = batch_figure(results, "Throughput", width, _HEIGHT, "training images per second")
    series = Series("images/s", throughput, LAYER_COLORS[6], "circle")
    series.details = _run_details
    tooltips = (("training time", "@seconds"), ("run", "@runs"))
    Drawing(plot, *tooltips, slots=len(results.methods)).add_methods(results, series)
    plot.y_range.start = 0
    return plot


def _target_figure(results: Results, targets: list[float], width: int) -> figure:
    plot = batch_figure(results, "Training time to a test accuracy", width, _HEIGHT, "training time (s)")
    items = []
    tooltips = (("updates", "@steps"), ("epochs", "@epochs"), ("run", "@runs"))
    drawing = Drawing(plot, *tooltips, slots=len(targets) * len(results.methods))
    for index, target in enumerate(targets):
        measure, name = functools.partial(seconds_to, target), f"{100 * target:g} %"
        series = Series(name, measure, LAYER_COLORS[index], LAYER_MARKERS[index], say=_seconds)
        series.details = functools.partial(_target_details, target)
        renderers = drawing.add_methods(results, series)
        if renderers:
            items.append(LegendItem(label=name, renderers=renderers))
    add_legend(plot, items)
    plot.y_range.start = 0
    return plot


def _seconds(value: float) -> str:
    return f"{significant(value)} s"


def _run_details(runs: list[Run]) -> dict[str, str]:
    found = estimate([run.train_seconds for run in runs if run.train_seconds is not None])
    return {
        "seconds": DASH if found is None else _seconds(found.mean),
        "runs": ", ".join(run.name for run in runs),
    }


def _target_details(target: float, runs: list[Run]) -> dict[str, str]:
    reached = [at for run in runs if (at := run.time_to_accuracy.get(target)) is not None]
    steps = estimate([float(at.steps) for at in reached if at.steps is not None])
    epochs = estimate([at.epochs for at in reached if at.epochs is not None])
    return {
        "steps": DASH if steps is None else f"{steps.mean:,.0f}",
        "epochs": DASH if epochs is None else significant(epochs.mean),
        "runs": ", ".join(run.name for run in runs),
    }


def _missing_note(runs: list[Run], targets: list[float]) -> list[str]:
    """Which runs looked for a target and never reached it: a mean of the others would flatter."""
    never = {
        target: [
            run.name for run in runs if target in run.time_to_accuracy and seconds_to(target, run) is None
        ]
        for target in targets
    }
    parts = [
        f"{100 * target:g} % by {', '.join(names[:8])}{', …' if len(names) > 8 else ''}"
        for target, names in never.items()
        if names
    ]
    return [f"Never reached: {'; '.join(parts)}. Means are of the other runs."] if parts else []
