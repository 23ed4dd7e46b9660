"""The report of what `RankTracker` wrote in any training loop: one file that opens offline."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from bokeh.embed import components
from bokeh.models import ColumnDataSource, MultiLine
from bokeh.resources import Resources

from bsgap_kernels.lab.files import write_text
from bsgap_kernels.lab.report.data import ReportError, is_run
from bsgap_kernels.lab.report.page import POLICY, REPORT_FILE, asset
from bsgap_kernels.lab.report.series import SHOWN_STEPS
from bsgap_kernels.lab.report.style import (
    DASH,
    FONT,
    RATIO_PALETTE,
    WIDTH,
    base_figure,
    hover,
    side_by_side,
    significant,
)
from bsgap_kernels.lab.report.text import facts_html
from bsgap_kernels.tracking.baseline import is_saturated
from bsgap_kernels.tracking.history import SUFFIXES, Entry, entries_of, files_of, split
from bsgap_kernels.tracking.rows import OVERHEAD

_TERMS = """<b>near_rank</b>: singular values of the activation matrix above rtol × the largest one;
<b>ratio</b>: its share of the largest count possible. A ratio of 1, or a count of at most 1, is
<b>saturated</b>: it cannot show a change. The other metrics: docs/metrics.md. Layers are named module#call
and stand in forward order."""
_PANEL_HEIGHT = 300


@dataclass
class Series:
    """Steps and values of one metric of one site."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def thinned(self) -> tuple[list[int], list[float]]:
        """At most SHOWN_STEPS of the steps, evenly spaced, first and last kept."""
        if len(self.steps) <= SHOWN_STEPS:
            return self.steps, self.values
        kept = np.unique(np.linspace(0, len(self.steps) - 1, SHOWN_STEPS).round().astype(int)).tolist()
        return [self.steps[i] for i in kept], [self.values[i] for i in kept]


@dataclass
class Tracked:
    """One run of one view: series by metric, then by site in forward order, and the facts of its sites."""

    name: str
    view: str
    series: dict[str, dict[str, Series]] = field(default_factory=lambda: defaultdict(dict))
    headers: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def sites(self) -> list[str]:
        """Every site, in forward order."""
        return list(dict.fromkeys(site for of_metric in self.series.values() for site in of_metric))


def is_tracked(paths: Sequence[Path]) -> bool:
    """Return true for a tracker's files and folders of them, false for a directory of the trainer's."""

    def trainers(path: Path) -> bool:
        return path.is_dir() and (is_run(path) or any(is_run(child) for child in path.iterdir()))

    def files(path: Path) -> bool:
        return path.is_dir() and any(child.suffix in SUFFIXES for child in path.iterdir())

    return not any(trainers(path) for path in paths) and any(p.is_file() or files(p) for p in paths)


