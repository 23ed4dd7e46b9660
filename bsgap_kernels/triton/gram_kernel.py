"""The Gram kernel: lower-triangle tiles of many matrices of different shapes in one launch.

A program takes one work item of the device table (`table.py`): one tile of a matrix over one range of depth.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._core import FLOAT32_LARGEST_TRACE, FLOAT32_SMALLEST_SQUARE
from .config import (
    ANY,
    BY_VECTOR,
    CODE_CLASSES,
    CODE_LAYOUTS,
    CODES,
    DEPTH_ALIGNED,
    ELEMENTWISE,
    SIDE_ALIGNED,
    SUM_SLOT,
    TILES,
)
from .gram_blocks import read_view, redo, tile_sums
from .gram_reduce import add_formed, finish, trace_of
from .table import COLUMNS

_FIRST_ITEM = tl.constexpr(COLUMNS.index("first_item"))
_FIRST_MATRIX = tl.constexpr(COLUMNS.index("first_matrix"))
_OFFSET = tl.constexpr(COLUMNS.index("offset"))
_STRIDE_BATCH = tl.constexpr(COLUMNS.index("stride_batch"))
_SPLITS = tl.constexpr(COLUMNS.index("splits"))
_LAYOUT = tl.constexpr(COLUMNS.index("layout"))
_FIRST_RESULT = tl.constexpr(COLUMNS.index("first_result"))
_FIRST_VECTOR = tl.constexpr(COLUMNS.index("first_vector"))
_COLUMNS = tl.constexpr(len(COLUMNS))
_CLASSES = tl.constexpr(CODE_CLASSES)
_LAYOUTS = tl.constexpr(CODE_LAYOUTS)
_ONE = tl.constexpr(1)
_SMALLEST = tl.constexpr(TILES[0])
_CODES = tl.constexpr(CODES)
_SUM_SLOT = tl.constexpr(SUM_SLOT)
_SEARCH = tl.constexpr(128)  # rows of the table looked at in one step
_SIDE_ALIGNED = tl.constexpr(SIDE_ALIGNED)
_DEPTH_ALIGNED = tl.constexpr(DEPTH_ALIGNED)
_ANY = tl.constexpr(ANY)
_BY_VECTOR = tl.constexpr(BY_VECTOR)
_ELEMENTWISE = tl.constexpr(ELEMENTWISE)
_REDO_SIDE = tl.constexpr(64)
_LARGEST_TRACE = tl.constexpr(FLOAT32_LARGEST_TRACE)
_SMALLEST_SQUARE = tl.constexpr(FLOAT32_SMALLEST_SQUARE)


@triton.jit
def find_row(table_ptr, rows, item, GROUP: tl.constexpr):
    """Address of the last row of launch group GROUP that starts at or before the item."""
    found = tl.full((), -1, tl.int32)
    for start in range(0, rows, _SEARCH):
        row = start + tl.arange(0, _SEARCH)
        inside = row < rows
        first = tl.load(table_ptr + row * _COLUMNS + _FIRST_ITEM, mask=inside, other=0)
        code = tl.load(table_ptr + row * _COLUMNS + _LAYOUT, mask=inside, other=-1)
        here = inside & (code // _CODES == GROUP) & (first <= item)
        found = tl.maximum(found, tl.max(tl.where(here, row, -1), axis=0))
    return table_ptr + found.to(tl.int64) * _COLUMNS


@triton.jit
def out_of_range(trace, cells):
    """Whether float32 sums of this many squares may have over- or underflowed (or the input is not finite).

    csrc/core/certified_gram.h derives both limits.
    """
    return (trace < _LARGEST_TRACE) & (trace > cells.to(tl.float64) * _SMALLEST_SQUARE) == 0


@triton.jit
def place_of(entry, local, view, C: tl.constexpr, TILE: tl.constexpr):
    """(matrix, tile, tiles, split, row0, column0): the tile fastest so that tiles share what they read.

    A grid has less than 2^31 items: 32 bits hold the parts of one. What is multiplied with strides is wide.
    """
    splits = tl.load(entry + _SPLITS).to(tl.int32)
    per_side = ((view[0] + TILE - 1) // TILE).to(tl.int32)
    tiles = per_side * (per_side + 1) // 2
    matrix = local // (tiles * splits)
    rest = local - matrix * (tiles * splits)
    split = rest // tiles
    tile = rest - split * tiles
    i = tl.zeros_like(tile)
    if C.multi and TILE >= 64:
        # Row of the triangle that holds the tile; float32's root is off by one at most.
        i = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
        i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
        i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
    return matrix, tile, tiles, split, i * TILE, (tile - i * (i + 1) // 2) * TILE


@triton.jit
def base_of(origin, entry, matrix, C: tl.constexpr, LAYOUT: tl.constexpr):
    """Pointer to a matrix's first element."""
    VECTOR: tl.constexpr = 128 // C.dtype.primitive_bitwidth
    address = origin + tl.load(entry + _OFFSET)
    stride_batch = tl.load(entry + _STRIDE_BATCH)
    if LAYOUT == _SIDE_ALIGNED or LAYOUT == _DEPTH_ALIGNED:
        address = address // 16 * 16
        stride_batch = stride_batch // VECTOR * VECTOR
    base = address.to(tl.pointer_type(C.dtype)) + matrix * stride_batch
    if LAYOUT == _SIDE_ALIGNED or LAYOUT == _DEPTH_ALIGNED:
        base = tl.multiple_of(base, 16)
    return base


