"""Device functions of the Gram kernel: blocks of depth, how they are read and summed.

Offsets are 64-bit. Except in layout ANY, a block of depth never crosses a step of `outer`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .config import ANY, DEPTH_ALIGNED, SIDE_ALIGNED
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
_REDO_DEPTH = tl.constexpr(16)
# Triton 3.6 fails to compile float64 products of operands that it sees are 16-bit in memory; 3.9 does not.
_HIDE_16_BITS = tl.constexpr([int(x) for x in triton.__version__.split(".")[:2]] < [3, 9])


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
def widened(x, always):
    """x in float64; `always` is true, which only the compiler may not know."""
    if _HIDE_16_BITS and x.dtype.primitive_bitwidth == 16:
        wide = tl.zeros(x.shape, tl.float64)
        if always:
            wide = x.to(tl.float64)
    else:
        wide = x.to(tl.float64)
    return wide


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
    x = widened(load_block(base, view, offsets, valid, first, LAYOUT, TILE), side > 0)
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
        x = widened(load_block(base, view, offsets, valid, row0, _ANY, TILE), side > 0)
        y = widened(load_block(base, view, offsets, valid, column0, _ANY, TILE), side > 0)
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
