"""Small multiples of many layers: panels with shared axes in one figure, so that 55 of them open fast.

A Bokeh figure costs the same time whether it holds one panel or thirty; here one holds thirty, on a
coordinate system of pixels from the top left, and a glyph draws its values in all of them at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bokeh.core.properties import value
from bokeh.models import ColumnDataSource, Quad, Range1d, Segment, Text
from bokeh.plotting import figure

from bsgap_kernels.lab.report.style import EMPTY, FONT, GRID, INK, MUTED, WIDTH, base_figure, plain, short

# Up to here every layer gets a figure of its own, with its counts on the axis.
MAX_SINGLE_PANELS = 9
COLUMNS, ROWS = 6, 5
_LEFT, _TITLE, _GAP, _BOTTOM = 52, 17, 12, 30
_CELL_WIDTH = (WIDTH - _LEFT) // COLUMNS
_CELL_HEIGHT = 112


@dataclass(frozen=True)
class Cell:
    """The inside of one panel in the figure's pixels."""

    left: float
    bottom: float
    width: float = _CELL_WIDTH - _GAP
    height: float = _CELL_HEIGHT - _TITLE - _GAP

    def x(self, share: float) -> float:
        """Place of `share` of the panel's width."""
        return self.left + share * self.width

    def y(self, share: float) -> float:
        """Place of `share` of the panel's height, counted from its bottom."""
        return self.bottom - share * self.height


@dataclass
class Grid:
    """The panels of up to 30 layers: what they are drawn in, and where; `ticks` by unit of the x-axis."""

    plot: figure
    height: int
    cells: dict[str, Cell]
    ticks: dict[str, list[str]]


def chunks(layers: Sequence[str]) -> list[list[str]]:
    """Layers in order, as many as a grid holds at a time; a printed page holds one grid."""
    size = COLUMNS * ROWS
    return [list(layers[start : start + size]) for start in range(0, len(layers), size)]


def make_grid(
    titles: dict[str, str],
    y_label: str,
    x_labels: dict[str, str],
    x_ticks: Mapping[str, Sequence[tuple[float, str]]],
    y_ticks: Sequence[tuple[float, str]],
    shown: str,
    nulls: Mapping[str, float | None],
) -> Grid:
    """Empty panels, one a layer, with shared axes.

    Args:
        titles: a title per layer.
        y_label: of every panel.
        x_labels: of the x-axis per unit it can have.
        x_ticks: (share of the width, text) per unit.
        y_ticks: (share of the height, text).
        shown: the unit shown first.
        nulls: share of the height of a dashed line per layer, None for no line.
    """
    layers = list(titles)
    rows = math.ceil(len(layers) / COLUMNS)
    height = rows * _CELL_HEIGHT + _BOTTOM
    ranges = {"x_range": Range1d(0, WIDTH), "y_range": Range1d(height, 0)}
    plot = base_figure("", WIDTH, height, "", "", **ranges)
    plot.axis.visible = plot.grid.visible = False
    plot.title.visible = False
    plot.min_border = plot.min_border_left = plot.min_border_right = 0
    cells = {
        layer: Cell(_LEFT + place % COLUMNS * _CELL_WIDTH, (place // COLUMNS + 1) * _CELL_HEIGHT - _GAP)
        for place, layer in enumerate(layers)
    }
    _frames(plot, list(cells.values()), [share for share, _ in y_ticks])
    for layer, cell in cells.items():
        share = nulls.get(layer)
        if share is not None:
            ends = ColumnDataSource(
                {"x0": [cell.x(0)], "x1": [cell.x(1)], "y0": [cell.y(share)], "y1": [cell.y(share)]}
            )
            style = {"line_color": MUTED, "line_dash": "dashed", "line_width": 1.1}
            plot.add_glyph(ends, Segment(x0="x0", x1="x1", y0="y0", y1="y1", **style))
    titles_at = [(cell.x(0), cell.y(1) - 4, titles[layer]) for layer, cell in cells.items()]
    _texts(plot, titles_at, color=INK, baseline="bottom")
    firsts = [cells[layer] for layer in layers[::COLUMNS]]
    _texts(plot, [(c.x(0) - 5, c.y(s), t) for c in firsts for s, t in y_ticks], align="right")
    _texts(plot, [(11, height / 2, y_label)], align="center", angle=math.pi / 2, size="12px")
    lowest = [cells[layer] for layer in layers[-COLUMNS:]]
    ticks: dict[str, list[str]] = {}
    for unit, marks in x_ticks.items():
        middle = [(_LEFT + (WIDTH - _LEFT) / 2, height - 3, x_labels[unit])]
        ticks[unit] = [
            _texts(plot, middle, align="center", baseline="bottom", size="12px", visible=unit == shown)
        ]
        # Numbers at the ends of a panel stay inside it, away from the neighbour's.
        for align, inside in (("left", (-1, 0.04)), ("center", (0.04, 0.96)), ("right", (0.96, 2))):
            below = [
                (c.x(s), c.bottom + 4, t) for c in lowest for s, t in marks if inside[0] < s <= inside[1]
            ]
            if below:
                ticks[unit].append(_texts(plot, below, align=align, baseline="top", visible=unit == shown))
    return Grid(plot, height, cells, ticks)


def _frames(plot: figure, cells: Sequence[Cell], lines: Sequence[float]) -> None:
    corners = ColumnDataSource(
        {
            "left": [cell.x(0) for cell in cells],
            "right": [cell.x(1) for cell in cells],
            "bottom": [cell.y(0) for cell in cells],
            "top": [cell.y(1) for cell in cells],
        }
    )
    quad = Quad(
        left="left", right="right", top="top", bottom="bottom", fill_color="#fcfdfd", line_color=EMPTY
    )
    plot.add_glyph(corners, quad)
    rules = [(cell.x(0), cell.x(1), cell.y(share)) for cell in cells for share in lines]
    ends = ColumnDataSource(
        {"x0": [r[0] for r in rules], "x1": [r[1] for r in rules], "y": [r[2] for r in rules]}
    )
    plot.add_glyph(ends, Segment(x0="x0", x1="x1", y0="y", y1="y", line_color=GRID))


def _texts(
    plot: figure,
    entries: Sequence[tuple[float, float, str]],
    *,
    align: str = "left",
    baseline: str = "middle",
    color: str = MUTED,
    size: str = "11px",
    angle: float = 0.0,
    visible: bool = True,
) -> str:
    """Texts at (x, y); the id of what draws them."""
    columns = {name: [entry[place] for entry in entries] for place, name in enumerate(("x", "y"))}
    source = ColumnDataSource(columns | {"text": [plain(entry[2]) for entry in entries]})
    glyph = Text(x="x", y="y", text="text", text_font=value(FONT), text_font_size=size, text_color=color)
    glyph.text_align, glyph.text_baseline, glyph.angle = align, baseline, angle
    renderer = plot.add_glyph(source, glyph)
    renderer.visible = visible
    return str(renderer.id)


def panel_title(layer: str, smaller: int | None) -> str:
    """A layer's name and what its ratio divides by, as short as a panel is narrow."""
    return f"{short(layer, 20)} · {smaller}" if smaller else short(layer, 24)