@triton.jit
def rescue_item(
    entry,
    out,
    base,
    view,
    begin,
    end,
    place,
    C: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):
    """Redoes an item in float64 if the matrix's squares, which an earlier launch has left, ask for it."""
    grams_ptr, sums_ptr, totals_ptr, work_ptr, counters_ptr, stats_stride, fresh = out
    matrix, tile, tiles, split, row0, column0 = place
    side, outer, inner, stride_outer, stride_inner, stride_side, n = view
    stats = work_ptr + (tl.load(entry + _FIRST_MATRIX) + matrix) * stats_stride
    squares = 0.0 * tl.load(stats)
    for k in range(((side + TILE - 1) // TILE).to(tl.int32)):
        squares += tl.load(stats + k)
    if out_of_range(squares, side * outer * inner):
        SUBS: tl.constexpr = TILE // _REDO_SIDE
        for sub in range(SUBS * SUBS):
            row = row0 + (sub // SUBS) * _REDO_SIDE
            column = column0 + (sub - (sub // SUBS) * SUBS) * _REDO_SIDE
            if (row >= column) & (row < side):
                total = redo(base, view, begin, end, row, column, LAYOUT, BLOCK_D, _REDO_SIDE, C.hops)
                sums = tl.zeros((_REDO_SIDE,), tl.float64)
                part = (matrix, tile, tiles, split, row, column)
                at = sub * _REDO_SIDE * _REDO_SIDE
                finish(entry, out, total, sums, part, at, C, _REDO_SIDE, TILE * TILE)
    elif C.accumulate:
        if split == 0:
            add_formed(entry, out, row0, column0, C, TILE)


@triton.jit
def run_item(
    origin, entry, local, shift_ptr, scale_ptr, out, C: tl.constexpr, LAYOUT: tl.constexpr, TILE: tl.constexpr
):
    """One work item of a row."""
    DEPTH: tl.constexpr = C.max_depth if C.elements // TILE > C.max_depth else C.elements // TILE
    BLOCK_D: tl.constexpr = DEPTH // C.elementwise if LAYOUT >= _ELEMENTWISE else DEPTH
    view = read_view(entry, 128 // C.dtype.primitive_bitwidth, LAYOUT)
    side, outer, inner, stride_outer, stride_inner, stride_side, n = view
    place = place_of(entry, local, view, C, TILE)
    matrix, tile, tiles, split, row0, column0 = place
    base = base_of(origin, entry, matrix, C, LAYOUT)
    scale = 1.0
    if C.scaled:
        scale = tl.load(scale_ptr + tl.load(entry + _FIRST_RESULT) + matrix)
    shift = shift_ptr
    if C.shift == _BY_VECTOR:
        shift = shift_ptr + tl.load(entry + _FIRST_VECTOR) + matrix * n
    if LAYOUT == _ANY:
        blocks = (outer * inner + BLOCK_D - 1) // BLOCK_D
    elif C.hops > 1:
        blocks = (outer + C.hops - 1) // C.hops
    else:
        blocks = outer * ((inner + BLOCK_D - 1) // BLOCK_D)
    splits = tl.load(entry + _SPLITS).to(tl.int32)
    begin = split * blocks // splits
    end = (split + 1) * blocks // splits
    if C.rescue:
        rescue_item(entry, out, base, view, begin, end, place, C, LAYOUT, BLOCK_D, TILE)
    else:
        sums = tl.zeros((TILE,), tl.float64)
        if C.multi and TILE >= 64:
            if row0 == column0:
                total, sums = tile_sums(
                    base, view, shift, scale, begin, end, row0, column0, C, LAYOUT, BLOCK_D, TILE, True
                )
            else:
                total, sums = tile_sums(
                    base, view, shift, scale, begin, end, row0, column0, C, LAYOUT, BLOCK_D, TILE, False
                )
        else:
            total, sums = tile_sums(
                base, view, shift, scale, begin, end, row0, column0, C, LAYOUT, BLOCK_D, TILE, True
            )
        if C.precision == 32 and not C.stats:
            # One tile: the program sees all of its range's squares and can redo its own depths at once.
            if out_of_range(trace_of(total, TILE), side * BLOCK_D * (end - begin)):
                total = redo(base, view, begin, end, row0, column0, LAYOUT, BLOCK_D, TILE, C.hops)
        SLOT: tl.constexpr = TILE * TILE + (_SUM_SLOT if C.sums else 0)
        finish(entry, out, total, sums, place, 0, C, TILE, SLOT)


@triton.jit(
    do_not_specialize=["origin", "rows", "stats_stride", "fresh"],
    do_not_specialize_on_alignment=["grams_ptr", "sums_ptr", "totals_ptr", "shift_ptr", "scale_ptr"],
)
def gram_kernel(
    origin,
    table_ptr,
    rows,
    grams_ptr,
    sums_ptr,
    totals_ptr,
    shift_ptr,
    scale_ptr,
    work_ptr,
    counters_ptr,
    stats_stride,
    fresh,
    C: tl.constexpr,
):
    """Grid: the work items of launch group C.group (C: config.Constants).

    origin: the address that the table's offsets are relative to. work: what splits and tiles leave for each
    other. fresh: what was in the sums is forgotten, not added to.
    """
    item = tl.program_id(0).to(tl.int64)
    entry = find_row(table_ptr, rows, item, C.group)
    local = (item - tl.load(entry + _FIRST_ITEM)).to(tl.int32)
    code = tl.load(entry + _LAYOUT) % _CODES
    out = (grams_ptr, sums_ptr, totals_ptr, work_ptr, counters_ptr, stats_stride, fresh)
    for size in tl.static_range(0, _CLASSES):
        for layout in tl.static_range(0, _LAYOUTS):
            if (_ONE << (size * _LAYOUTS + layout)) & C.codes:
                if code == size * _LAYOUTS + layout:
                    run_item(origin, entry, local, shift_ptr, scale_ptr, out, C, layout, _SMALLEST << size)
