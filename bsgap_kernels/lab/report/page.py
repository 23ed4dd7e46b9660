"""report.html of a sweep or a run: one file that opens offline."""

from __future__ import annotations

from html import escape
from pathlib import Path

from bokeh.resources import Resources

from bsgap_kernels.lab.files import write_text
from bsgap_kernels.lab.report.compare import compare_data, compare_html
from bsgap_kernels.lab.report.data import ReportError, load_results
from bsgap_kernels.lab.report.figures import Switch, heat_maps, trajectories
from bsgap_kernels.lab.report.figures_batch import accuracy_by_batch, near_rank_by_batch
from bsgap_kernels.lab.report.figures_curves import parametric_plots
from bsgap_kernels.lab.report.figures_methods import methods_compared
from bsgap_kernels.lab.report.figures_sharpness import sharpness_by_batch
from bsgap_kernels.lab.report.figures_speed import speed_by_batch
from bsgap_kernels.lab.report.figures_time import time_by_batch
from bsgap_kernels.lab.report.figures_warmup import warmup_figure
from bsgap_kernels.lab.report.findings import findings_by_method
from bsgap_kernels.lab.report.plot import Plot, script_json
from bsgap_kernels.lab.report.runs import Results
from bsgap_kernels.lab.report.series import pack
from bsgap_kernels.lab.report.style import (
    DASH_NAMES,
    FONT,
    RATIO_PALETTE,
    line_styles,
    many_methods,
    method_color,
)
from bsgap_kernels.lab.report.table import has_means, table_html
from bsgap_kernels.lab.report.text import facts, facts_html, notices_html, title

__all__ = ["REPORT_FILE", "ReportError", "write_report"]

REPORT_FILE = "report.html"

# The page may run its own scripts and load nothing, whatever a browser or a library would like to fetch.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"

# A canvas drawn at screen resolution is blurred on paper: draw at twice that at least.
_SHARP = """{ const ratio = window.devicePixelRatio || 1;
  Object.defineProperty(window, "devicePixelRatio", { get: () => Math.max(2, ratio) }); }"""

_TERMS = """<b>Near-rank</b> of a layer: how many singular values of its activation matrix
(rows: samples, columns: units) exceed τ = max(atol, rtol × the largest one). <b>Ratio</b>: near-rank divided
by the smaller dimension, 1 at most. <b>Probe</b>: one fixed batch, the same samples for every run, so that
the matrix has the same shape whatever the training batch. <b>Gaussian null</b>: the same count for a
matrix of that shape with independent normal entries, what the shape alone gives. <b>Layers</b> are
named module#call: relu1#0 is the output of the module relu1 at its first call in a forward pass. <b>Certified
interval</b>: bounds that hold despite rounding; equal bounds prove the count."""

_MEANS = """ <b>Mean rows</b>: mean over seeds ± half of its 95 % interval by Student's t; a single value, or
equal ones, have none."""


def write_report(directory: Path) -> Path:
    """Write `report.html` of a sweep directory, or of one run, into it and return its path.

    Shows what is there and names what is missing in a box at the top. The file holds its own scripts and data
    and loads nothing; its plotting library is most of its size.

    Raises:
        ReportError: the directory does not exist, holds nothing usable, or cannot be written to.
    """
    directory = Path(directory)
    page = render(load_results(directory))
    path = directory / REPORT_FILE
    try:
        write_text(path, page)
    except OSError as error:
        raise ReportError(f"{path} cannot be written: {error.strerror}") from error
    return path


def render(results: Results) -> str:
    """The page as text."""
    heat, lines = heat_maps(results), trajectories(results)
    plots: dict[str, Plot | None] = {
        "methods": methods_compared(results),
        "heatmap": heat,
        "batch": near_rank_by_batch(results),
        "trajectory": lines[0] if lines else None,
        "accuracy": accuracy_by_batch(results),
        "time": time_by_batch(results),
        "speed": speed_by_batch(results),
        "sharpness": sharpness_by_batch(results),
        "curves": parametric_plots(results),
        "warmup": warmup_figure(results),
    }
    # What only newer results hold has no figure, and no sentence of its absence, in a report of older ones.
    plots = {name: plot for name, plot in plots.items() if plot is not None or name in _ABSENT}
    switch = lines[1] if lines else None
    keys = {"heatmap": _ramp_html(), "trajectory": _legend_html(results, switch) if switch else ""}
    if many_methods(results):
        keys |= dict.fromkeys(
            ("accuracy", "speed", "sharpness"), f'<div class="key">{_methods_html(results)}</div>'
        )
    figures = "".join(
        _figure_html(index, name, plot, keys.get(name, ""))
        for index, (name, plot) in enumerate(plots.items(), start=1)
    )
    drawn = any(plots.values())
    bokeh = Resources(mode="inline", components=["bokeh"]).render_js() if drawn else ""
    head, lead = title(results)
    data = {"switch-data": switch.to_json()} if switch else {}
    comparison = compare_html(results)
    data |= {"compare-data": compare_data(results)} if comparison else {}
    data |= {"series-data": pack(results)} if drawn or comparison else {}
    blocks = "".join(_data_html(name, script_json(content)) for name, content in data.items())
    names = ["series.js", *(["page.js"] if drawn else []), *(["compare.js"] if comparison else [])]
    scripts = "".join(f"<script>{asset(name)}</script>" for name in names) if data else ""
    means = _MEANS if has_means(results) else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=1180">