def write_tracked_report(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of files, or folders of files, that `RankTracker` wrote, and return its path.

    Args:
        paths: one, or several to compare.
        out: the file to write; default `report.html` in a folder, FILE.html beside one file.

    Raises:
        ReportError: a path does not exist, holds something else or nothing, or the report cannot be written.
    """
    runs, shares = load(paths)
    first = paths[0]
    out = out or (first / REPORT_FILE if first.is_dir() else first.with_suffix(".html"))
    try:
        write_text(out, render(runs, shares, [path.name for path in paths]))
    except OSError as error:
        raise ReportError(f"{out} cannot be written: {error.strerror}") from error
    return out


def load(paths: Sequence[Path]) -> tuple[list[Tracked], list[float]]:
    """Return every run and view of the files, and the shares of steps that tracking took."""
    runs: dict[tuple[str, str], Tracked] = {}
    shares: list[float] = []
    names: set[str] = set()
    for path in paths:
        try:
            files = files_of(path)
            parts = [(file, *split(entries_of(file))) for file in files]
        except (OSError, ValueError, ImportError) as error:
            raise ReportError(str(error).removeprefix("path: ")) from error
        for file, entries, headers in parts:
            own = {entry.run for entry in entries}
            # Runs of one name in two files are told apart by the file.
            label = {run: f"{file.stem}: {run}" if run in names else run for run in own}
            names |= own
            for entry in entries:
                if entry.metric == OVERHEAD:
                    shares.append(entry.value)
                elif entry.site:
                    key = (label[entry.run], entry.view)
                    _add(runs.setdefault(key, Tracked(*key)), entry)
            for header in headers:
                run = runs.get((label.get(header["run"], ""), header["view"]))
                if run is not None:
                    run.headers[header["site"]] = header
    if not runs:
        raise ReportError(f"{paths[0]} holds no values of a tracker")
    return sorted(runs.values(), key=lambda run: (run.view != "batch", run.view)), shares


def _add(run: Tracked, entry: Entry) -> None:
    name = entry.metric if math.isnan(entry.rtol) else f"{entry.metric} at rtol {entry.rtol:g}"
    series = run.series[name].setdefault(entry.site, Series())
    if not series.steps or entry.step > series.steps[-1]:
        series.steps.append(entry.step)
        failed = entry.value < 0 and "rank" in entry.metric
        series.values.append(math.nan if failed else entry.value)


# The page


def render(runs: list[Tracked], shares: list[float], files: list[str]) -> str:
    """The page as text."""
    metrics = list(dict.fromkeys(metric for run in runs for metric in run.series))
    plots = {metric: _lines(metric, [run for run in runs if metric in run.series]) for metric in metrics}
    script, divs = components(plots) if plots else ("", {})
    figures = "".join(
        f'<figure class="card"><h2>{escape(metric)}</h2>{divs[metric]}</figure>' for metric in metrics
    )
    bokeh = Resources(mode="inline", components=["bokeh"]).render_js()
    names = dict.fromkeys(run.name for run in runs)
    models = dict.fromkeys(str(header.get("model", "")) for run in runs for header in run.headers.values())
    what = f"{', '.join(filter(None, models)) or 'A network'}: {len(names)} run{'s' * (len(names) > 1)}"
    findings = "".join(f"<li>{escape(sentence)}</li>" for run in runs for sentence in sentences(run))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=1180">
<title>Near-rank over training</title>
<link rel="icon" href="data:,">
<style>{asset("page.css").replace("__FONT__", FONT)}</style>
</head>
<body>
<main>
<header class="card">
<h1>Near-rank over training</h1>
<p class="lead">{escape(what)}, {len(runs[0].sites)} sites.</p>
{facts_html(facts(runs, shares))}
</header>
<section class="card"><h2>Results</h2><ul class="findings">{findings}</ul>
{"".join(_table(run) for run in runs)}
<p class="terms">{_TERMS}</p></section>
{figures}
<footer>Made by bsgap_kernels from {escape(", ".join(files))}; every number comes from there.</footer>
</main>
{bokeh}
{script}
</body>
</html>
"""


def facts(runs: list[Tracked], shares: list[float]) -> list[tuple[str, str]]:
    """Name and value of what the numbers depend on; what differs between sites lists its values."""
    headers = [header for run in runs for header in run.headers.values()]
    found = []
    for name, key in (
        *(("Unfolding", "unfold"), ("Thresholds rtol", "rtol"), ("atol", "atol"), ("Centred", "center")),
        *(("Certified", "certify"), ("Activations", "dtype"), ("torch", "torch")),
    ):
        values = dict.fromkeys(_words(header[key]) for header in headers if key in header)
        found.append((name, ", ".join(values) or "not recorded"))
    if shares:
        found.append(("Tracking, share of a step", f"{100 * median(shares):.2g} % (median)"))
    return found


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(f"{item:g}" if isinstance(item, float) else str(item) for item in value)
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def sentences(run: Tracked) -> list[str]:
    """What the run shows: first which counts cannot say anything, then what moved most."""
    where = f"{run.name}, {run.view}: "
    found = []
    counted = [metric for metric in run.series if metric.startswith("near_rank")]
    for metric in counted:
        sites = [site for site in run.series[metric] if site in run.headers]
        stuck = [site for site in sites if _always_saturated(run, metric, site)]
        if stuck:
            found.append(
                f"{where}{metric} is saturated at every step at {len(stuck)} of {len(sites)} sites "
                f"({', '.join(stuck[:3])}{', …' if stuck[3:] else ''}): it cannot show a change there."
            )
    changes = []
    for metric, of_metric in run.series.items():
        for site, series in of_metric.items():
            finite = [value for value in series.values if math.isfinite(value)]
            if len(finite) > 1 and finite[0] > 0 and ("rank" in metric or metric == "participation_ratio"):
                changes.append((finite[-1] / finite[0], metric, site, finite))
    for factor, metric, site, finite in sorted(changes, key=lambda c: -abs(math.log(max(c[0], 1e-9))))[:3]:
        verb = "fell" if factor < 1 else "rose"
        found.append(f"{where}{metric} of {site} {verb} from {finite[0]:.4g} to {finite[-1]:.4g}.")
    return found


def _always_saturated(run: Tracked, metric: str, site: str) -> bool:
    header = run.headers[site]
    shape = (int(header.get("m", 0)), int(header.get("n", 0)))
    return all(is_saturated(value, shape) for value in run.series[metric][site].values)


def _table(run: Tracked) -> str:
    """First and last value of every metric, a row a layer."""
    metrics = list(run.series)
    head = "".join(f"<th>{escape(metric)}</th>" for metric in metrics)
    rows = []
    for site in run.sites:
        header = run.headers.get(site, {})
        shape = f"{header['m']} × {header['n']}" if "m" in header and "n" in header else DASH
        cells = "".join(f"<td>{_ends(run.series[metric].get(site))}</td>" for metric in metrics)
        rows.append(f"<tr><td>{escape(site)}</td><td>{shape}</td>{cells}</tr>")
    return (
        f"<h3>{escape(run.name)}, {escape(run.view)}: first → last</h3>"
        '<div class="scroll"><table class="first-last"><thead>'
        f"<tr><th>layer</th><th>first shape</th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _ends(series: Series | None) -> str:
    if series is None:
        return DASH
    first, last = (DASH if math.isnan(x) else significant(x) for x in (series.values[0], series.values[-1]))
    return f"{first} → {last}"


def _lines(metric: str, runs: list[Tracked]) -> Any:
    """A panel a run, a line a site: dark the first layer, bright the last."""
    columns = 1 if len(runs) == 1 else 2
    panels = []
    for run in runs:
        of_metric = run.series[metric]
        places = {site: index for index, site in enumerate(run.sites)}
        lines: dict[str, list[Any]] = {"x": [], "y": [], "site": [], "color": []}
        for site, series in of_metric.items():
            steps, values = series.thinned()
            lines["x"].append(steps)
            lines["y"].append(values)
            lines["site"].append(site)
            place = places[site] / max(len(places) - 1, 1)
            lines["color"].append(RATIO_PALETTE[round(230 * place)])
        plot = base_figure(f"{run.name}, {run.view}", WIDTH // columns, _PANEL_HEIGHT, "step", metric)
        glyph = MultiLine(xs="x", ys="y", line_color="color", line_width=1.6)
        drawn = plot.add_glyph(ColumnDataSource(lines), glyph)
        plot.add_tools(hover([("layer", "@site"), ("step", "$data_x{0,0}"), (metric, "$data_y")], [drawn]))
        panels.append(plot)
    return side_by_side(panels, columns)
