"""Device functions of the Gram kernel: how the splits of a tile meet, and how a tile is written.

Entry (r, c), r >= c, is formed by exactly one tile and written to (c, r) as well, so the result is symmetric
bit for bit. Splits meet in two levels of float64 partial tiles that the last program to arrive adds in fixed
order: no float atomics, the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .config import MEMORY_SLOT, REDUCE_FAN, SUM_SLOT
from .table import COLUMNS

_FIRST_MATRIX = tl.constexpr(COLUMNS.index("first_matrix"))
_SIDE = tl.constexpr(COLUMNS.index("side"))
_SPLITS = tl.constexpr(COLUMNS.index("splits"))
_FIRST_GRAM = tl.constexpr(COLUMNS.index("first_gram"))
_FIRST_PARTIAL = tl.constexpr(COLUMNS.index("first_partial"))
_N = tl.constexpr(COLUMNS.index("n"))
_FIRST_VECTOR = tl.constexpr(COLUMNS.index("first_vector"))
_FAN = tl.constexpr(REDUCE_FAN)
_SUM_SLOT = tl.constexpr(SUM_SLOT)
_MEMORY_SLOT = tl.constexpr(MEMORY_SLOT)
_SLICE = tl.constexpr(16)  # rows of a tile handled at once when splits meet


@triton.jit
def trace_of(total, TILE: tl.constexpr):
    """Sum of a tile's diagonal."""
    r = tl.arange(0, TILE)
    return tl.sum(tl.sum(tl.where(r[:, None] == r[None, :], total, 0.0), axis=1), axis=0)


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
    # Tiles that fill the registers go through memory even where there is nothing to add.
    last = (splits == 1) & (SLOT < _MEMORY_SLOT)
    if last:
        if SLOT < _MEMORY_SLOT:
            write_tile(gram, side, total, row0, column0, TILE)
            if STATS:
                squares = trace_of(total, TILE)
    else:
        groups = (splits + _FAN - 1) // _FAN
        first = (
            tl.load(entry + _FIRST_PARTIAL)
            + (matrix.to(tl.int64) * tiles + tile) * (splits + groups) * SLOT
            + SUB
        )
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
