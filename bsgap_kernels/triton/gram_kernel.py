"""The Gram kernel: lower-triangle tiles of many matrices of different shapes in one launch.

A program takes one work item of the device table (`table.py`): one tile of one matrix over one range of depth.
Entry (r, c) of a Gram matrix is formed by exactly one tile, r >= c, and written to (c, r) as well, so the
result is symmetric bit for bit. Depth ranges meet in two levels of float64 partial tiles that the last program
to arrive adds in a fixed order: no float atomics, the same bits every time.

Offsets are 64-bit. A block of depth never crosses what one row of the table calls `inner`, except in
layout ANY.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .config import CODE_CLASSES, CODE_LAYOUTS, CODES, REDUCE_FAN, SUM_SLOT, TILES
from .table import COLUMNS

_FIRST_ITEM = tl.constexpr(COLUMNS.index("first_item"))
_FIRST_MATRIX = tl.constexpr(COLUMNS.index("first_matrix"))
_COUNT = tl.constexpr(COLUMNS.index("count"))
_POINTER = tl.constexpr(COLUMNS.index("pointer"))
_STRIDE_BATCH = tl.constexpr(COLUMNS.index("stride_batch"))
_SIDE = tl.constexpr(COLUMNS.index("side"))
_OUTER = tl.constexpr(COLUMNS.index("outer"))
_INNER = tl.constexpr(COLUMNS.index("inner"))
_STRIDE_OUTER = tl.constexpr(COLUMNS.index("stride_outer"))
_STRIDE_INNER = tl.constexpr(COLUMNS.index("stride_inner"))
_STRIDE_SIDE = tl.constexpr(COLUMNS.index("stride_side"))
_SPLITS = tl.constexpr(COLUMNS.index("splits"))
_FIRST_GRAM = tl.constexpr(COLUMNS.index("first_gram"))
_FIRST_PARTIAL = tl.constexpr(COLUMNS.index("first_partial"))
_LAYOUT = tl.constexpr(COLUMNS.index("layout"))
_FIRST_RESULT = tl.constexpr(COLUMNS.index("first_result"))
_N = tl.constexpr(COLUMNS.index("n"))
_FIRST_VECTOR = tl.constexpr(COLUMNS.index("first_vector"))
_COLUMNS = tl.constexpr(len(COLUMNS))

_CLASSES = tl.constexpr(CODE_CLASSES)
_LAYOUTS = tl.constexpr(CODE_LAYOUTS)
_ONE = tl.constexpr(1)
_SMALLEST = tl.constexpr(TILES[0])
_CODES = tl.constexpr(CODES)
_FAN = tl.constexpr(REDUCE_FAN)
_SUM_SLOT = tl.constexpr(SUM_SLOT)
_SLICE = tl.constexpr(16)  # rows of a tile handled at once when splits meet
_SEARCH = tl.constexpr(128)  # rows of the table looked at in one step
_SIDE_ALIGNED = tl.constexpr(0)
_DEPTH_ALIGNED = tl.constexpr(1)
_DEPTH_CONTIGUOUS = tl.constexpr(2)
_ANY = tl.constexpr(3)

# Depth of a block and side of a tile where float32 sums are redone in float64: rare, so small and plain.
_REDO_DEPTH = tl.constexpr(16)
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
def read_view(entry, VECTOR: tl.constexpr, LAYOUT: tl.constexpr):
    """How a row's matrices lie in memory, with what the layout promises of 16-byte alignment."""
    side = tl.load(entry + _SIDE)
    outer = tl.load(entry + _OUTER)
    inner = tl.load(entry + _INNER)
    stride_outer = tl.load(entry + _STRIDE_OUTER)
    stride_inner = tl.load(entry + _STRIDE_INNER)
    stride_side = tl.load(entry + _STRIDE_SIDE)
    # The compiler believes arithmetic, not a hint on a loaded value.
    if LAYOUT == _SIDE_ALIGNED:
        side = side // VECTOR * VECTOR
        stride_outer = stride_outer // VECTOR * VECTOR
        stride_inner = stride_inner // VECTOR * VECTOR
    if LAYOUT == _DEPTH_ALIGNED:
        inner = inner // VECTOR * VECTOR
        stride_outer = stride_outer // VECTOR * VECTOR
        stride_side = stride_side // VECTOR * VECTOR
    return side, outer, inner, stride_outer, stride_inner, stride_side, tl.load(entry + _N)


