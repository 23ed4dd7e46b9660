"""Tables and bars of what tracking costs: text for a terminal, a page with bars for a browser."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .machine import BUSY
from .overhead_result import EQUAL, OverheadResult, WayTimes
from .overhead_ways import DEFAULTS, NAIVE, NONE, OURS, STEP_END
from .tables import aligned, milliseconds, targets_table

BAR = 30
"""Characters of the longest bar."""
WIDTH = 900
"""Pixels of a figure."""
_PARTS = " ▏▎▍▌▋▊▉"


def text_report(name: str, result: OverheadResult) -> str:
    """Everything about one model: steps, layers, counts, targets."""
    busy = result.other_work or 0
    mark = f"  [BUSY MACHINE: {busy:.0%} of it went to other processes]" if busy > BUSY else ""
    parts = [f"{name}{mark}", steps_table(result)]
    if result.way(OURS).sites_ms:
        parts += ["", layers_table(result)]
    if result.counts:
        parts += ["", counts_line(result)]
    return "\n".join([*parts, "", targets_table(result.targets(name))])


def steps_table(result: OverheadResult) -> str:
    """A training step under every way of tracking, with bars of the step's time."""
    rows = [["", "step ms", "quartiles", "rounds", "added ms", "in hooks ms", "cost, % of step", ""]]
    longest = max((way.median_ms or 0.0 for way in result.ways), default=0.0)
    notes = []
    for way in result.ways:
        if way.error is not None or way.median_ms is None:
            rows.append([way.name, *["-"] * 6, f"FAILED ({way.error or 'not timed'})"])
            continue
        if way.steps_per_sample > 1:
            notes.append(
                f"A sample of {way.name} is the mean of {way.steps_per_sample} steps, not all tracked."
            )
        rows.append(
            [
                way.name,
                milliseconds(way.median_ms),
                f"{milliseconds(way.lower_quartile_ms or 0)} - {milliseconds(way.upper_quartile_ms or 0)}",
                str(way.rounds),
                _signed(way.added_ms),
                _signed(way.inside_ms),
                "-" if way.percent is None else f"{way.percent:.1f}",
                bar(way.median_ms, longest),
            ]
        )
    return "\n".join([*aligned(rows), *notes])


def layers_table(result: OverheadResult) -> str:
    """Time inside the hooks of every site, ours and naive's, with bars on naive's scale."""
    ours, naive = result.way(OURS).sites_ms, result.way(NAIVE).sites_ms
    counts = {count.site: count for count in result.counts}
    sites = [site for site in ours if site in naive or site in counts] or list(ours)
    rows = [["layer", "m x n", "near-rank", "ours ms", "naive ms", "times", "ours / naive"]]
    longest = max([*naive.values(), *ours.values()], default=0.0)
    for site in [*sites, *(site for site in ours if site not in sites)]:
        count = counts.get(site)
        own, theirs = ours[site], naive.get(site)
        differs = count is not None and count.verdict != EQUAL
        rows.append(
            [
                "(before the first layer)" if site == "#0" else site.replace(f"{STEP_END}#0", STEP_END),
                "-" if count is None else f"{count.shape[0]} x {count.shape[1]}",
                "-" if count is None else f"{count.ours}" + (f" (naive {count.naive})" if differs else ""),
                f"{own:.3f}",
                "-" if theirs is None else f"{theirs:.3f}",
                "-" if theirs is None or own <= 0 or count is None else f"{theirs / own:.1f}",
                f"{bar(own, longest)}|{bar(theirs or 0.0, longest)}",
            ]
        )
    return "\n".join(aligned(rows))


def counts_line(result: OverheadResult) -> str:
    """How many sites are counted the same by both ways."""
    differing = [count for count in result.counts if count.verdict != EQUAL]
    line = f"Counts of one step: {result.equal} of {len(result.counts)} sites equal those of matrix_rank"
    if not differing:
        return line + "."
    listed = "; ".join(
        f"{c.site} {c.ours}, naive {c.naive}, float64 {c.expected}: {c.verdict}" for c in differing
    )
    return f"{line}; {listed}."


