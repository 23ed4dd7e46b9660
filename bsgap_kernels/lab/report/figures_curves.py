"""The report's parametric plots: loss and accuracy on the line, and on the curve, between two runs."""

from __future__ import annotations

import math

from bokeh.models import ColumnDataSource, Label, Legend, LegendItem, Line, Range1d, Scatter, Span
from bokeh.plotting import figure

from bsgap_kernels.lab.report.by_batch import log_ticks
from bsgap_kernels.lab.report.landscape import Curve
from bsgap_kernels.lab.report.plot import Block, Plot
from bsgap_kernels.lab.report.runs import Results
from bsgap_kernels.lab.report.style import (
    FONT,
    INK,
    MUTED,
    TEST,
    TRAIN,
    WIDTH,
    base_figure,
    hover,
    short,
    side_by_side,
)

# More pairs than this make a page that nobody reads; the rest is named.
MAX_PAIRS = 8
# Losses further apart than this are drawn on a log axis.
_LOG_FROM = 30.0
_LOSS_HEIGHT, _ACCURACY_HEIGHT = 260, 210
_FORMULAS = {
    "linear": "α x_b + (1 − α) x_a",
    "curved": "sin(απ/2) x_b + cos(απ/2) x_a",
}
_TOOLTIPS = [
    ("α", "@alpha{0.000}"),
    ("train loss", "@train_loss{0.0000}"),
    ("test loss", "@test_loss{0.0000}"),
    ("train accuracy", "@train_accuracy{0.00} %"),
    ("test accuracy", "@test_accuracy{0.00} %"),
]


def pairs(curves: list[Curve]) -> dict[tuple[str, str], list[Curve]]:
    """The curves by the two runs that they join, in the order of the files."""
    found: dict[tuple[str, str], list[Curve]] = {}
    for curve in curves:
        found.setdefault((curve.first, curve.last), []).append(curve)
    return found


def parametric_plots(results: Results) -> Plot | None:
    """Losses above, accuracies below, against α; a column a kind of curve, a block a pair of runs."""
    found = pairs(results.curves)
    if not found:
        return None
    blocks = [_block(curves) for curves in list(found.values())[:MAX_PAIRS]]
    notes = []
    images = {(curve.images, curve.test_images) for curve in results.curves}
    if len(images) == 1 and None not in (counts := next(iter(images))):
        notes.append(f"Each point is taken on {counts[0]:,} training and {counts[1]:,} test images.")
    norms = sorted({curve.batch_norm for curve in results.curves if curve.batch_norm})
    if norms:
        notes.append(
            f"Batch norm's statistics are taken anew at every point ({', '.join(norms)}), so the ends differ "
            "from the losses of the sharpness."
        )
    if len(found) > MAX_PAIRS:
        left_out = ", ".join(f"{first} to {last}" for first, last in list(found)[MAX_PAIRS:])
        notes.append(f"Not drawn: {left_out}.")
    return Plot(blocks, notes)


def _block(curves: list[Curve]) -> Block:
    """The curves of one pair, whose losses share an axis."""
    losses = [
        value
        for curve in curves
        for name in ("train_loss", "test_loss")
        for value in curve.values[name]
        if math.isfinite(value)
    ]
    log = bool(losses) and min(losses) > 0 and max(losses) > _LOG_FROM * min(losses)
    low, high = (min(losses), max(losses)) if losses else (0.0, 1.0)
    # Room for the runs' names above the curves.
    ends = (low / 1.3, high * (high / low) ** 0.2) if log else (0.0, 1.25 * high or 1.0)
    columns = min(len(curves), 2)
    panels = [_panels(curve, WIDTH // columns, ends, log) for curve in curves]
    rows = []
    for start in range(0, len(panels), columns):
        rows += [loss for loss, _ in panels[start : start + columns]]
        rows += [accuracy for _, accuracy in panels[start : start + columns]]
    height = math.ceil(len(panels) / columns) * (_LOSS_HEIGHT + _ACCURACY_HEIGHT)
    return Block(side_by_side(rows, columns), height)


def _panels(curve: Curve, width: int, ends: tuple[float, float], log: bool) -> tuple[figure, figure]:
    columns = {
        name: [100 * value for value in values] if name.endswith("accuracy") else values
        for name, values in curve.values.items()
    }
    source = ColumnDataSource({"alpha": curve.alpha} | columns)
    margin = 0.02 * (max(curve.alpha) - min(curve.alpha))
    shared = Range1d(min(curve.alpha) - margin, max(curve.alpha) + margin)
    formula = f": {_FORMULAS[curve.kind]}" if curve.kind in _FORMULAS else ""
    loss = base_figure(
        f"{curve.kind}{formula}",
        width,
        _LOSS_HEIGHT,
        "",
        "loss, log scale" if log else "loss",
        x_range=shared,
        y_range=Range1d(*ends),
        y_axis_type="log" if log else "linear",
    )
    if log:
        log_ticks(loss, *ends)
    accuracy = base_figure("", width, _ACCURACY_HEIGHT, "α", "accuracy (%)", x_range=shared)
    accuracy.title.visible = False
    accuracy.y_range = Range1d(-2, 102)
    for plot, kind in ((loss, "loss"), (accuracy, "accuracy")):
        items = _draw(plot, source, kind)
        if plot is accuracy:
            legend = Legend(items=items, orientation="horizontal", border_line_color=None)
            legend.label_text_font, legend.label_text_font_size = FONT, "12px"
            legend.padding = legend.margin = 2
            plot.add_layout(legend, "below")
        for place in (0.0, 1.0):
            plot.add_layout(Span(location=place, dimension="height", line_color=MUTED, line_dash="dashed"))
    for place, run in ((0.0, curve.first), (1.0, curve.last)):
        label = Label(x=place, y=ends[1], text=short(run, 22), text_color=INK, text_baseline="top")
        label.text_font, label.text_font_size, label.x_offset, label.y_offset = FONT, "11px", 4, -3
        loss.add_layout(label)
    return loss, accuracy


def _draw(plot: figure, source: ColumnDataSource, kind: str) -> list[LegendItem]:
    """The lines of the training and the test set; their entries of a legend."""
    items, marks = [], []
    for split, name, color, marker in (
        ("train", "training set", TRAIN, "square"),
        ("test", "test set", TEST, "circle"),
    ):
        places = {"x": "alpha", "y": f"{split}_{kind}"}
        line = plot.add_glyph(source, Line(line_color=color, line_width=2, **places))
        dots = Scatter(fill_color=color, line_color=color, marker=marker, size=5, **places)
        marks.append(plot.add_glyph(source, dots))
        items.append(LegendItem(label=name, renderers=[line, marks[-1]]))
    plot.add_tools(hover(_TOOLTIPS, marks))
    return items
