"""The report's figure of what the metric costs: in % of the step, and in milliseconds."""

from __future__ import annotations

from typing import Any

from bokeh.core.properties import value
from bokeh.models import ColumnDataSource, FactorRange, Legend, LegendItem, Range1d
from bokeh.plotting import figure

from bsgap_kernels.lab.report.data import Results
from bsgap_kernels.lab.report.figures import Plot
from bsgap_kernels.lab.report.figures_batch import mean
from bsgap_kernels.lab.report.style import (
    FONT,
    INK,
    METRIC,
    PROBE,
    STEP,
    WIDTH,
    base_figure,
    hover,
    side_by_side,
    significant,
)

_LEFT_WIDTH = 500


def time_by_batch(results: Results) -> Plot | None:
    """Time of the metric against the step it is part of, a bar a batch size: as a share, and in ms."""
    rows: list[dict[str, Any]] = []
    for label in results.batch_labels:
        runs = [run for run in results.of(label) if run.step_ms and run.metric_ms is not None]
        if not runs:
            continue
        step = sum(run.step_ms or 0 for run in runs) / len(runs)
        metric = sum(run.metric_ms or 0 for run in runs) / len(runs)
        probe = mean([run.probe_ms for run in runs if run.probe_ms is not None]) or 0.0
        rows.append(
            {
                "batch": f"batch {label}",
                "step_ms": step,
                "metric_ms": metric,
                "probe_ms": probe,
                "metric_end": step + metric,
                "end": step + metric + probe,
                "percent": 100 * metric / step,
                "percent_text": f" {significant(100 * metric / step)} %",
                "ms_text": f" metric {significant(metric)} ms",
            }
        )
    if not rows:
        return None
    source = ColumnDataSource({key: [row[key] for row in rows] for key in rows[0]})
    has_probe = any(row["probe_ms"] for row in rows)
    share = _bar_figure(rows, "Share of the step", _LEFT_WIDTH, "metric time (% of the step without it)")
    share.x_range = Range1d(0, 1.25 * max(row["percent"] for row in rows) or 1)
    stack = _bar_figure(rows, "Mean time per step", WIDTH - _LEFT_WIDTH, "time per step (ms)")
    stack.x_range = Range1d(0, 1.38 * max(row["end"] for row in rows))
    bar: dict[str, Any] = {"y": "batch", "height": 0.62, "source": source, "line_color": "#ffffff"}
    drawn = [share.hbar(left=0, right="percent", fill_color=METRIC, **bar)]
    parts = [("step", 0, "step_ms", STEP), ("metric, training batch", "step_ms", "metric_end", METRIC)]
    if has_probe:
        parts.append(("metric, probe batch", "metric_end", "end", PROBE))
    items = []
    for name, left, right, color in parts:
        drawn.append(stack.hbar(left=left, right=right, fill_color=color, **bar))
        items.append(LegendItem(label=name, renderers=[drawn[-1]]))
    style: dict[str, Any] = {"source": source, "text_baseline": "middle", "text_font": value(FONT)}
    style |= {"text_font_size": "12px", "text_color": INK}
    share.text("percent", "batch", "percent_text", **style)
    stack.text("end", "batch", "ms_text", **style)
    tooltips = [
        ("", "@batch"),
        ("step without the metric", "@step_ms{0,0.000} ms"),
        ("metric on the training batch", "@metric_ms{0,0.000} ms (@percent{0,0.0} % of the step)"),
    ]
    if has_probe:
        tooltips.append(("probe forward and metric", "@probe_ms{0,0.000} ms, spread over all steps"))
    for plot, bars in ((share, drawn[:1]), (stack, drawn[1:])):
        plot.add_tools(hover(tooltips, bars))
    legend = Legend(items=items, orientation="horizontal", border_line_color=None, label_text_font=FONT)
    legend.label_text_font_size, legend.label_text_color = "12px", INK
    legend.location, legend.padding, legend.margin = "top_left", 2, 2
    stack.add_layout(legend, "below")
    notes = "Means over the steps of a run" + (" and over seeds." if len(results.runs) > len(rows) else ".")
    return Plot(side_by_side([share, stack], 2), [notes])


def _bar_figure(rows: list[dict[str, Any]], title: str, width: int, x_label: str) -> figure:
    factors = FactorRange(factors=[row["batch"] for row in reversed(rows)])
    plot = base_figure(title, width, 120 + 40 * len(rows), x_label, "", y_range=factors)
    plot.ygrid.grid_line_color = None
    # The same height for both, though only one has a legend below.
    plot.frame_height = 40 * len(rows) + 10
    plot.height_policy = "fit"
    return plot