def bar(value: float, longest: float) -> str:
    """A bar of text, in eighths of a character."""
    if longest <= 0 or value <= 0:
        return ""
    eighths = round(8 * BAR * value / longest)
    return "█" * (eighths // 8) + _PARTS[eighths % 8].strip()


def _signed(value: float | None) -> str:
    return "-" if value is None else ("-" if value < 0 else "") + milliseconds(abs(value))


# -- the page


def write_chart(path: Path, results: Sequence[tuple[str, OverheadResult]]) -> None:
    """Write bars of every model's steps and layers as one HTML file that opens offline.

    Raises:
        ModuleNotFoundError: bokeh, of the `lab` extra, is not installed.
    """
    from bokeh.embed import components
    from bokeh.layouts import column
    from bokeh.resources import Resources

    figures = []
    for name, result in results:
        figures.append(_steps_figure(name, result))
        if result.way(OURS).sites_ms:
            figures.append(_layers_figure(name, result))
    script, body = components(column(*figures))
    library = Resources(mode="inline", components=["bokeh"]).render_js()
    title = "Cost of tracking a training step"
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n{library}\n'
        f"</head><body><h1>{title}</h1>\n{body}\n{script}\n</body></html>\n"
    )
    path.write_text(page, encoding="utf-8")


COLOURS = {NONE: "#8c8c8c", NAIVE: "#c44e52", OURS: "#4c72b0", DEFAULTS: "#8172b3"}


def _steps_figure(name: str, result: OverheadResult) -> Any:
    from bokeh.plotting import figure

    ways = [way for way in reversed(result.ways) if way.median_ms is not None]
    plot = figure(
        title=f"{name}: a training step",
        y_range=[way.name for way in ways],
        x_axis_label="ms (bars: median, whiskers: quartiles)",
        height=90 + 40 * len(ways),
        width=WIDTH,
        toolbar_location=None,
    )
    plot.hbar(
        y=[way.name for way in ways],
        right=[way.median_ms for way in ways],
        height=0.6,
        fill_color=[COLOURS.get(way.name, "#dd8452") for way in ways],
        line_color=None,
    )
    plot.segment(
        x0=[way.lower_quartile_ms for way in ways],
        x1=[way.upper_quartile_ms for way in ways],
        y0=[way.name for way in ways],
        y1=[way.name for way in ways],
        line_color="black",
    )
    plot.text(
        x=[way.upper_quartile_ms for way in ways],
        y=[way.name for way in ways],
        text=[_label(way) for way in ways],
        x_offset=6,
        text_baseline="middle",
        text_font_size="11px",
    )
    plot.x_range.start = 0
    plot.x_range.end = 1.6 * max((way.upper_quartile_ms or 0.0 for way in ways), default=1.0)
    return plot


def _label(way: WayTimes) -> str:
    percent = "" if way.percent is None else f", costs {way.percent:.1f} % of a step"
    return f"{milliseconds(way.median_ms or 0)} ms{percent}"


def _layers_figure(name: str, result: OverheadResult) -> Any:
    from bokeh.plotting import figure
    from bokeh.transform import dodge

    ours, naive = result.way(OURS).sites_ms, result.way(NAIVE).sites_ms
    sites = [site for site in ours if site != "#0"]
    source = {"site": sites, "ours": [ours[s] for s in sites], "naive": [naive.get(s, 0.0) for s in sites]}
    plot = figure(
        title=f"{name}: time in the hooks of every layer",
        y_range=sites[::-1],
        x_axis_label="ms a step",
        height=110 + 16 * len(sites),
        width=WIDTH,
        toolbar_location=None,
        tooltips=[("layer", "@site"), ("ours", "@ours{0.000} ms"), ("naive", "@naive{0.000} ms")],
    )
    for field, way, offset in (("naive", NAIVE, -0.2), ("ours", OURS, 0.2)):
        plot.hbar(
            y=dodge("site", offset, range=plot.y_range),
            right=field,
            height=0.35,
            source=source,
            fill_color=COLOURS[way],
            line_color=None,
            legend_label=way,
        )
    plot.x_range.start = 0
    plot.legend.location = "bottom_right"
    return plot
