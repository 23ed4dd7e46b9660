"""The report's figures over steps: heat map of the near-rank ratio, and near-rank trajectories.

Their sources hold no values: the page fills them from the values over steps that it holds once (series.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from bokeh.models import (
    ColumnDataSource,
    FixedTicker,
    HBar,
    Line,
    LinearColorMapper,
    Quad,
    Range1d,
    Scatter,
    Span,
    VArea,
)
from bokeh.plotting import figure

from bsgap_kernels.lab.report.grid import MAX_SINGLE_PANELS, chunks, make_grid, panel_title
from bsgap_kernels.lab.report.plot import Block, Plot, shape_text
from bsgap_kernels.lab.report.runs import Results, Run
from bsgap_kernels.lab.report.series import SHOWN_STEPS, drawn_runs, end_of, smaller_dimension
from bsgap_kernels.lab.report.style import (
    EMPTY,
    MUTED,
    RATIO_PALETTE,
    WIDTH,
    base_figure,
    hover,
    line_styles,
    many_methods,
    short,
    side_by_side,
)

X_LABELS = {"step": "step (updates done)", "epoch": "epoch (passes over the training set)"}
# What is drawn as one block must fit a printed page with its heading and caption.
_PANEL_HEIGHT, _PANELS_HEIGHT = 250, 650
_HEAT_HEIGHT = 600
_TOOLTIPS = [
    ("step", "@step{0,0}"),
    ("near-rank", "@near_rank{0,0} (ratio @ratio{0.000})"),
    ("certified interval", "[@lower{0,0}, @upper{0,0}]"),
]
_VALUES = ("step", "near_rank", "ratio", "lower", "upper")


@dataclass(frozen=True)
class Switch:
    """What the page's switch of the x-axis says: which units there are, where each ends, which is shown."""

    start: str
    epochs: bool
    ends: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """The switch as the page reads it."""
        return {"unit": self.start, "labels": X_LABELS, "ends": self.ends}


def make_switch(results: Results) -> Switch:
    """Steps where the runs' lengths in steps differ by 2 at most, else the unit in which they differ less.

    Runs at equal epochs share no axis in steps, and runs that end once fitted may share neither.
    """
    runs = drawn_runs(results)
    with_epochs = all(run.epochs and run.steps for run in runs)
    lengths = [int(max(t.steps[-1] for t in run.trajectories.values())) for run in runs]
    in_steps = max(lengths) / max(min(lengths), 1)
    epochs = [run.epochs or math.inf for run in runs]
    in_epochs = max(epochs) / min(epochs) if with_epochs else math.inf
    start = "epoch" if in_steps > max(2, in_epochs) else "step"
    return Switch(start, with_epochs, {unit: end_of(results, unit) for unit in _units(with_epochs)})


def _units(with_epochs: bool) -> tuple[str, ...]:
    return ("step", "epoch") if with_epochs else ("step",)


def thinning_note(runs: list[Run], *, what: str = "Steps drawn") -> str:
    """Which of the recorded steps are drawn."""
    recorded = [len(trajectory.steps) for run in runs for trajectory in run.trajectories.values()]
    if max(recorded, default=0) <= SHOWN_STEPS:
        return f"{what}: every step with a probe."
    return (
        f"{what}: at most {SHOWN_STEPS} of up to {max(recorded)} steps with a probe per run, evenly spaced, "
        "first and last always among them; values are never averaged over steps."
    )


def empty_source(*names: str) -> ColumnDataSource:
    """A source that the page fills."""
    return ColumnDataSource({name: np.empty(0, dtype=np.float32) for name in (*names, *_VALUES)})


def shown_run(results: Results, label: str) -> Run | None:
    """The run that stands for a label in the heat map: the first seed with probe rows."""
    return next((run for run in results.of(label) if run.trajectories), None)


