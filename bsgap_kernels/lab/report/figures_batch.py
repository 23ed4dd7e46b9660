"""The report's figures against batch size: near-rank, accuracy and gap, time of the metric."""

from __future__ import annotations

from collections.abc import Callable

from bokeh.models import (
    ColumnDataSource,
    FixedTicker,
    Legend,
    LegendItem,
    Range1d,
    Span,
)
from bokeh.plotting import figure

from bsgap_kernels.lab.report.data import Results, Run, Site
from bsgap_kernels.lab.report.figures import Plot, interval_text, shape_text
from bsgap_kernels.lab.report.style import (
    FONT,
    GAP,
    INK,
    LAYER_COLORS,
    LAYER_MARKERS,
    MUTED,
    TEST,
    TRAIN,
    WIDTH,
    base_figure,
    hover,
    short,
    side_by_side,
)

_X_LABEL = "batch size (log scale)"


def mean(values: list[float]) -> float | None:
    """Mean, or None of nothing."""
    return sum(values) / len(values) if values else None


def sized(results: Results) -> list[tuple[int, str, list[Run]]]:
    """(batch size, its label, its runs), for the runs whose batch size is known."""
    groups = [(results.of(label)[0].batch_size, label, results.of(label)) for label in results.batch_labels]
    return [(size, label, runs) for size, label, runs in groups if size]


def _batch_figure(results: Results, title: str, width: int, height: int, y_label: str) -> figure:
    """Batch size on a log axis, ticked at the batch sizes of the sweep."""
    sizes = {size: label for size, label, _ in sized(results)}
    plot = base_figure(
        title,
        width,
        height,
        _X_LABEL,
        y_label,
        x_axis_type="log",
        x_range=Range1d(min(sizes) / 1.35, max(sizes) * 1.35),
    )
    plot.xaxis.ticker = FixedTicker(ticks=sorted(sizes))
    plot.xaxis.major_label_overrides = dict(sizes)
    return plot


def _add_legend(plot: figure, items: list[LegendItem]) -> None:
    legend = Legend(items=items, location="top_left", border_line_color=None, label_text_font=FONT)
    legend.label_text_font_size, legend.label_text_color = "12px", INK
    legend.spacing, legend.padding, legend.margin = 2, 2, 6
    legend.click_policy = "hide"
    plot.add_layout(legend, "right")