<title>{escape(head)}</title>
<link rel="icon" href="data:,">
<style>{asset("page.css").replace("__FONT__", FONT)}</style>
<script>{_SHARP}</script>
</head>
<body>
<main>
<header class="card">
<h1>{escape(head)}</h1>
<p class="lead">{escape(lead)}</p>
{facts_html(facts(results))}
</header>
<noscript><p class="notice">The figures and the comparison need JavaScript, which is off here; the numbers are
in the table.</p></noscript>
{notices_html(results)}
<section class="card" id="summary">
<h2>Results</h2>
{_findings_html(results)}
{table_html(results)}
<p class="terms">{_TERMS}{means}</p>
</section>
{figures}
{comparison}
<footer>Made by bsgap_kernels from the files in {escape(results.directory.resolve().name)}/; every number
comes from them. Point at a figure for its values; the tools above it, which show under the pointer, pan
and zoom.</footer>
</main>
{blocks}
{bokeh}
{scripts}
</body>
</html>
"""


def _findings_html(results: Results) -> str:
    """The list of findings; of many methods, each one's behind its name."""
    by_method = findings_by_method(results)
    if not many_methods(results):
        return _list_html([sentence for sentences in by_method.values() for sentence in sentences])
    parts = [
        f"<details><summary>{escape(method)}: smallest against largest batch size "
        f"({len(sentences)} finding{'s' * (len(sentences) != 1)})</summary>{_list_html(sentences)}</details>"
        for method, sentences in by_method.items()
        if method and sentences
    ]
    return _list_html(by_method[""]) + "".join(parts)


def _list_html(sentences: list[str]) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f'<ul class="findings">{items}</ul>'


_HEADINGS = {
    "methods": "Methods compared",
    "heatmap": "Near-rank ratio of every layer over the steps",
    "batch": "Near-rank against batch size",
    "trajectory": "Near-rank of every layer over training",
    "accuracy": "Accuracy and generalisation gap against batch size",
    "time": "What the metric costs per step",
    "speed": "Throughput and time to accuracy",
    "sharpness": "Sharpness of the minima against batch size",
    "curves": "Loss and accuracy between two runs",
    "warmup": "AutoWU: how it chose the learning rate",
}
_CAPTIONS = {
    "methods": "How far does a row lie from plain SGD's at the same batch size, how far are its seeds apart, "
    "and what did it cost? A row is a whole recipe: methods differ in learning rate, schedule and cost too, "
    "so a difference names no cause. Gradients: the images whose gradient was taken, in all passes of all "
    "updates.",
    "heatmap": "Bright: the layer uses most of its directions; dark: few singular values are left above τ. "
    "Compare the same layer between panels. Each panel spans the steps of its own run.",
    "batch": "Do the lines fall to the right? Dashed: the Gaussian null of the same shape, which the batch "
    "size cannot move because the probe has one shape for all runs. A line far below its null is near-rank "
    "loss.",
    "trajectory": "When do the lines of different batch sizes part, and do they stay apart? Dashed: the "
    "Gaussian null of the same shape; shaded: the certified interval where it is wider than one number.",
    "accuracy": "Does the gap widen where near-rank falls? Left: both accuracies on the whole sets; right: "
    "their difference, above zero where the network does better on what it was trained on.",
    "time": "How much longer is a step in which every layer is counted on the training batch, and how near "
    "is that to what arithmetic allows? Left: in % of the step without it; middle: in milliseconds on top of "
    "the step. Right, and no part of a step: one reading of the probe batch, a forward pass with certified "
    "intervals and spectral summaries, × how often it was read.",
    "speed": "Does a larger batch reach an accuracy sooner, or only see more images a second? Training time "
    "alone, metric and evaluation left out; a target counts as reached at the evaluation that first saw it.",
    "sharpness": "How much does the loss grow at most in a small box about the weights? φ = "
    "100·(max f(x + Az) − f(x))/(1 + f(x)) over |z_i| ≤ ε(|(A⁺x)_i| + 1), A the identity (full space) or a "
    "random matrix (subspace); every value is a lower bound, the best that the maximisation found.",
    "curves": "Is there a hill between two solutions, and on which side is the valley wider? α = 0 is run a "
    "and α = 1 run b, marked by dashed lines.",
    "warmup": "Does the loss turn up before the decay begins (upright line), and do the tests agree on the "
    "rate? Top left: the losses so far and, in colour, the posterior of the last test with two standard "
    "deviations; bottom left: filled points are epochs with more votes than half (dashed); right: the rate "
    "of every update, and the rate at the minimum of each test with their mean (bar); dotted: the rate "
    "chosen.",
}
# Figures that a report always has a place for.
_ABSENT = {
    "heatmap": "No figure: no run has near-rank values on the probe.",
    "batch": "No figure: no run with a known batch size has a final near-rank on the probe.",
    "trajectory": "No figure: no run has near-rank values on the probe.",
    "accuracy": "No figure: no run with a known batch size has an accuracy on a whole set.",
    "time": "No figure: no run has times of both the step and the metric.",
}