def heat_maps(results: Results) -> Plot | None:
    """Near-rank ratio on the probe, x step, y layer in forward order; one panel a batch size and method."""
    shown = [(label, run) for label in results.labels if (run := shown_run(results, label)) is not None]
    if not shown:
        return None
    columns = {1: 1, 2: 2, 4: 2}.get(len(shown), 3)
    layers = list(dict.fromkeys(name for _, run in shown for name in run.trajectories))
    ordered = [name for name in results.sites if name in layers]
    blocks = []
    for start in range(0, len(shown), columns):
        panels = [
            _heat_map(results, label, run, ordered, WIDTH // columns)
            for label, run in shown[start : start + columns]
        ]
        fills = [fill for _, fill in panels]
        blocks.append(
            Block(side_by_side([panel for panel, _ in panels], columns), panels[0][0].height, fills)
        )
    notes = [thinning_note([run for _, run in shown], what="Columns drawn")]
    if any(len(results.of(label)) > 1 for label, _ in shown):
        seeds = sorted({run.seed for _, run in shown if run.seed is not None})
        notes.append(f"Of several seeds the first is drawn (seed {', '.join(map(str, seeds))}).")
    missing = [label for label in results.labels if label not in dict(shown)]
    if missing:
        notes.append(f"Without probe rows, so without a panel: batch {', '.join(missing)}.")
    return Plot(blocks, notes)


def _heat_map(
    results: Results, label: str, run: Run, layers: list[str], width: int
) -> tuple[figure, dict[str, Any]]:
    seed = f" · seed {run.seed}" if run.seed is not None else ""
    drawn = [run.trajectories[name] for name in layers if name in run.trajectories]
    first = min(int(trajectory.steps[0]) for trajectory in drawn)
    last = max(int(trajectory.steps[-1]) for trajectory in drawn)
    row = min(38 if len(layers) <= 5 else 30, _HEAT_HEIGHT / len(layers))
    plot = base_figure(
        f"batch {label}{seed}",
        width,
        96 + round(row * max(len(layers), 3)),
        "step (updates done)",
        "layer, forward order ↓",
        # From bottom to top, so that the first layer is on top, as one reads.
        y_range=Range1d(len(layers) - 0.5, -0.5),
        x_range=Range1d(first - 0.5 * (first == last), last + 0.5 * (first == last)),
    )
    # Names are left out where rows are narrower than letters are high.
    every = math.ceil(9 / row)
    plot.yaxis.ticker = FixedTicker(ticks=list(range(0, len(layers), every)))
    plot.yaxis.major_label_overrides = dict(enumerate(map(short, layers)))
    if row < 14:
        plot.yaxis.major_label_text_font_size = "9px"
    plot.background_fill_color = EMPTY
    plot.grid.grid_line_color = None
    source = empty_source("left", "right", "row", "layer")
    color = {
        "field": "ratio",
        "transform": LinearColorMapper(palette=RATIO_PALETTE, low=0, high=1, nan_color=EMPTY),
    }
    # One renderer a panel: the page opens faster than with one a layer. A line of the same colour closes the
    # hairlines that antialiasing leaves between neighbours.
    bars = HBar(y="row", left="left", right="right", height=0.92, fill_color=color, line_color=color)
    bars.line_width = 0.6
    drawn_bars = plot.add_glyph(source, bars)
    plot.add_tools(hover([("layer", "@layer"), *_TOOLTIPS], [drawn_bars]))
    fill = {"kind": "heat", "source": source.id, "run": drawn_runs(results).index(run)}
    return plot, fill | {"layers": [results.sites.index(name) for name in layers]}


def trajectories(results: Results) -> tuple[Plot, Switch] | None:
    """Near-rank on the probe over steps, a panel a layer, a line a run coloured by its batch size.

    Up to nine layers have figures of their own with counts; more share grids of small panels with ratios.
    """
    runs = drawn_runs(results)
    if not runs:
        return None
    switch = make_switch(results)
    layers = [name for name in results.sites if any(name in run.trajectories for run in runs)]
    if len(layers) <= MAX_SINGLE_PANELS:
        blocks = [_panels(results, layers, switch)]
    else:
        blocks = [_grid(results, chunk, switch) for chunk in chunks(layers)]
    notes = [thinning_note(runs, what="Steps drawn")]
    wide = any(np.any(t.upper > t.lower) for run in runs for t in run.trajectories.values())
    if not wide:
        notes.append("Every certified interval is a single number here, so no band shows.")
    if len(_lines(results)) < len(runs):
        notes.append(
            "Of every method and batch size the first seed is drawn; the comparison below shows any run."
        )
    notes += law_note(results)
    return Plot(blocks, notes), switch


def law_note(results: Results) -> list[str]:
    """How the Gaussian null and the Marchenko–Pastur law differ, where the files say both."""
    pairs = [
        (abs(site.null_near_rank - site.law_near_rank), name, site)
        for run in results.runs
        for name, site in run.sites.items()
        if site.null_near_rank is not None and site.law_near_rank is not None
    ]
    if not pairs:
        return []
    difference, name, site = max(pairs, key=lambda pair: pair[0])
    if difference < 0.5:
        return ["The Marchenko–Pastur law predicts the count of every null."]
    return [
        f"The Marchenko–Pastur law predicts the null of {name} as {site.law_near_rank:.1f}, counted were "
        f"{site.null_near_rank:.0f}; no other layer's differs more."
    ]


def _lines(results: Results) -> list[tuple[int, Run]]:
    """The runs that have a line, with their places: of many methods the first seed of each label alone."""
    lines, seen = [], set()
    for index, run in enumerate(drawn_runs(results)):
        if not many_methods(results) or run.label not in seen:
            lines.append((index, run))
        seen.add(run.label)
    return lines


def _panels(results: Results, layers: list[str], switch: Switch) -> Block:
    columns = 1 if len(layers) == 1 else 2 if len(layers) in (2, 4) else 3
    # One range for all panels: they share their axis, and zoom together.
    shared = Range1d(-0.02 * switch.ends[switch.start], 1.02 * switch.ends[switch.start])
    rows = math.ceil(len(layers) / columns)
    height = min(_PANEL_HEIGHT, _PANELS_HEIGHT // rows)
    block = Block(None, rows * height, ranges=[shared.id])
    panels = []
    for index, layer in enumerate(layers):
        y_label = "near-rank (count)" if index % columns == 0 else ""
        size = (WIDTH // columns, height)
        panels.append(_panel(results, layer, size, y_label, shared, switch.start, block))
    block.model = side_by_side(panels, columns)
    return block


def _panel(
    results: Results,
    layer: str,
    size: tuple[int, int],
    y_label: str,
    shared: Range1d,
    unit: str,
    block: Block,
) -> figure:
    runs, styles = drawn_runs(results), line_styles(results)
    sites = [run.sites[layer] for run in runs if layer in run.sites]
    shape = next((site.probe_shape for site in sites if site.probe_shape), None)
    null = next((site.null_near_rank for site in sites if site.null_near_rank is not None), None)
    title = f"{short(layer, 30)} · {shape_text(shape)}" if shape else short(layer, 30)
    plot = base_figure(title, *size, X_LABELS[unit], y_label, x_range=shared)
    top = max([min(shape) if shape else 0.0, null or 0.0, *(_largest(run, layer) for run in runs)])
    plot.y_range = Range1d(-0.03 * top, 1.06 * top or 1)
    if null is not None:
        plot.add_layout(
            Span(location=null, dimension="width", line_color=MUTED, line_dash="dashed", line_width=1.2)
        )
    lines = []
    drawn = _lines(results)
    for index, run in drawn:
        if layer not in run.trajectories:
            continue
        trajectory = run.trajectories[layer].thinned(SHOWN_STEPS)
        source = empty_source("x", "run")
        color, dash = styles[run.label]
        if np.nanmax(trajectory.upper - trajectory.lower, initial=0) > 0:
            band = VArea(x="x", y1="lower", y2="upper", fill_color=color, fill_alpha=0.22)
            plot.add_glyph(source, band)
        alone = len(results.of(run.label)) == 1 or len(drawn) < len(runs)
        # add_glyph makes a third of the objects that `line` makes, for selections that there are none of.
        line = Line(x="x", y="near_rank", line_color=color, line_dash=dash)
        line.line_width = 2.2 if alone else 1.4
        lines.append(plot.add_glyph(source, line))
        if len(trajectory.steps) <= 30:
            dots = Scatter(x="x", y="near_rank", fill_color=color, line_color=color, size=4)
            lines.append(plot.add_glyph(source, dots))
        fill = {"kind": "line", "source": source.id, "run": index, "layer": results.sites.index(layer)}
        block.fills.append(fill)
    plot.add_tools(hover([("batch size", "@run"), *_TOOLTIPS], lines, line_policy="nearest"))
    block.axes.append(plot.xaxis[0].id)
    return plot


def _grid(results: Results, layers: list[str], switch: Switch) -> Block:
    """Ratios of up to thirty layers in one figure; a line a label, broken between runs and panels."""
    runs, styles = drawn_runs(results), line_styles(results)
    smaller = {
        layer: next((size for run in runs if (size := smaller_dimension(run, layer))), None)
        for layer in layers
    }
    nulls = {}
    for layer in layers:
        sites = [run.sites[layer] for run in runs if layer in run.sites]
        nulls[layer] = next((site.null_ratio for site in sites if site.null_ratio is not None), None)
    ticks = {unit: _ticks(end) for unit, end in switch.ends.items()}
    grid = make_grid(
        {layer: panel_title(layer, smaller[layer]) for layer in layers},
        "near-rank ratio",
        X_LABELS,
        ticks,
        [(0, "0"), (0.5, "0.5"), (1, "1")],
        switch.start,
        nulls,
    )
    cells = [[results.sites.index(layer), cell.left, cell.bottom] for layer, cell in grid.cells.items()]
    cell = next(iter(grid.cells.values()))
    block = Block(grid.plot, grid.height, ticks=grid.ticks)
    lines = []
    for label, (color, dash) in styles.items():
        source, band = empty_source("x", "y", "run", "layer"), empty_source("left", "right", "top", "bottom")
        quad = Quad(left="left", right="right", top="top", bottom="bottom", fill_color=color)
        quad.fill_alpha, quad.line_color = 0.22, None
        grid.plot.add_glyph(band, quad)
        lines.append(
            grid.plot.add_glyph(source, Line(x="x", y="y", line_color=color, line_dash=dash, line_width=1.5))
        )
        block.fills.append(
            {
                "kind": "grid",
                "source": source.id,
                "band": band.id,
                "runs": [index for index, run in _lines(results) if run.label == label],
                "cells": cells,
                "width": cell.width,
                "height": cell.height,
            }
        )
    tips = [("layer", "@layer"), ("batch size", "@run"), *_TOOLTIPS]
    grid.plot.add_tools(hover(tips, lines, line_policy="nearest"))
    return block


def _ticks(end: float) -> list[tuple[float, str]]:
    """0 and two or three round numbers up to `end`, as shares of it."""
    power = 10.0 ** math.floor(math.log10(end))
    step = next(size * power for size in (5, 2.5, 2, 1, 0.5) if 2 * size * power <= end)
    return [(place * step / end, f"{place * step:,g}") for place in range(int(end / step) + 1)]


def _largest(run: Run, layer: str) -> float:
    if layer not in run.trajectories:
        return 0.0
    trajectory = run.trajectories[layer]
    return float(np.nanmax(np.concatenate([trajectory.near_rank, trajectory.upper]), initial=0))
