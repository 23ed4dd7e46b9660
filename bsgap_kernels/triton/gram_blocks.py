"""Device functions of the Gram kernel: blocks of depth, how they are read and summed.

Offsets are 64-bit. Except in layout ANY, a block of depth never crosses a step of `outer`. Where that would
leave half of it empty, it holds HOPS whole steps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..rounding import SMALLEST_SUBNORMAL
from .config import ANY, BY_MEAN, BY_VECTOR, DEPTH_ALIGNED, NO_SHIFT, SIDE_ALIGNED, TILES
from .table import COLUMNS

_SIDE = tl.constexpr(COLUMNS.index("side"))
_OUTER = tl.constexpr(COLUMNS.index("outer"))
_INNER = tl.constexpr(COLUMNS.index("inner"))
_STRIDE_OUTER = tl.constexpr(COLUMNS.index("stride_outer"))
_STRIDE_INNER = tl.constexpr(COLUMNS.index("stride_inner"))
_STRIDE_SIDE = tl.constexpr(COLUMNS.index("stride_side"))
_N = tl.constexpr(COLUMNS.index("n"))
_SIDE_ALIGNED = tl.constexpr(SIDE_ALIGNED)
_DEPTH_ALIGNED = tl.constexpr(DEPTH_ALIGNED)
_ANY = tl.constexpr(ANY)
_NO_SHIFT = tl.constexpr(NO_SHIFT)
_BY_VECTOR = tl.constexpr(BY_VECTOR)
_BY_MEAN = tl.constexpr(BY_MEAN)
_TINY = tl.constexpr(SMALLEST_SUBNORMAL)
_SMALLEST = tl.constexpr(TILES[0])
_REDO_DEPTH = tl.constexpr(16)
# Triton 3.6 to 3.8 fail to compile float64 products for tensor cores where they see that operands are 16-bit
# in memory; 3.9 does not. The interpreter knows no assembly, and has no such fault.
_HIDE_16_BITS = tl.constexpr(
    [int(x) for x in triton.__version__.split(".")[:2]] < [3, 9] and not triton.knobs.runtime.interpret
)


@triton.jit
def aligned(
    side, outer, inner, stride_outer, stride_inner, stride_side, VECTOR: tl.constexpr, LAYOUT: tl.constexpr
):
    """The same, with what the layout promises: the compiler believes arithmetic, no hint on a load."""
    if LAYOUT == _SIDE_ALIGNED:
        side = side // VECTOR * VECTOR
        stride_outer = stride_outer // VECTOR * VECTOR
        stride_inner = stride_inner // VECTOR * VECTOR
    if LAYOUT == _DEPTH_ALIGNED:
        inner = inner // VECTOR * VECTOR
        stride_outer = stride_outer // VECTOR * VECTOR
        stride_side = stride_side // VECTOR * VECTOR
    return side, outer, inner, stride_outer, stride_inner, stride_side


@triton.jit
def read_view(entry, VECTOR: tl.constexpr, LAYOUT: tl.constexpr):
    """How a row's matrices lie in memory, `aligned`."""
    side = tl.load(entry + _SIDE)
    outer = tl.load(entry + _OUTER)
    inner = tl.load(entry + _INNER)
    stride_outer = tl.load(entry + _STRIDE_OUTER)
    stride_inner = tl.load(entry + _STRIDE_INNER)
    stride_side = tl.load(entry + _STRIDE_SIDE)
    side, outer, inner, stride_outer, stride_inner, stride_side = aligned(
        side, outer, inner, stride_outer, stride_inner, stride_side, VECTOR, LAYOUT
    )
    return side, outer, inner, stride_outer, stride_inner, stride_side, tl.load(entry + _N)


@triton.jit
def start_of(view, block, LAYOUT: tl.constexpr, BLOCK_D: tl.constexpr, HOPS: tl.constexpr = 1):
    """Outer step of a block, and its index (layout ANY: its first depth) within that step."""
    side, outer, inner, stride_outer, stride_inner, stride_side, n = view
    if LAYOUT == _ANY:
        hop = block * BLOCK_D // inner
        return hop, block * BLOCK_D - hop * inner
    elif HOPS > 1:
        return block * HOPS, 0 * block
    else:
        per_outer = (inner + BLOCK_D - 1) // BLOCK_D
        hop = block // per_outer
        return hop, block - hop * per_outer


