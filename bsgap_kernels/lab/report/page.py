"""report.html of a sweep or a run: one file that opens offline."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

from bokeh.embed import components
from bokeh.models import Model
from bokeh.resources import Resources

from bsgap_kernels.lab.report.data import ReportError, Results, load_results
from bsgap_kernels.lab.report.figures import Plot, heat_maps, trajectories
from bsgap_kernels.lab.report.figures_batch import accuracy_by_batch, near_rank_by_batch
from bsgap_kernels.lab.report.figures_time import time_by_batch
from bsgap_kernels.lab.report.style import FONT, RATIO_PALETTE
from bsgap_kernels.lab.report.text import facts_html, findings, notices_html, table_html

__all__ = ["REPORT_FILE", "ReportError", "write_report"]

REPORT_FILE = "report.html"

# The page may run its own scripts and load nothing, whatever a browser or a library would like to fetch.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"

# A canvas drawn at screen resolution is blurred on paper: draw at twice that at least.
_SHARP = """{ const ratio = window.devicePixelRatio || 1;
  Object.defineProperty(window, "devicePixelRatio", { get: () => Math.max(2, ratio) }); }"""

_TERMS = """<p class="terms"><b>Near-rank</b> of a layer: how many singular values of its activation matrix
(rows: samples, columns: units) exceed τ = max(atol, rtol × the largest one). <b>Ratio</b>: near-rank divided
by the smaller dimension, 1 at most. <b>Probe</b>: one fixed batch, the same samples for every run, so that
the matrix has the same shape whatever the training batch. <b>Gaussian null</b>: the same count for a
matrix of that shape with independent normal entries, what the shape alone gives. <b>Certified
interval</b>: bounds that hold despite rounding; equal bounds prove the count.</p>"""


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
    temporary = directory / f"{REPORT_FILE}.tmp"
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ReportError(f"{path} cannot be written: {error.strerror}") from error
    return path


def render(results: Results) -> str:
    """The page as text."""
    heat, lines = heat_maps(results), trajectories(results)
    plots: dict[str, Plot | None] = {
        "heatmap": heat,
        "batch": near_rank_by_batch(results),
        "trajectory": lines[0] if lines else None,
        "accuracy": accuracy_by_batch(results),
        "time": time_by_batch(results),
    }
    models: dict[str, Model] = {name: plot.model for name, plot in plots.items() if plot is not None}
    script, divs = components(models) if models else ("", {})
    bokeh = Resources(mode="inline", components=["bokeh"]).render_js() if models else ""
    switch = lines[1] if lines else {}
    keys = {"heatmap": _ramp_html(), "trajectory": _legend_html(switch) if switch else ""}
    figures = "".join(
        _figure_html(index, name, divs.get(name), plots[name], keys.get(name, ""))
        for index, name in enumerate(plots, start=1)
    )
    found = "".join(f"<li>{escape(sentence)}</li>" for sentence in findings(results))
    title, lead = _title(results)
    switching = ""
    if switch:
        options = json.dumps({key: switch[key] for key in ("sources", "axes", "labels")})
        # No data of a run is in the options, only Bokeh's ids and fixed words.
        switching = f'<script type="application/json" id="switch-options">{options}</script>'
        switching += f"<script>{_asset('page.js')}</script>"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=1180">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{_asset("page.css").replace("__FONT__", FONT)}</style>
<script>{_SHARP}</script>
{bokeh}
</head>
<body>
<main>
<header class="card">
<h1>{escape(title)}</h1>
<p class="lead">{escape(lead)}</p>
{facts_html(results)}
</header>
{notices_html(results)}
<section class="card" id="summary">
<h2>Results</h2>
<ul class="findings">{found}</ul>
{table_html(results)}
{_TERMS}
</section>
{figures}
<footer>Made by bsgap_kernels from the files in {escape(results.directory.resolve().name)}/; every number
comes from them. Point at a figure for its values; the tools above it, which show under the pointer, pan
and zoom.</footer>
</main>
{script}
{switching}
</body>
</html>
"""


