"""The report's figure of what the metric costs: in % of the step, and in milliseconds."""

from __future__ import annotations

import math
from typing import Any

from bokeh.core.properties import value
from bokeh.models import ColumnDataSource, FactorRange, Legend, LegendItem, Range1d
from bokeh.plotting import figure

from bsgap_kernels.lab.report.plot import Block, Plot
from bsgap_kernels.lab.report.runs import Results, Run
from bsgap_kernels.lab.report.statistics import Estimate, estimate
from bsgap_kernels.lab.report.style import (
    DASH,
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

_SHARE_WIDTH, _PROBE_WIDTH = 400, 270
# Bars of many batch sizes and methods get narrower, so that the figure fits a printed page.
_BARS_HEIGHT = 520


def time_by_batch(results: Results) -> Plot | None:
    """Time of the metric against the step it is part of, a bar a batch size; apart from it the probe's."""
    rows = [row for label in results.labels if (row := _row(label, results.of(label))) is not None]
    if not rows:
        return None
    source = ColumnDataSource({key: [row[key] for row in rows] for key in rows[0]})
    has_probe = any(row["probe_ms"] for row in rows)
    has_floor = any(math.isfinite(row["floor_ms"]) for row in rows)
    probe_width = _PROBE_WIDTH * has_probe
    share = _bar_figure(rows, "Share of the step", _SHARE_WIDTH, "metric time (% of the step without it)")
    share.x_range = Range1d(0, 1.25 * max(row["percent_high"] for row in rows) or 1)
    stack = _bar_figure(rows, "Mean time per step", WIDTH - _SHARE_WIDTH - probe_width, "time per step (ms)")
    stack.x_range = Range1d(0, 1.42 * max(row["text_at"] for row in rows))
    panels = [share, stack]
    bar: dict[str, Any] = {"y": "batch", "height": 0.62, "source": source, "line_color": "#ffffff"}
    style: dict[str, Any] = {"source": source, "text_baseline": "middle", "text_font": value(FONT)}
    style |= {"text_font_size": "12px", "text_color": INK}
    drawn = {share: [share.hbar(left=0, right="percent", fill_color=METRIC, **bar)], stack: []}
    items = []
    for name, left, right, color in (
        ("step", 0, "step_ms", STEP),
        ("metric, training batch", "step_ms", "end", METRIC),
    ):
        drawn[stack].append(stack.hbar(left=left, right=right, fill_color=color, **bar))
        items.append(LegendItem(label=name, renderers=[drawn[stack][-1]]))
    share.text("percent_high", "batch", "percent_text", **style)
    stack.text("text_at", "batch", "ms_text", **style)
    ends: dict[str, Any] = {"y0": "batch", "y1": "batch", "source": source, "color": INK, "line_width": 1.2}
    share.segment(x0="percent_low", x1="percent_high", **ends)
    stack.segment(x0="metric_low", x1="metric_high", **ends)
    tooltips = [
        ("", "@batch"),
        ("step without the metric", "@step_ms{0,0.000} ms"),
        ("metric on the training batch", "@metric_ms{0,0.000} ms (@percent{0,0.0} % of the step) @spread"),
    ]
    note = "Means over the steps of a run" + (" and over seeds." if len(results.runs) > len(rows) else ".")
    if has_floor:
        tooltips.append(("its floor", "@floor_ms{0,0.000} ms"))
        tick: dict[str, Any] = {"marker": "dash", "angle": math.pi / 2, "line_color": INK, "line_width": 2.2}
        tick |= {"size": min(24, 0.6 * _bar_height(rows)), "source": source}
        share.scatter("floor_percent", "batch", **tick)
        floor = stack.scatter("floor_at", "batch", **tick)
        items.append(LegendItem(label="floor of the metric", renderers=[floor]))
        note += (
            " Upright ticks: the floor, half a Gram matrix of every layer at the float32 peak of the cores, "
            "measured in the run."
        )
    if has_probe:
        probe = _bar_figure(rows, "Apart: reading the probe", probe_width, "time per reading (ms)")
        probe.x_range = Range1d(0, 2.3 * max(row["probe_ms"] for row in rows))
        drawn[probe] = [probe.hbar(left=0, right="probe_ms", fill_color=PROBE, **bar)]
        probe.text("probe_ms", "batch", "probe_text", **style)
        panels.append(probe)
    for plot, bars in drawn.items():
        own = (
            [("", "@batch"), ("a reading × readings", "@probe_text")] if plot not in panels[:2] else tooltips
        )
        plot.add_tools(hover(own, bars))
    legend = Legend(items=items, orientation="horizontal", border_line_color=None, label_text_font=FONT)
    legend.label_text_font_size, legend.label_text_color = "12px", INK
    legend.location, legend.padding, legend.margin = "top_left", 2, 2
    stack.add_layout(legend, "below")
    counts = sorted({row["seeds"] for row in rows if row["spread"]})
    if counts:
        seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
        note += f" Thin lines: 95 % intervals of the metric's time over seeds by Student's t (n = {seeds})."
    return Plot([Block(side_by_side(panels, len(panels)), share.height)], [note])


def _row(label: str, found: list[Run]) -> dict[str, Any] | None:
    """Means over the seeds of one label, with the interval of what the metric takes."""
    runs = [run for run in found if run.step_ms and run.metric_ms is not None]
    step = estimate([run.step_ms or 0.0 for run in runs])
    metric = estimate([run.metric_ms or 0.0 for run in runs])
    percent = estimate([100 * (run.metric_ms or 0.0) / (run.step_ms or 1.0) for run in runs])
    if step is None or metric is None or percent is None:
        return None
    probe = estimate([run.probe_ms for run in runs if run.probe_ms is not None])
    floor = estimate([run.floor_ms for run in runs if run.floor_ms is not None])
    floor_ms = math.nan if floor is None else floor.mean
    probe_ms = 0.0 if probe is None else probe.mean
    readings = [run.probes for run in runs if run.probes is not None]
    times = " to ".join(map(str, dict.fromkeys((min(readings), max(readings))))) if readings else DASH
    end = step.mean + metric.mean
    return {
        "batch": f"batch {label}",
        "step_ms": step.mean,
        "metric_ms": metric.mean,
        "end": end,
        "percent": percent.mean,
        "percent_low": max(percent.lower, 0.0),
        "percent_high": percent.upper,
        "metric_low": step.mean + max(metric.lower, 0.0),
        "metric_high": step.mean + metric.upper,
        "text_at": max(end, step.mean + metric.upper),
        "percent_text": f" {significant(percent.mean)} %",
        "ms_text": f" metric {significant(metric.mean)} ms",
        "floor_ms": floor_ms,
        "floor_percent": 100 * floor_ms / step.mean,
        "floor_at": step.mean + floor_ms,
        "probe_ms": probe_ms,
        "probe_text": f" {significant(probe_ms)} ms × {times}",
        "spread": _spread(metric),
        "seeds": metric.count,
    }


def _spread(metric: Estimate) -> str:
    if metric.half is None:
        return ""
    ends = f"{significant(max(metric.lower, 0.0))} to {significant(metric.upper)} ms"
    return f"(mean of {metric.count} seeds, 95 % interval {ends})"


def _bar_figure(rows: list[dict[str, Any]], title: str, width: int, x_label: str) -> figure:
    factors = FactorRange(factors=[row["batch"] for row in reversed(rows)])
    bar = _bar_height(rows)
    plot = base_figure(title, width, 120 + bar * len(rows), x_label, "", y_range=factors)
    plot.ygrid.grid_line_color = None
    # The same height for both, though only one has a legend below.
    plot.frame_height = bar * len(rows) + 10
    plot.height_policy = "fit"
    return plot


def _bar_height(rows: list[dict[str, Any]]) -> int:
    """Pixels of a bar with the gap to the next."""
    return min(40, _BARS_HEIGHT // len(rows))