def near_rank_by_batch(results: Results) -> Plot | None:
    """Near-rank on the probe at the end, a line a layer: beside the Gaussian null, and as a share of it."""
    known = {
        (label, layer): [
            run.sites[layer] for run in runs if layer in run.sites and run.sites[layer].near_rank is not None
        ]
        for _, label, runs in sized(results)
        for layer in results.sites
    }
    layers = [
        layer for layer in results.sites if any(known.get((label, layer)) for _, label, _ in sized(results))
    ]
    if not layers:
        return None
    has_null = any(site.null_near_rank for sites in known.values() for site in sites)
    left_width = 470 if has_null else WIDTH
    count = _batch_figure(results, "Count", left_width, 350, "near-rank on the probe, at the end (count)")
    share = _batch_figure(
        results, "Baseline-corrected", WIDTH - left_width, 350, "near-rank ÷ near-rank of the Gaussian null"
    )
    items, tops = [], [1.0]
    for index, layer in enumerate(layers):
        style = {"color": LAYER_COLORS[index % 8], "marker": LAYER_MARKERS[(index + index // 8) % 8]}
        renderers = []
        nulls = [site.null_near_rank for sites in known.values() for site in sites if site.name == layer]
        for plot, measure in ((count, _near_rank), (share, _share_of_null)):
            source = _mean_source(results, known, layer, measure)
            dots = _seed_source(results, known, layer, measure)
            if not source.data["x"]:
                continue
            line = plot.line("x", "y", source=source, color=style["color"], line_width=2.2)
            marks = plot.scatter("x", "y", source=source, size=8, **style)
            renderers += [line, marks]
            if len(dots.data["x"]) > len(source.data["x"]):
                renderers.append(plot.scatter("x", "y", source=dots, size=5, alpha=0.45, **style))
            plot.add_tools(hover(_NEAR_RANK_TOOLTIPS, [marks]))
            tops += source.data["near_rank"] if plot is count else []
        null = next((value for value in nulls if value is not None), None)
        if null is not None:
            tops.append(null)
            span = Span(
                location=null,
                dimension="width",
                line_color=style["color"],
                line_dash="dashed",
                line_width=1.3,
            )
            span.line_alpha = 0.8
            count.add_layout(span)
        items.append(LegendItem(label=short(layer, 24), renderers=renderers))
    count.y_range = Range1d(0, 1.06 * max(tops))
    share.y_range = Range1d(0, 1.06 * max([1.0, *_all_y(share)]))
    share.add_layout(
        Span(location=1, dimension="width", line_color=MUTED, line_dash="dashed", line_width=1.3)
    )
    _add_legend(share if has_null else count, items)
    notes = [_seed_note(results)] if has_null else [_seed_note(results), "The files hold no Gaussian null."]
    return Plot(side_by_side([count, share] if has_null else [count], 2), notes)


_NEAR_RANK_TOOLTIPS = [
    ("layer", "@layer"),
    ("batch size", "@batch"),
    ("near-rank", "@near_rank{0,0.[0]} (ratio @ratio{0.000})"),
    ("certified interval", "@interval"),
    ("Gaussian null", "@null"),
    ("probe matrix", "@shape"),
    ("seeds", "@seeds"),
]


def _near_rank(site: Site) -> float | None:
    return site.near_rank


def _share_of_null(site: Site) -> float | None:
    return (
        site.near_rank / site.null_near_rank if site.near_rank is not None and site.null_near_rank else None
    )


def _all_y(plot: figure) -> list[float]:
    return [value for renderer in plot.renderers for value in renderer.data_source.data["y"]]


def _mean_source(
    results: Results,
    known: dict[tuple[str, str], list[Site]],
    layer: str,
    measure: Callable[[Site], float | None],
) -> ColumnDataSource:
    rows = []
    for size, label, runs in sized(results):
        sites = [site for site in known[label, layer] if measure(site) is not None]
        if not sites:
            continue
        lowers = [site.lower for site in sites if site.lower is not None]
        uppers = [site.upper for site in sites if site.upper is not None]
        ratio = mean([site.ratio for site in sites if site.ratio is not None])
        null = sites[0].null_near_rank
        interval = interval_text(*(lowers + uppers)) if len(sites) == len(lowers) == len(uppers) == 1 else ""
        if len(lowers) > 1 and uppers:
            interval = f"seeds span {interval_text(min(lowers), max(uppers))}"
        rows.append(
            {
                "x": size,
                "y": mean([value for site in sites if (value := measure(site)) is not None]),
                "near_rank": mean([site.near_rank for site in sites if site.near_rank is not None]),
                "ratio": float("nan") if ratio is None else ratio,
                "interval": interval or "not recorded",
                "null": "not recorded" if null is None else f"{null:.0f}",
                "shape": shape_text(sites[0].probe_shape),
                "batch": label,
                "layer": layer,
                "seeds": ", ".join(str(run.seed) for run in runs if layer in run.sites),
            }
        )
    keys = ("x", "y", "near_rank", "ratio", "interval", "null", "shape", "batch", "layer", "seeds")
    return ColumnDataSource({key: [row[key] for row in rows] for key in keys})


def _seed_source(
    results: Results,
    known: dict[tuple[str, str], list[Site]],
    layer: str,
    measure: Callable[[Site], float | None],
) -> ColumnDataSource:
    points = [
        (size, value)
        for size, label, _ in sized(results)
        for site in known[label, layer]
        if (value := measure(site)) is not None
    ]
    return ColumnDataSource({"x": [size for size, _ in points], "y": [value for _, value in points]})


def _seed_note(results: Results) -> str:
    if any(len(results.of(label)) > 1 for label in results.batch_labels):
        return "Lines join the means over seeds; every seed is a paler point."
    return "One seed per batch size, so no spread is shown."


def accuracy_by_batch(results: Results) -> Plot | None:
    """Train and test accuracy, and the gap between them, against batch size."""
    groups = sized(results)
    if not any(
        run.test_accuracy is not None or run.train_accuracy is not None
        for _, _, runs in groups
        for run in runs
    ):
        return None
    left = _batch_figure(results, "Accuracy on the whole sets, at the end", 590, 320, "accuracy (%)")
    right = _batch_figure(
        results, "Generalisation gap", WIDTH - 590, 320, "train − test accuracy (percentage points)"
    )
    items = []
    for plot, name, color, marker, attribute in (
        (left, "training set", TRAIN, "square", "train_accuracy"),
        (left, "test set", TEST, "circle", "test_accuracy"),
        (right, "gap", GAP, "diamond", "gap"),
    ):
        points = [
            (size, label, str(run.seed), 100 * number)
            for size, label, runs in groups
            for run in runs
            if (number := getattr(run, attribute)) is not None
        ]
        means = [(size, label, mean([p[3] for p in points if p[0] == size])) for size, label, _ in groups]
        means = [entry for entry in means if entry[2] is not None]
        line_data = {"x": [size for size, _, _ in means], "y": [number for _, _, number in means]}
        line_data |= {"batch": [label for _, label, _ in means], "name": [name] * len(means)}
        source = ColumnDataSource(
            line_data | {"seed": ["mean over seeds" if len(points) > len(means) else ""] * len(means)}
        )
        line = plot.line("x", "y", source=source, color=color, line_width=2.2)
        marks = plot.scatter("x", "y", source=source, color=color, marker=marker, size=9)
        renderers, hovered = [line, marks], [marks]
        if len(points) > len(means):
            seeds = ColumnDataSource(
                {
                    "x": [point[0] for point in points],
                    "y": [point[3] for point in points],
                    "batch": [point[1] for point in points],
                    "name": [name] * len(points),
                    "seed": [f"seed {point[2]}" for point in points],
                }
            )
            dots = plot.scatter("x", "y", source=seeds, color=color, marker=marker, size=6, alpha=0.45)
            renderers.append(dots)
            hovered.append(dots)
        plot.add_tools(hover([("batch size", "@batch"), ("@name", "@y{0.00} @seed")], hovered))
        if plot is left:
            items.append(LegendItem(label=name, renderers=renderers))
    _add_legend(left, items)
    right.add_layout(Span(location=0, dimension="width", line_color=MUTED, line_width=1))
    for plot in (left, right):
        plot.y_range.range_padding = 0.15
        plot.y_range.min_interval = 1.0
    return Plot(side_by_side([left, right], 2), [_seed_note(results)])