def _title(results: Results) -> tuple[str, str]:
    runs = results.runs
    models = (
        ", ".join(dict.fromkeys(run.facts["model"] for run in runs if "model" in run.facts)) or "a network"
    )
    data = (
        ", ".join(dict.fromkeys(run.facts["data"] for run in runs if "data" in run.facts)) or "unnamed data"
    )
    count = len(results.batch_labels)
    lead = (
        f"{models} on {data}: {count} batch size{'s' * (count != 1)}, {len(runs)} run{'s' * (len(runs) != 1)}"
    )
    return "Near-rank of activations" + (" across batch sizes" if count > 1 else ""), f"{lead}."


_HEADINGS = {
    "heatmap": "Near-rank ratio of every layer over the steps",
    "batch": "Near-rank against batch size",
    "trajectory": "Near-rank of every layer over training",
    "accuracy": "Accuracy and generalisation gap against batch size",
    "time": "What the metric costs per step",
}
_CAPTIONS = {
    "heatmap": "Bright: the layer uses most of its directions; dark: few singular values are left above τ. "
    "Compare the same layer between panels. Each panel spans the steps of its own run.",
    "batch": "Do the lines fall to the right? Dashed: the Gaussian null of the same shape, which the batch "
    "size cannot move because the probe has one shape for all runs. A line far below its null is near-rank "
    "loss.",
    "trajectory": "When do the lines of different batch sizes part, and do they stay apart? Dashed: the "
    "Gaussian null of the same shape; shaded: the certified interval where it is wider than one number.",
    "accuracy": "Does the gap widen where near-rank falls? Left: both accuracies on the whole sets; right: "
    "their difference, above zero where the network does better on what it was trained on.",
    "time": "How much longer is a step with the metric? Left: what reading every layer on the training "
    "batch adds, in % of the step; right: the same in milliseconds on top of the step (grey), with the probe "
    "batch spread over all steps.",
}
_ABSENT = {
    "heatmap": "No figure: no run has near-rank values on the probe.",
    "batch": "No figure: no run with a known batch size has a final near-rank on the probe.",
    "trajectory": "No figure: no run has near-rank values on the probe.",
    "accuracy": "No figure: no run with a known batch size has an accuracy on a whole set.",
    "time": "No figure: no run has times of both the step and the metric.",
}


def _figure_html(index: int, name: str, div: str | None, plot: Plot | None, key: str) -> str:
    heading = f"<h2>{index}. {escape(_HEADINGS[name])}</h2>"
    if div is None or plot is None:
        absent = f'<p class="absent">{escape(_ABSENT[name])}</p>'
        return f'<figure class="card" id="figure-{name}">{heading}{absent}</figure>'
    notes = escape(" ".join(plot.notes))
    caption = f"<figcaption><b>What to look at:</b> {escape(_CAPTIONS[name])} {notes}</figcaption>"
    return f'<figure class="card" id="figure-{name}">{heading}{key}{div}{caption}</figure>'


def _ramp_html() -> str:
    stops = ", ".join(RATIO_PALETTE[::15])
    return (
        '<div class="key"><span class="scale"><span>near-rank ratio</span><span>0</span>'
        f'<span class="ramp" style="background: linear-gradient(90deg, {stops})"></span><span>1</span></span>'
        '<span><i class="box"></i>no value</span></div>'
    )


def _legend_html(switch: dict[str, object]) -> str:
    legend = switch["legend"]
    assert isinstance(legend, list)
    swatches = "".join(
        f'<span><i style="background: {color}"></i>batch {escape(label)}</span>' for label, color in legend
    )
    buttons = ""
    if switch["epochs"]:
        buttons = "".join(
            f'<button type="button" data-unit="{unit}" aria-pressed="{pressed}">{unit}s</button>'
            for unit in ("epoch", "step")
            for pressed in [str(unit == switch["start"]).lower()]
        )
        buttons = f'<span class="switch">x axis: {buttons}</span>'
    return f'<div class="key">{swatches}<span><i class="dash"></i>Gaussian null</span>{buttons}</div>'


def _asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
