"""The report's figures over steps: heat map of the near-rank ratio, and near-rank trajectories."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from bokeh.models import ColumnDataSource, FixedTicker, Line, LinearColorMapper, Model, Range1d, Span, VArea
from numpy.typing import NDArray

from bsgap_kernels.lab.report.data import Results, Run, Trajectory
from bsgap_kernels.lab.report.style import (
    EMPTY,
    MUTED,
    RATIO_PALETTE,
    WIDTH,
    base_figure,
    batch_colors,
    hover,
    plain,
    short,
    side_by_side,
)

# Steps drawn per run and layer: about one per pixel of a panel, and 15 runs of 8 layers stay under 5 MB.
SHOWN_STEPS = 300


@dataclass
class Plot:
    """One figure of the report: what Bokeh draws, and facts that its caption states."""

    model: Model
    notes: list[str]


def interval_text(lower: float | None, upper: float | None) -> str:
    """A certified interval in words."""
    if lower is None or upper is None or math.isnan(lower) or math.isnan(upper):
        return "not recorded"
    return f"[{lower:.0f}, {upper:.0f}]"


def shape_text(shape: tuple[int, int] | None) -> str:
    """A shape in words: `512 × 120`."""
    return f"{shape[0]} × {shape[1]}" if shape else "not recorded"


def thinning_note(runs: list[Run], *, what: str = "Steps drawn") -> str:
    """Which of the recorded steps are drawn."""
    recorded = [len(trajectory.steps) for run in runs for trajectory in run.trajectories.values()]
    if max(recorded, default=0) <= SHOWN_STEPS:
        return f"{what}: every step with a probe."
    return (
        f"{what}: at most {SHOWN_STEPS} of up to {max(recorded)} steps with a probe per run, evenly spaced, "
        "first and last always among them; values are never averaged over steps."
    )


def shown_run(results: Results, label: str) -> Run | None:
    """The run that stands for a batch size in the heat map: the first seed with probe rows."""
    return next((run for run in results.of(label) if run.trajectories), None)


def heat_maps(results: Results) -> Plot | None:
    """Near-rank ratio on the probe, x step, y layer in forward order; one panel a batch size."""
    shown = [(label, run) for label in results.batch_labels if (run := shown_run(results, label)) is not None]
    if not shown:
        return None
    columns = {1: 1, 2: 2, 4: 2}.get(len(shown), 3)
    layers = list(dict.fromkeys(name for _, run in shown for name in run.trajectories))
    ordered = [name for name in results.sites if name in layers]
    panels = [_heat_map(label, run, ordered, WIDTH // columns) for label, run in shown]
    notes = [thinning_note([run for _, run in shown], what="Columns drawn")]
    if any(len(results.of(label)) > 1 for label, _ in shown):
        seeds = sorted({run.seed for _, run in shown if run.seed is not None})
        notes.append(f"Of several seeds the first is drawn (seed {', '.join(map(str, seeds))}).")
    missing = [label for label in results.batch_labels if label not in dict(shown)]
    if missing:
        notes.append(f"Without probe rows, so without a panel: batch {', '.join(missing)}.")
    return Plot(side_by_side(panels, columns), notes)


def _heat_map(label: str, run: Run, layers: list[str], width: int) -> Model:
    seed = f" · seed {run.seed}" if run.seed is not None else ""
    drawn = [
        (row, name, run.trajectories[name]) for row, name in enumerate(layers) if name in run.trajectories
    ]
    first = min(int(trajectory.steps[0]) for _, _, trajectory in drawn)
    last = max(int(trajectory.steps[-1]) for _, _, trajectory in drawn)
    plot = base_figure(
        f"batch {label}{seed}",
        width,
        96 + (38 if len(layers) <= 5 else 30) * max(len(layers), 3),
        "step (updates done)",
        "layer, forward order ↓",
        # From bottom to top, so that the first layer is on top, as one reads.
        y_range=Range1d(len(layers) - 0.5, -0.5),
        x_range=Range1d(first - 0.5 * (first == last), last + 0.5 * (first == last)),
    )
    plot.yaxis.ticker = FixedTicker(ticks=list(range(len(layers))))
    plot.yaxis.major_label_overrides = dict(enumerate(map(short, layers)))
    plot.background_fill_color = EMPTY
    plot.grid.grid_line_color = None
    columns = [_cells(row, name, run, trajectory.thinned(SHOWN_STEPS)) for row, name, trajectory in drawn]
    # One renderer a panel: the page opens faster than with one a layer.
    source = ColumnDataSource(
        {key: np.concatenate([part[key] for part in columns]) for key in columns[0] if key != "layer"}
        | {"layer": [text for part in columns for text in part["layer"]]}
    )
    color = {
        "field": "ratio",
        "transform": LinearColorMapper(palette=RATIO_PALETTE, low=0, high=1, nan_color=EMPTY),
    }
    bars = plot.hbar(
        y="row",
        left="left",
        right="right",
        height=0.92,
        source=source,
        fill_color=color,
        # A line of the same colour closes the hairlines that antialiasing leaves between neighbours.
        line_color=color,
        line_width=0.6,
    )
    plot.add_tools(hover([("layer", "@layer"), *_TOOLTIPS], [bars]))
    return plot


_TOOLTIPS = [
    ("step", "@step{0,0}"),
    ("near-rank", "@near_rank{0,0} (ratio @ratio{0.000})"),
    ("certified interval", "[@lower{0,0}, @upper{0,0}]"),
]


def _values(trajectory: Trajectory) -> dict[str, Any]:
    """The columns of a tooltip, in the smallest type that holds them."""
    largest = trajectory.steps.max(initial=0)
    return {
        "step": trajectory.steps.astype(np.float64 if largest >= 2**24 else np.float32),
        **{
            name: getattr(trajectory, name).astype(np.float32)
            for name in ("near_rank", "ratio", "lower", "upper")
        },
    }


def _cells(row: int, name: str, run: Run, trajectory: Trajectory) -> dict[str, Any]:
    count = len(trajectory.steps)
    left, right = _edges(trajectory.steps)
    site = run.sites.get(name)
    return {
        **_values(trajectory),
        "left": left,
        "right": right,
        "row": np.full(count, row, dtype=np.float32),
        "layer": [f"{name}, probe {shape_text(site.probe_shape if site else None)}"] * count,
    }


def _edges(steps: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Each step's cell reaches half-way to its neighbours, so uneven steps are drawn where they are."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5]), np.array([steps[0] + 0.5])
    places = steps.astype(np.float64)
    middles = 0.5 * (places[1:] + places[:-1])
    return np.concatenate([places[:1], middles]), np.concatenate([middles, places[-1:]])


def trajectories(results: Results) -> tuple[Plot, dict[str, object]] | None:
    """Near-rank on the probe over steps, a panel a layer, a line a run coloured by its batch size.

    The second value tells the page which columns its x-axis switch moves: x is a copy of `step` or `epoch`.
    """
    runs = [run for run in results.runs if run.trajectories]
    if not runs:
        return None
    layers = [name for name in results.sites if any(name in run.trajectories for run in runs)]
    labels = results.batch_labels
    color_of = dict(zip(labels, batch_colors(len(labels)), strict=True))
    rates = {run.name: run.epochs / run.steps if run.epochs and run.steps else None for run in runs}
    with_epochs = all(rates.values())
    lengths = [int(max(t.steps[-1] for t in run.trajectories.values())) for run in runs]
    # Runs of very different lengths (equal epochs) share an x-axis only in epochs.
    start = "epoch" if with_epochs and max(lengths) > 2 * max(min(lengths), 1) else "step"
    columns = 1 if len(layers) == 1 else 2 if len(layers) in (2, 4) else 3
    width = WIDTH // columns
    panels, sources, axes = [], [], []
    bands = False
    for index, layer in enumerate(layers):
        sites = [run.sites[layer] for run in runs if layer in run.sites]
        shape = next((site.probe_shape for site in sites if site.probe_shape), None)
        null = next((site.null_near_rank for site in sites if site.null_near_rank is not None), None)
        title = f"{short(layer, 30)} · {shape_text(shape)}" if shape else short(layer, 30)
        plot = base_figure(
            title, width, 250, _X_LABELS[start], "near-rank (count)" if index % columns == 0 else ""
        )
        top = max([min(shape) if shape else 0.0, null or 0.0, *(_largest(run, layer) for run in runs)])
        plot.y_range = Range1d(-0.03 * top, 1.06 * top or 1)
        if null is not None:
            plot.add_layout(
                Span(location=null, dimension="width", line_color=MUTED, line_dash="dashed", line_width=1.2)
            )
        lines = []
        for run in runs:
            if layer not in run.trajectories:
                continue
            trajectory = run.trajectories[layer].thinned(SHOWN_STEPS)
            content = _values(trajectory)
            rate = rates[run.name]
            content["epoch"] = (trajectory.steps * (rate or math.nan)).astype(np.float32)
            content["x"] = content[start]
            source = ColumnDataSource(content)
            color = color_of[run.label]
            if np.nanmax(trajectory.upper - trajectory.lower, initial=0) > 0:
                bands = True
                plot.add_glyph(
                    source, VArea(x="x", y1="lower", y2="upper", fill_color=color, fill_alpha=0.22)
                )
            name = plain(f"{run.label}, seed {run.seed if run.seed is not None else 'not recorded'}")
            alone = len(results.of(run.label)) == 1
            # add_glyph makes a third of the objects that `line` makes, for selections that there are none of.
            line = Line(x="x", y="near_rank", line_color=color, line_width=2.2 if alone else 1.4)
            lines.append(plot.add_glyph(source, line, name=name))
            if len(trajectory.steps) <= 30:
                lines.append(plot.scatter("x", "near_rank", source=source, color=color, size=4, name=name))
            sources.append(source.id)
        plot.add_tools(hover([("batch size", "$name"), *_TOOLTIPS], lines, line_policy="nearest"))
        axes.append(plot.xaxis[0].id)
        panels.append(plot)
    notes = [thinning_note(runs, what="Steps drawn")]
    if not bands:
        notes.append("Every certified interval is a single number here, so no band shows.")
    switch = {"sources": sources, "axes": axes, "labels": _X_LABELS, "start": start, "epochs": with_epochs}
    switch["legend"] = [
        (label, color_of[label]) for label in labels if any(run.label == label for run in runs)
    ]
    return Plot(side_by_side(panels, columns), notes), switch


_X_LABELS = {"step": "step (updates done)", "epoch": "epoch (passes over the training set)"}


def _largest(run: Run, layer: str) -> float:
    if layer not in run.trajectories:
        return 0.0
    trajectory = run.trajectories[layer]
    return float(np.nanmax(np.concatenate([trajectory.near_rank, trajectory.upper]), initial=0))