@triton.jit
def start_of(view, block, LAYOUT: tl.constexpr, BLOCK_D: tl.constexpr):
    """Outer step of a block, and its index (layout ANY: its first depth) within that step."""
    side, outer, inner, stride_outer, stride_inner, stride_side, n = view
    if LAYOUT == _ANY:
        hop = block * BLOCK_D // inner
        return hop, block * BLOCK_D - hop * inner
    else:
        per_outer = (inner + BLOCK_D - 1) // BLOCK_D
        hop = block // per_outer
        return hop, block - hop * per_outer


@triton.jit
def next_start(view, hop, at, LAYOUT: tl.constexpr, BLOCK_D: tl.constexpr):
    """start_of the next block."""
    side, outer, inner, stride_outer, stride_inner, stride_side, n = view
    if LAYOUT == _ANY:
        more = (at + BLOCK_D) // inner
        return hop + more, at + BLOCK_D - more * inner
    else:
        end = (at + 1) * BLOCK_D >= inner
        return tl.where(end, hop + 1, hop), tl.where(end, 0, at + 1)


@triton.jit
def depth_offsets(view, hop, at, LAYOUT: tl.constexpr, BLOCK_D: tl.constexpr):
    """Element offsets of a block's depths, and which of them exist."""
    side, outer, inner, stride_outer, stride_inner, stride_side, n = view
    rel = tl.arange(0, BLOCK_D)
    if LAYOUT == _ANY:
        # Depths of this block may lie in many outer steps. Within a block 32-bit divisions are enough.
        width = tl.minimum(inner, 1 << 20).to(tl.int32)
        past = rel - tl.minimum(inner - at, 1 << 20).to(tl.int32)
        hops = hop + tl.where(past >= 0, past // width + 1, 0)
        within = tl.where(past >= 0, (past % width).to(tl.int64), at + rel)
        return hops * stride_outer + within * stride_inner, hops < outer
    else:
        depth = at * BLOCK_D + rel
        # A literal stride 1, so that 16 bytes become one load.
        if LAYOUT == _SIDE_ALIGNED:
            return hop * stride_outer + depth * stride_inner, depth < inner
        else:
            return hop * stride_outer + depth, depth < inner


@triton.jit
def load_block(base, view, offsets, valid, first, LAYOUT: tl.constexpr, TILE: tl.constexpr):
    """A (depth, side) block of elements; zeros outside the matrix."""
    side, outer, inner, stride_outer, stride_inner, stride_side, n = view
    column = first + tl.arange(0, TILE)
    if LAYOUT == _SIDE_ALIGNED:
        at = offsets[:, None] + column[None, :]
    else:
        at = (column * stride_side)[None, :] + offsets[:, None]
    return tl.load(base + at, mask=valid[:, None] & (column < side)[None, :], other=0.0)


@triton.jit
def load_wide(
    base,
    view,
    shift,
    scale,
    hop,
    at,
    first,
    LAYOUT: tl.constexpr,
    SHIFT: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):
    """The block in float64: scaled, then less the (scaled) shift of its features, if asked."""
    side, outer, inner, stride_outer, stride_inner, stride_side, n = view
    offsets, valid = depth_offsets(view, hop, at, LAYOUT, BLOCK_D)
    x = load_block(base, view, offsets, valid, first, LAYOUT, TILE).to(tl.float64)
    if SCALED:
        x = x * scale
    if SHIFT != 0:
        column = first + tl.arange(0, TILE)
        # A wide matrix has one level of depth, and the depth is the feature.
        depth = at + tl.arange(0, BLOCK_D) if LAYOUT == _ANY else at * BLOCK_D + tl.arange(0, BLOCK_D)
        along_side = column < tl.where(side == n, side, 0)
        along_depth = depth < tl.where(side == n, 0, inner)
        if SHIFT == 1:
            by_side = tl.load(shift + column, mask=along_side, other=0.0)
            by_depth = tl.load(shift + depth, mask=along_depth, other=0.0)
        else:
            by_side = tl.load(base + column * stride_side, mask=along_side, other=0.0).to(tl.float64)
            by_depth = tl.load(base + offsets, mask=along_depth, other=0.0).to(tl.float64)
        if SCALED:
            by_side = by_side * scale
            by_depth = by_depth * scale
        # One of the two is zero. Elements outside the matrix stay zero.
        inside = valid[:, None] & (column < side)[None, :]
        x = tl.where(inside, x - by_side[None, :] - by_depth[:, None], 0.0)
    return x


@triton.jit
def sum_float32(
    base,
    view,
    begin,
    end,
    row0,
    column0,
    LAYOUT: tl.constexpr,
    DIAGONAL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    DOT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Tile sums in float32, added up in float64 every CHUNK depths."""
    total = tl.zeros((TILE, TILE), tl.float64)
    part = tl.zeros((TILE, TILE), tl.float32)
    FLUSH: tl.constexpr = CHUNK // BLOCK_D
    hop, at = start_of(view, begin, LAYOUT, BLOCK_D)
    for block in range(begin, end):
        offsets, valid = depth_offsets(view, hop, at, LAYOUT, BLOCK_D)
        x = load_block(base, view, offsets, valid, row0, LAYOUT, TILE)
        if UPCAST:
            x = x.to(tl.float32)
        y = x
        if not DIAGONAL:
            y = load_block(base, view, offsets, valid, column0, LAYOUT, TILE)
            if UPCAST:
                y = y.to(tl.float32)
        part = tl.dot(tl.trans(x), y, part, input_precision=DOT)
        if (block - begin) % FLUSH == FLUSH - 1:
            total += part.to(tl.float64)
            part = tl.zeros((TILE, TILE), tl.float32)
        hop, at = next_start(view, hop, at, LAYOUT, BLOCK_D)
    return total + part.to(tl.float64)


@triton.jit
def sum_float64(
    base,
    view,
    shift,
    scale,
    begin,
    end,
    row0,
    column0,
    LAYOUT: tl.constexpr,
    DIAGONAL: tl.constexpr,
    SHIFT: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):
    """Tile sums in float64, one block's sum at a time, and the sums of the tile's columns."""
    total = tl.zeros((TILE, TILE), tl.float64)
    sums = tl.zeros((TILE,), tl.float64)
    hop, at = start_of(view, begin, LAYOUT, BLOCK_D)
    for _ in range(begin, end):
        x = load_wide(base, view, shift, scale, hop, at, row0, LAYOUT, SHIFT, SCALED, BLOCK_D, TILE)
        y = x
        if not DIAGONAL:
            y = load_wide(base, view, shift, scale, hop, at, column0, LAYOUT, SHIFT, SCALED, BLOCK_D, TILE)
        if DIAGONAL and SHIFT != 0:
            sums += tl.sum(x, axis=0)
        # Any value but 0 of max_num_imprecise_acc keeps the compiler from folding the addition into the
        # product, which would make one sequential sum of all depths.
        total += tl.dot(tl.trans(x), y, out_dtype=tl.float64, max_num_imprecise_acc=BLOCK_D)
        hop, at = next_start(view, hop, at, LAYOUT, BLOCK_D)
    return total, sums


@triton.jit
def redo(
    base, view, begin, end, row0, column0, LAYOUT: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr
):
    """sum_float64 over the depths of blocks [begin, end), by a plain walk that every layout allows."""
    side, outer, inner, stride_outer, stride_inner, stride_side, n = view
    hop, at = start_of(view, begin, LAYOUT, BLOCK_D)
    hop_end, at_end = start_of(view, end, LAYOUT, BLOCK_D)
    if LAYOUT != _ANY:
        at *= BLOCK_D
        at_end *= BLOCK_D
    first = hop * inner + at
    depths = tl.minimum(hop_end * inner + at_end, outer * inner) - first
    total = tl.zeros((TILE, TILE), tl.float64)
    for done in range(0, depths, _REDO_DEPTH):
        offsets, valid = depth_offsets(view, hop, at, _ANY, _REDO_DEPTH)
        valid = valid & (done + tl.arange(0, _REDO_DEPTH) < depths)
        x = load_block(base, view, offsets, valid, row0, _ANY, TILE).to(tl.float64)
        y = load_block(base, view, offsets, valid, column0, _ANY, TILE).to(tl.float64)
        total += tl.dot(tl.trans(x), y, out_dtype=tl.float64, max_num_imprecise_acc=_REDO_DEPTH)
        hop, at = next_start(view, hop, at, _ANY, _REDO_DEPTH)
    return total


@triton.jit
def tile_sums(
    base,
    view,
    shift,
    scale,
    begin,
    end,
    row0,
    column0,
    LAYOUT: tl.constexpr,
    DIAGONAL: tl.constexpr,
    SHIFT: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile's float64 sums over blocks [begin, end), and its columns' sums."""
    if PRECISION == 64:
        total, sums = sum_float64(
            base,
            view,
            shift,
            scale,
            begin,
            end,
            row0,
            column0,
            LAYOUT,
            DIAGONAL,
            SHIFT,
            SCALED,
            BLOCK_D,
            TILE,
        )
    else:
        sums = tl.zeros((TILE,), tl.float64)
        total = sum_float32(
            base, view, begin, end, row0, column0, LAYOUT, DIAGONAL, BLOCK_D, TILE, CHUNK, DOT, UPCAST
        )
    return total, sums


@triton.jit
def trace_of(total, TILE: tl.constexpr):
    """Sum of a tile's diagonal."""
    r = tl.arange(0, TILE)
    return tl.sum(tl.sum(tl.where(r[:, None] == r[None, :], total, 0.0), axis=1), axis=0)


@triton.jit
def out_of_range(trace, cells):
    """Whether float32 sums of this many squares may have over- or underflowed (or the input is not finite).

    Every sum in the tile is below its trace in magnitude (Cauchy-Schwarz), so a trace below 2^127 means no
    overflow. A product loses at most 2^-126 where subnormals are flushed: 2^-26 of the mean square.
    """
    return (trace < 1.7014118346046923e38) & (trace > cells.to(tl.float64) * 7.888609052210118e-31) == 0


@triton.jit
def store_partial(partials, total, sums, first, slot, TILE: tl.constexpr, SUMS: tl.constexpr):
    """Stores a partial tile where the last program to arrive will read it."""
    r = tl.arange(0, TILE)
    tl.store(partials + first + (r[:, None] * TILE + r[None, :]), total)
    if SUMS:
        tl.store(partials + first + slot - _SUM_SLOT + r, sums)
    # All threads' stores come before the one thread's release at the counter.
    tl.debug_barrier()


@triton.jit
def add_slice(partials, first, members, slot, row, TILE: tl.constexpr):
    """Sum of some rows of `members` partial tiles that stand `slot` elements apart, first to last.

    Read past the first-level cache, which does not see other processors' stores.
    """
    at = (row + tl.arange(0, _SLICE))[:, None] * TILE + tl.arange(0, TILE)[None, :]
    total = tl.load(partials + first + at, cache_modifier=".cg")
    for member in range(1, members):
        total += tl.load(partials + first + member * slot + at, cache_modifier=".cg")
    return total


@triton.jit
def add_sums(partials, first, members, slot, TILE: tl.constexpr):
    """The same for the column sums behind each tile."""
    at = slot - _SUM_SLOT + tl.arange(0, TILE)
    sums = tl.load(partials + first + at, cache_modifier=".cg")
    for member in range(1, members):
        sums += tl.load(partials + first + member * slot + at, cache_modifier=".cg")
    return sums


@triton.jit
def write_slice(gram, side, total, row, column, TILE: tl.constexpr):
    """Writes rows of a tile to both triangles; returns the sum of the diagonal entries among them."""
    r = (row + tl.arange(0, _SLICE))[:, None]
    c = (column + tl.arange(0, TILE))[None, :]
    inside = (r < side) & (c < side)
    tl.store(gram + r * side + c, total, mask=inside & (r >= c))
    tl.store(gram + c * side + r, total, mask=inside & (r > c))
    return tl.sum(tl.sum(tl.where(r == c, total, 0.0), axis=1), axis=0)


@triton.jit
def write_tile(gram, side, total, row0, column0, TILE: tl.constexpr):
    """Writes a tile's entries of the lower triangle, then mirrors them from there a few rows at a time."""
    corner = gram + row0 * side + column0
    row = tl.arange(0, TILE)[:, None]
    column = tl.arange(0, TILE)[None, :]
    inside = (row0 + row < side) & (column0 + column < side) & (row0 + row >= column0 + column)
    tl.store(corner + (row * side.to(tl.int32) + column), total, mask=inside)
    tl.debug_barrier()
    for start in range(0, TILE, _SLICE):
        r = (row0 + start + tl.arange(0, _SLICE))[:, None]
        c = (column0 + tl.arange(0, TILE))[None, :]
        below = (r < side) & (c < side) & (r > c)
        value = tl.load(gram + r * side + c, mask=below, other=0.0, cache_modifier=".cg")
        tl.store(gram + c * side + r, value, mask=below)


@triton.jit
def finish(
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
    SLOT: tl.constexpr,
    SUB: tl.constexpr,
    STATS: tl.constexpr,
    SUMS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Meets the other splits of the tile; the last to arrive writes the result.

    Works on a few rows of tiles at a time, so that it needs fewer registers than the products did.
    """
    grams_ptr, partials_ptr, counters_ptr, stats_ptr, stats_stride, sums_ptr = buffers
    side = tl.load(entry + _SIDE)
    gram = grams_ptr + tl.load(entry + _FIRST_GRAM) + matrix * side * side
    splits = tl.load(entry + _SPLITS).to(tl.int32)
    squares = tl.full((), 0.0, tl.float64)
    last = splits == 1
    if last:
        write_tile(gram, side, total, row0, column0, TILE)
        if STATS:
            squares = trace_of(total, TILE)
    else:
        groups = (splits + _FAN - 1) // _FAN
        first = tl.load(entry + _FIRST_PARTIAL) + (matrix * tiles + tile) * (splits + groups) * SLOT + SUB
        store_partial(partials_ptr, total, sums, first + split * SLOT, SLOT, TILE, SUMS)
        group = split // _FAN
        members = tl.minimum(splits - group * _FAN, _FAN)
        start = first + group * _FAN * SLOT
        # A counter for every 256 elements of partials: slots and their quarters are that far apart at least.
        own = first + (splits + group) * SLOT
        counter = counters_ptr + own // 256
        if tl.atomic_add(counter, 1, sem="acq_rel") == members - 1:
            tl.store(counter, 0)
            last = groups == 1
            if groups > 1:
                for row in range(0, TILE, _SLICE):
                    at = (row + tl.arange(0, _SLICE))[:, None] * TILE + tl.arange(0, TILE)[None, :]
                    tl.store(
                        partials_ptr + own + at, add_slice(partials_ptr, start, members, SLOT, row, TILE)
                    )
                if SUMS:
                    added = add_sums(partials_ptr, start, members, SLOT, TILE)
                    tl.store(partials_ptr + own + SLOT - _SUM_SLOT + tl.arange(0, TILE), added)
                tl.debug_barrier()
                counter = counters_ptr + first // 256
                if tl.atomic_add(counter, 1, sem="acq_rel") == groups - 1:
                    tl.store(counter, 0)
                    start = first + splits * SLOT
                    members = groups
                    last = groups > 1
            if last:
                for row in range(0, TILE, _SLICE):
                    added = add_slice(partials_ptr, start, members, SLOT, row, TILE)
                    squares += write_slice(gram, side, added, row0 + row, column0, TILE)
                if SUMS:
                    sums = add_sums(partials_ptr, start, members, SLOT, TILE)
    if last:
        if STATS:
            if row0 == column0:
                index = (tl.load(entry + _FIRST_MATRIX) + matrix) * stats_stride + row0 // TILE
                tl.store(stats_ptr + index, squares)
        if SUMS:
            n = tl.load(entry + _N)
            if (row0 == column0) & (n == side):
                column = column0 + tl.arange(0, TILE)
                vector = sums_ptr + tl.load(entry + _FIRST_VECTOR) + matrix * n
                tl.store(vector + column, sums, mask=column < side)


@triton.jit
def run_item(
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
):
    """One work item of a row: (matrix, split, tile), the tile fastest so that tiles share what they read."""
    view = read_view(entry, VECTOR, LAYOUT)
    side, outer, inner, stride_outer, stride_inner, stride_side, n = view
    splits = tl.load(entry + _SPLITS)
    per_side = (side + TILE - 1) // TILE
    tiles = per_side * (per_side + 1) // 2
    matrix = local // (tiles * splits)
    rest = local - matrix * (tiles * splits)
    split = rest // tiles
    tile = rest - split * tiles
    i = tl.zeros_like(tile)
    if MULTI:
        # Row of the triangle that holds the tile; float32's root is off by one at most.
        i = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int64)
        i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
        i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
    row0 = i * TILE
    column0 = (tile - i * (i + 1) // 2) * TILE

    address = tl.load(entry + _POINTER)
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
                        split.to(tl.int32),
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
            split.to(tl.int32),
            row0,
            column0,
            SLOT,
            0,
            STATS,
            SUMS,
            TILE,
        )


@triton.jit(do_not_specialize=["rows", "stats_stride"], do_not_specialize_on_alignment=["shift_ptr"])
def gram_kernel(
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
    STATS: tl.constexpr,
    SHIFT: tl.constexpr,
    SCALED: tl.constexpr,
    RESCUE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid: the work items of launch group GROUP. CODES: bit c is set if a row of the group has code c."""
    item = tl.program_id(0).to(tl.int64)
    entry = find_row(table_ptr, rows, item, GROUP)
    local = item - tl.load(entry + _FIRST_ITEM)
    code = tl.load(entry + _LAYOUT) % _CODES
    buffers = (grams_ptr, partials_ptr, counters_ptr, stats_ptr, stats_stride, sums_ptr)
    for size in tl.static_range(0, _CLASSES):
        for layout in tl.static_range(0, _LAYOUTS):
            if (_ONE << (size * _LAYOUTS + layout)) & CODES:
                if code == size * _LAYOUTS + layout:
                    TILE: tl.constexpr = _SMALLEST << size
                    run_item(
                        entry,
                        local,
                        buffers,
                        shift_ptr,
                        scale_ptr,
                        layout,
                        TILE,
                        MAX_DEPTH if ELEMENTS // TILE > MAX_DEPTH else ELEMENTS // TILE,
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
                    )