def _figure_html(index: int, name: str, plot: Plot | None, key: str) -> str:
    """A card whose first block keeps heading and key, its last the caption: what is printed on one page."""
    title, what = plot.words if plot is not None and plot.words else (_HEADINGS[name], _CAPTIONS[name])
    heading = f"<h2>{index}. {escape(title)}</h2>"
    if plot is None:
        absent = f'<p class="absent">{escape(_ABSENT[name])}</p>'
        return f'<figure class="card" id="figure-{name}">{heading}{absent}</figure>'
    notes = escape(" ".join(plot.notes))
    caption = f"<figcaption><b>What to look at:</b> {escape(what)} {notes}</figcaption>"
    parts = []
    for place, block in enumerate(plot.blocks):
        ident = f"block-{name}-{place}"
        before = heading + key if place == 0 else ""
        after = caption if place == len(plot.blocks) - 1 else ""
        parts.append(
            f'<div class="whole">{before}<div class="block" id="{ident}" data-block="data-{ident}" '
            f'style="min-height: {block.height}px"></div>{after}</div>'
            + _data_html(f"data-{ident}", block.to_json())
        )
    return f'<figure class="card" id="figure-{name}">{"".join(parts)}</figure>'


def _data_html(name: str, content: str) -> str:
    return f'<script type="application/json" id="{name}">{content}</script>'


def _ramp_html() -> str:
    stops = ", ".join(RATIO_PALETTE[::15])
    return (
        '<div class="key"><span class="scale"><span>near-rank ratio</span><span>0</span>'
        f'<span class="ramp" style="background: linear-gradient(90deg, {stops})"></span><span>1</span></span>'
        '<span><i class="box"></i>no value</span></div>'
    )


def _legend_html(results: Results, switch: Switch) -> str:
    styles, drawn = line_styles(results), [run for run in results.runs if run.trajectories]
    colors = {f"batch {run.batch_label}": styles[run.label][0] for run in drawn}
    patterns = {run.method: styles[run.label][1] for run in drawn} if len(results.methods) > 1 else {}
    swatches = "".join(map(_color_html, colors, colors.values()))
    if many_methods(results):
        swatches = _methods_html(results)
        patterns = {f"batch {run.batch_label}": styles[run.label][1] for run in drawn}
        patterns = patterns if len(patterns) > 1 else {}
    swatches += "".join(
        f'<span><i class="{DASH_NAMES[pattern]}"></i>{escape(name)}</span>'
        for name, pattern in patterns.items()
    )
    buttons = ""
    if switch.epochs:
        buttons = "".join(
            f'<button type="button" data-unit="{unit}" aria-pressed="{pressed}">{unit}s</button>'
            for unit in ("epoch", "step")
            for pressed in [str(unit == switch.start).lower()]
        )
        buttons = f'<span class="switch">x axis: {buttons}</span>'
    return f'<div class="key">{swatches}<span><i class="dash"></i>Gaussian null</span>{buttons}</div>'


def _methods_html(results: Results) -> str:
    """What the colours are where methods are colours."""
    return "".join(_color_html(method, method_color(results, method)) for method in results.methods)


def _color_html(name: str, color: str) -> str:
    return f'<span><i style="border-color: {color}"></i>{escape(name)}</span>'


def asset(name: str) -> str:
    """The text of a file beside this one."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
