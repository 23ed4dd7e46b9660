"""The Gram kernel: lower-triangle tiles of many matrices of different shapes in one launch.

A program takes one work item of the device table (`table.py`): one tile of a matrix over one range of depth.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .config import ANY, CODE_CLASSES, CODE_LAYOUTS, CODES, DEPTH_ALIGNED, SIDE_ALIGNED, SUM_SLOT, TILES
from .config import ELEMENTWISE as ELEMENTWISE_LAYOUTS
from .gram_blocks import read_view, redo, tile_sums
from .gram_reduce import finish, trace_of
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
_ELEMENTWISE = tl.constexpr(ELEMENTWISE_LAYOUTS)
_REDO_SIDE = tl.constexpr(64)


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

    Every sum in the tile is below its trace in magnitude (Cauchy-Schwarz), so a trace below 2^127 means no
    overflow. A product loses at most 2^-126 where subnormals are flushed: 2^-26 of the mean square.
    """
    return (trace < 1.7014118346046923e38) & (trace > cells.to(tl.float64) * 7.888609052210118e-31) == 0


@triton.jit
def run_item(
    origin,
    entry,
    local,
    buffers,
    shift_ptr,
    scale_ptr,
    LAYOUT: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT: tl.constexpr,
    CHUNK: tl.constexpr,
    MULTI: tl.constexpr,
    STATS: tl.constexpr,
    SHIFT: tl.constexpr,
    SCALED: tl.constexpr,
    RESCUE: tl.constexpr,
    UPCAST: tl.constexpr,
    WARPGROUP: tl.constexpr,
    SLICES: tl.constexpr,
):
    """One work item of a row: (matrix, split, tile), the tile fastest so that tiles share what they read."""
    view = read_view(entry, VECTOR, LAYOUT)
    side, outer, inner, stride_outer, stride_inner, stride_side, n = view
    # A grid has less than 2^31 items: 32 bits hold the parts of one. What is multiplied with strides is wide.
    splits = tl.load(entry + _SPLITS).to(tl.int32)
    per_side = ((side + TILE - 1) // TILE).to(tl.int32)
    tiles = per_side * (per_side + 1) // 2
    matrix = local // (tiles * splits)
    rest = local - matrix * (tiles * splits)
    split = rest // tiles
    tile = rest - split * tiles
    i = tl.zeros_like(tile)
    if MULTI:
        # Row of the triangle that holds the tile; float32's root is off by one at most.
        i = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
        i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
        i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
    row0 = i * TILE
    column0 = (tile - i * (i + 1) // 2) * TILE

    address = origin + tl.load(entry + _OFFSET)
    stride_batch = tl.load(entry + _STRIDE_BATCH)
    if LAYOUT == _SIDE_ALIGNED or LAYOUT == _DEPTH_ALIGNED:
        address = address // 16 * 16
        stride_batch = stride_batch // VECTOR * VECTOR
    base = address.to(tl.pointer_type(DTYPE)) + matrix * stride_batch
    if LAYOUT == _SIDE_ALIGNED or LAYOUT == _DEPTH_ALIGNED:
        base = tl.multiple_of(base, 16)
    scale = 1.0
    if SCALED:
        scale = tl.load(scale_ptr + tl.load(entry + _FIRST_RESULT) + matrix)
    shift = shift_ptr
    if SHIFT == 1:
        shift = shift_ptr + tl.load(entry + _FIRST_VECTOR) + matrix * n
    if LAYOUT == _ANY:
        blocks = (outer * inner + BLOCK_D - 1) // BLOCK_D
    else:
        blocks = outer * ((inner + BLOCK_D - 1) // BLOCK_D)
    begin = split * blocks // splits
    end = (split + 1) * blocks // splits
    SUMS: tl.constexpr = SHIFT != 0
    SLOT: tl.constexpr = TILE * TILE + (_SUM_SLOT if SUMS else 0)
    sums = tl.zeros((TILE,), tl.float64)
    if RESCUE:
        grams_ptr, partials_ptr, counters_ptr, stats_ptr, stats_stride, sums_ptr = buffers
        stat = tl.load(entry + _FIRST_MATRIX) + matrix
        squares = 0.0 * tl.load(stats_ptr + stat * stats_stride)
        for k in range(per_side):
            squares += tl.load(stats_ptr + stat * stats_stride + k)
        if out_of_range(squares, side * outer * inner):
            SUBS: tl.constexpr = TILE // _REDO_SIDE
            for sub in range(SUBS * SUBS):
                sub_row = row0 + (sub // SUBS) * _REDO_SIDE
                sub_column = column0 + (sub - (sub // SUBS) * SUBS) * _REDO_SIDE
                if (sub_row >= sub_column) & (sub_row < side):
                    total = redo(base, view, begin, end, sub_row, sub_column, LAYOUT, BLOCK_D, _REDO_SIDE)
                    finish(
                        entry,
                        buffers,
                        total,
                        tl.zeros((_REDO_SIDE,), tl.float64),
                        matrix,
                        tile,
                        tiles,
                        split,
                        sub_row,
                        sub_column,
                        SLOT,
                        sub * _REDO_SIDE * _REDO_SIDE,
                        False,
                        False,
                        _REDO_SIDE,
                    )
    else:
        if MULTI:
            if row0 == column0:
                total, sums = tile_sums(
                    base,
                    view,
                    shift,
                    scale,
                    begin,
                    end,
                    row0,
                    column0,
                    LAYOUT,
                    True,
                    SHIFT,
                    SCALED,
                    PRECISION,
                    DOT,
                    CHUNK,
                    BLOCK_D,
                    TILE,
                    UPCAST,
                    WARPGROUP and TILE >= 64,
                    1,
                )
            else:
                total, sums = tile_sums(
                    base,
                    view,
                    shift,
                    scale,
                    begin,
                    end,
                    row0,
                    column0,
                    LAYOUT,
                    False,
                    SHIFT,
                    SCALED,
                    PRECISION,
                    DOT,
                    CHUNK,
                    BLOCK_D,
                    TILE,
                    UPCAST,
                    WARPGROUP and TILE >= 64,
                    1,
                )
        else:
            total, sums = tile_sums(
                base,
                view,
                shift,
                scale,
                begin,
                end,
                row0,
                column0,
                LAYOUT,
                True,
                SHIFT,
                SCALED,
                PRECISION,
                DOT,
                CHUNK,
                BLOCK_D,
                TILE,
                UPCAST,
                WARPGROUP and TILE >= 64,
                SLICES if TILE == _SMALLEST else 1,
            )
        if PRECISION == 32 and not STATS:
            # One tile: the program sees all of its range's squares and can redo its own depths at once.
            if out_of_range(trace_of(total, TILE), side * BLOCK_D * (end - begin)):
                total = redo(base, view, begin, end, row0, column0, LAYOUT, BLOCK_D, TILE)
        finish(
            entry,
            buffers,
            total,
            sums,
            matrix,
            tile,
            tiles,
            split,
            row0,
            column0,
            SLOT,
            0,
            STATS,
            SUMS,
            TILE,
        )


@triton.jit(
    do_not_specialize=["origin", "rows", "stats_stride"], do_not_specialize_on_alignment=["shift_ptr"]
)
def gram_kernel(
    origin,
    table_ptr,
    grams_ptr,
    partials_ptr,
    counters_ptr,
    stats_ptr,
    shift_ptr,
    sums_ptr,
    scale_ptr,
    rows,
    stats_stride,
    GROUP: tl.constexpr,
    CODES: tl.constexpr,
    MULTI: tl.constexpr,
    DTYPE: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT: tl.constexpr,
    CHUNK: tl.constexpr,
    ELEMENTS: tl.constexpr,
    MAX_DEPTH: tl.constexpr,
    ELEMENTWISE: tl.constexpr,
    STATS: tl.constexpr,
    SHIFT: tl.constexpr,
    SCALED: tl.constexpr,
    RESCUE: tl.constexpr,
    UPCAST: tl.constexpr,
    WARPGROUP: tl.constexpr,
    SLICES: tl.constexpr,
):
    """Grid: the work items of launch group GROUP. CODES: bit c is set if a row of the group has code c.

    origin: the address that the table's offsets are relative to. WARPGROUP: products of 64 and more rows are
    those of a warp group, straight from shared memory. SLICES: of the depths of a block of narrow matrices.
    """
    item = tl.program_id(0).to(tl.int64)
    entry = find_row(table_ptr, rows, item, GROUP)
    local = (item - tl.load(entry + _FIRST_ITEM)).to(tl.int32)
    code = tl.load(entry + _LAYOUT) % _CODES
    buffers = (grams_ptr, partials_ptr, counters_ptr, stats_ptr, stats_stride, sums_ptr)
    for size in tl.static_range(0, _CLASSES):
        for layout in tl.static_range(0, _LAYOUTS):
            if (_ONE << (size * _LAYOUTS + layout)) & CODES:
                if code == size * _LAYOUTS + layout:
                    TILE: tl.constexpr = _SMALLEST << size
                    DEPTH: tl.constexpr = MAX_DEPTH if ELEMENTS // TILE > MAX_DEPTH else ELEMENTS // TILE
                    run_item(
                        origin,
                        entry,
                        local,
                        buffers,
                        shift_ptr,
                        scale_ptr,
                        layout,
                        TILE,
                        DEPTH // ELEMENTWISE if layout >= _ELEMENTWISE else DEPTH,
                        DTYPE,
                        VECTOR,
                        PRECISION,
                        DOT,
                        CHUNK,
                        MULTI and TILE >= 64,
                        STATS,
                        SHIFT,
                        SCALED,
                        RESCUE,
                        UPCAST,
                        WARPGROUP,
                        SLICES,
                    )