@triton.jit
def next_start(view, hop, at, LAYOUT: tl.constexpr, BLOCK_D: tl.constexpr, HOPS: tl.constexpr = 1):
    """start_of the next block."""
    side, outer, inner, stride_outer, stride_inner, stride_side, n = view
    if LAYOUT == _ANY:
        more = (at + BLOCK_D) // inner
        return hop + more, at + BLOCK_D - more * inner
    elif HOPS > 1:
        return hop + HOPS, at
    else:
        end = (at + 1) * BLOCK_D >= inner
        return tl.where(end, hop + 1, hop), tl.where(end, 0, at + 1)


@triton.jit
def depth_offsets(view, hop, at, LAYOUT: tl.constexpr, BLOCK_D: tl.constexpr, HOPS: tl.constexpr = 1):
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
    elif HOPS > 1:
        WIDTH: tl.constexpr = BLOCK_D // HOPS
        hops, within = hop + rel // WIDTH, rel % WIDTH
        return hops * stride_outer + within, (hops < outer) & (within < inner)
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
def load_words(
    base,
    view,
    hop,
    at,
    more,
    first,
    LAYOUT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
    HOPS: tl.constexpr,
):
    """A block of an aligned layout as it lies in memory, in words of 32 bits; zeros unless `more`.

    What is read ahead must not be taken apart before it is used: the first instruction that touches it waits.
    """
    side, outer, inner, stride_outer, stride_inner, stride_side, n = view
    PAIR: tl.constexpr = VECTOR // 4  # elements of a word
    words = tl.multiple_of(base.to(tl.pointer_type(tl.int32), bitcast=True), 16)
    if LAYOUT == _SIDE_ALIGNED:
        depth = at * BLOCK_D + tl.arange(0, BLOCK_D)
        column = first // PAIR + tl.arange(0, TILE // PAIR)
        along_depth = hop * (stride_outer // VECTOR * 4) + depth * (stride_inner // VECTOR * 4)
        address = along_depth[:, None] + column[None, :]
        inside = ((depth < inner) & more)[:, None] & (column < side // PAIR)[None, :]
    else:
        WORDS: tl.constexpr = BLOCK_D // PAIR // HOPS
        rel = tl.arange(0, BLOCK_D // PAIR)
        hops, depth = hop + rel // WORDS, at * WORDS + rel % WORDS
        column = first + tl.arange(0, TILE)
        along_depth = hops * (stride_outer // VECTOR * 4) + depth
        address = (column * (stride_side // VECTOR * 4))[None, :] + along_depth[:, None]
        inside = ((depth < inner // PAIR) & (hops < outer) & more)[:, None] & (column < side)[None, :]
    return tl.load(words + address, mask=inside, other=0)


@triton.jit
def elements_of(words, DTYPE: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr):
    """The (depth, side) block that load_words read."""
    if DTYPE.primitive_bitwidth == 32:
        return words.to(DTYPE, bitcast=True)
    else:
        low = (words & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
        high = (words >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        pairs = tl.join(low, high)
        if LAYOUT != _SIDE_ALIGNED:
            pairs = tl.permute(pairs, (0, 2, 1))
        return tl.reshape(pairs, (BLOCK_D, TILE))


@triton.jit
def widened(x):
    """x in float64."""
    if _HIDE_16_BITS and x.dtype.primitive_bitwidth == 16:
        # The compiler's search for narrow operands does not pass an instruction that may have effects. A
        # branch would stop it too, at the cost of registers.
        x = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x.to(tl.float32)], dtype=tl.float32, is_pure=False, pack=1
        )
    return x.to(tl.float64)


@triton.jit
def load_wide(
    base,
    view,
    shift,
    scale,
    hop,
    at,
    first,
    C: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):
    """The block in float64, scaled, less the (scaled) shift of its features; BY_MEAN: also about row 0."""
    side, outer, inner, stride_outer, stride_inner, stride_side, n = view
    offsets, valid = depth_offsets(view, hop, at, LAYOUT, BLOCK_D, C.hops)
    x = widened(load_block(base, view, offsets, valid, first, LAYOUT, TILE))
    if C.scaled:
        x = x * scale
    about_first = x
    if C.shift == _BY_MEAN:
        # Less the first row before: equal rows leave 0, and the mean of what is left keeps its digits.
        first_row = widened(tl.load(base + offsets, mask=valid, other=0.0))
        inside = valid[:, None] & (first + tl.arange(0, TILE) < side)[None, :]
        about_first = tl.where(inside, x - first_row[:, None], 0.0)
        mean = tl.sum(about_first, axis=1) / side.to(tl.float64)
        x = tl.where(inside, about_first - mean[:, None], 0.0)
    elif C.shift != _NO_SHIFT:
        column = first + tl.arange(0, TILE)
        # A wide matrix has one level of depth, and the depth is the feature.
        depth = at + tl.arange(0, BLOCK_D) if LAYOUT == _ANY else at * BLOCK_D + tl.arange(0, BLOCK_D)
        along_side = column < tl.where(side == n, side, 0)
        along_depth = depth < tl.where(side == n, 0, inner)
        if C.shift == _BY_VECTOR:
            by_side = tl.load(shift + column, mask=along_side, other=0.0)
            by_depth = tl.load(shift + depth, mask=along_depth, other=0.0)
        else:
            by_side = widened(tl.load(base + column * stride_side, mask=along_side, other=0.0))
            by_depth = widened(tl.load(base + offsets, mask=along_depth, other=0.0))
        if C.scaled:
            by_side = by_side * scale
            by_depth = by_depth * scale
        # One of the two is zero. Elements outside the matrix stay zero.
        inside = valid[:, None] & (column < side)[None, :]
        x = tl.where(inside, x - by_side[None, :] - by_depth[:, None], 0.0)
    return x, about_first


@triton.jit
def sum_of_slices(part, SLICES: tl.constexpr):
    """Float32 sums of a tile in float64, those of slices added up."""
    wide = part.to(tl.float64)
    return wide if SLICES == 1 else tl.sum(wide, axis=0)


@triton.jit
def sum_float32(
    base,
    view,
    begin,
    end,
    row0,
    column0,
    C: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """Tile sums in float32, each of C.chunk products at most, which are added up in float64.

    With warp groups the compiler overlaps reading and multiplying. It does not where both operands come from
    one load but through registers; there the next block is on its way while one is multiplied (of aligned
    layouts: single elements have too many addresses). Of the narrowest tiles C.slices parts of a block's
    depths are multiplied apart, one a warp: sharing a tile, each would fetch nearly all of the block.
    """
    SLICES: tl.constexpr = C.slices if TILE == _SMALLEST else 1
    PIPELINED: tl.constexpr = C.warpgroup and TILE >= 64
    total = tl.zeros((TILE, TILE), tl.float64)
    SHAPE: tl.constexpr = (TILE, TILE) if SLICES == 1 else (SLICES, TILE, TILE)
    part = tl.zeros(SHAPE, tl.float32)
    FLUSH: tl.constexpr = C.chunk * SLICES // BLOCK_D
    ALIGNED: tl.constexpr = LAYOUT == _SIDE_ALIGNED or LAYOUT == _DEPTH_ALIGNED
    AHEAD: tl.constexpr = DIAGONAL and ALIGNED and not PIPELINED
    hop, at = start_of(view, begin, LAYOUT, BLOCK_D, C.hops)
    DTYPE: tl.constexpr = base.dtype.element_ty
    VECTOR: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    if AHEAD:
        no = tl.zeros((1,), tl.int64)  # scalar conditions are no masks in the interpreter
        next_words = load_words(base, view, hop, at, no < 1, row0, LAYOUT, BLOCK_D, TILE, VECTOR, C.hops)
        hop, at = next_start(view, hop, at, LAYOUT, BLOCK_D, C.hops)
    for block in range(begin, end):
        if AHEAD:
            words = next_words
            more = block + 1 + no < end
            next_words = load_words(base, view, hop, at, more, row0, LAYOUT, BLOCK_D, TILE, VECTOR, C.hops)
            x = elements_of(words, DTYPE, LAYOUT, BLOCK_D, TILE)
        else:
            offsets, valid = depth_offsets(view, hop, at, LAYOUT, BLOCK_D, C.hops)
            x = load_block(base, view, offsets, valid, row0, LAYOUT, TILE)
        if C.upcast:
            x = x.to(tl.float32)
        y = x
        if not DIAGONAL:
            y = load_block(base, view, offsets, valid, column0, LAYOUT, TILE)
            if C.upcast:
                y = y.to(tl.float32)
        if SLICES == 1:
            part = tl.dot(tl.trans(x), y, part, input_precision=C.dot)
        else:
            slices = tl.reshape(x, (SLICES, BLOCK_D // SLICES, TILE))
            part = tl.dot(tl.permute(slices, (0, 2, 1)), slices, part, input_precision=C.dot)
        if (block - begin) % FLUSH == FLUSH - 1:
            total += sum_of_slices(part, SLICES)
            part = tl.zeros_like(part)
        hop, at = next_start(view, hop, at, LAYOUT, BLOCK_D, C.hops)
    return total + sum_of_slices(part, SLICES)


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
    C: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """Tile sums in float64, one block's sum at a time, and the sums of the tile's columns."""
    total = tl.zeros((TILE, TILE), tl.float64)
    sums = tl.zeros((TILE,), tl.float64)
    UNDERFLOWS: tl.constexpr = DIAGONAL and C.accumulate and C.dtype.primitive_bitwidth == 64
    largest = tl.zeros((TILE,), tl.float64)
    hop, at = start_of(view, begin, LAYOUT, BLOCK_D, C.hops)
    for _ in range(begin, end):
        x, about_first = load_wide(base, view, shift, scale, hop, at, row0, C, LAYOUT, BLOCK_D, TILE)
        y = x
        if not DIAGONAL:
            y, _ = load_wide(base, view, shift, scale, hop, at, column0, C, LAYOUT, BLOCK_D, TILE)
        if C.shift == _BY_MEAN:
            sums += tl.sum(about_first * about_first, axis=0)
        elif DIAGONAL and C.sums:
            sums += tl.sum(x, axis=0)
        if UNDERFLOWS:
            largest = tl.maximum(largest, tl.max(tl.abs(x), axis=0))
        # Any value but 0 of max_num_imprecise_acc keeps the compiler from folding the addition into the
        # product, which would make one sequential sum of all depths.
        total += tl.dot(tl.trans(x), y, out_dtype=tl.float64, max_num_imprecise_acc=BLOCK_D)
        hop, at = next_start(view, hop, at, LAYOUT, BLOCK_D, C.hops)
    if UNDERFLOWS:
        # A column whose squares vanish must not look like zeros, which are known without an error.
        r, c = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
        total = tl.where((r == c) & (total == 0) & (largest > 0)[None, :], _TINY, total)
    return total, sums


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
    C: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """A tile's float64 sums over blocks [begin, end), and its columns' sums."""
    if C.precision == 64:
        total, sums = sum_float64(
            base, view, shift, scale, begin, end, row0, column0, C, LAYOUT, BLOCK_D, TILE, DIAGONAL
        )
    else:
        sums = tl.zeros((TILE,), tl.float64)
        total = sum_float32(base, view, begin, end, row0, column0, C, LAYOUT, BLOCK_D, TILE, DIAGONAL)
    return total, sums


@triton.jit
def redo(
    base,
    view,
    begin,
    end,
    row0,
    column0,
    LAYOUT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    HOPS: tl.constexpr,
):
    """sum_float64 over the depths of blocks [begin, end), by a plain walk that every layout allows."""
    side, outer, inner, stride_outer, stride_inner, stride_side, n = view
    hop, at = start_of(view, begin, LAYOUT, BLOCK_D, HOPS)
    hop_end, at_end = start_of(view, end, LAYOUT, BLOCK_D, HOPS)
    if LAYOUT != _ANY:
        at *= BLOCK_D
        at_end *= BLOCK_D
    first = hop * inner + at
    depths = tl.minimum(hop_end * inner + at_end, outer * inner) - first
    total = tl.zeros((TILE, TILE), tl.float64)
    for done in range(0, depths, _REDO_DEPTH):
        offsets, valid = depth_offsets(view, hop, at, _ANY, _REDO_DEPTH)
        valid = valid & (done + tl.arange(0, _REDO_DEPTH) < depths)
        x = widened(load_block(base, view, offsets, valid, row0, _ANY, TILE))
        y = widened(load_block(base, view, offsets, valid, column0, _ANY, TILE))
        total += tl.dot(tl.trans(x), y, out_dtype=tl.float64, max_num_imprecise_acc=_REDO_DEPTH)
        hop, at = next_start(view, hop, at, _ANY, _REDO_DEPTH)
    return total
