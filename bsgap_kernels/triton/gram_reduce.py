"""Device functions of the Gram kernel: how the splits of a tile meet, and how a tile is written.

Entry (r, c), r >= c, is formed by exactly one tile and written to (c, r) as well, so the result is symmetric
bit for bit. Splits meet in at most two levels of float64 partial tiles that the last program to arrive adds
in fixed order: no float atomics, the same bits every time. Of a tile on the diagonal the upper half is
neither stored nor read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import rounding
from .config import BY_MEAN, MEMORY_SLOT, REDUCE_FAN, SUM_SLOT
from .table import COLUMNS

_FIRST_MATRIX = tl.constexpr(COLUMNS.index("first_matrix"))
_SIDE = tl.constexpr(COLUMNS.index("side"))
_OUTER = tl.constexpr(COLUMNS.index("outer"))
_INNER = tl.constexpr(COLUMNS.index("inner"))
_SPLITS = tl.constexpr(COLUMNS.index("splits"))
_FIRST_GRAM = tl.constexpr(COLUMNS.index("first_gram"))
_FIRST_PARTIAL = tl.constexpr(COLUMNS.index("first_partial"))
_ROUNDINGS = tl.constexpr(COLUMNS.index("roundings"))
_M = tl.constexpr(COLUMNS.index("m"))
_N = tl.constexpr(COLUMNS.index("n"))
_FIRST_VECTOR = tl.constexpr(COLUMNS.index("first_vector"))
_FAN = tl.constexpr(REDUCE_FAN)
_SUM_SLOT = tl.constexpr(SUM_SLOT)
_MEMORY_SLOT = tl.constexpr(MEMORY_SLOT)
_U = tl.constexpr(rounding.UNIT_ROUNDOFF)
_UNDERFLOW = tl.constexpr(rounding.UNDERFLOW)
_BY_MEAN = tl.constexpr(BY_MEAN)


@triton.jit
def gamma(n):
    """rounding.gamma of a float64 number of roundings below 2^51."""
    return n * _U / (1 - n * _U) * (1 + 4 * _U)


@triton.jit
def trace_of(total, TILE: tl.constexpr):
    """Sum of a tile's diagonal."""
    r = tl.arange(0, TILE)
    return tl.sum(tl.sum(tl.where(r[:, None] == r[None, :], total, 0.0), axis=1), axis=0)


@triton.jit
def fan_of(splits):
    """config.reduce_fan: the root is of a number that is no square, so that its error does not matter."""
    root = tl.sqrt(splits.to(tl.float32) - 0.5).to(tl.int32) + 1
    return tl.where(splits <= _FAN, splits, root)


@triton.jit
def store_partial(
    slot, total, sums, diagonal, C: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, SLOT: tl.constexpr
):
    """Stores a partial tile where the last program to arrive will read it."""
    r, c = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    wanted = (c < (r // ROWS + 1) * ROWS) | (diagonal == 0)
    tl.store(slot + (r * TILE + c), total, mask=wanted)
    if C.sums:
        tl.store(slot + SLOT - _SUM_SLOT + tl.arange(0, TILE), sums)
    # All threads' stores come before the one thread's release at the counter.
    tl.debug_barrier()


@triton.jit
def add_slice(slots, members, row, diagonal, TILE: tl.constexpr, ROWS: tl.constexpr, SLOT: tl.constexpr):
    """Sum of some rows of `members` partial tiles that stand SLOT elements apart; all are read, then added.

    Read past the first-level cache, which does not see other processors' stores.
    """
    member = tl.arange(0, _FAN)[:, None, None]
    r, c = (row + tl.arange(0, ROWS))[None, :, None], tl.arange(0, TILE)[None, None, :]
    wanted = (member < members) & ((c < row + ROWS) | (diagonal == 0))
    parts = tl.load(slots + (member * SLOT + (r * TILE + c)), mask=wanted, other=0.0, cache_modifier=".cg")
    return tl.sum(parts, axis=0)


@triton.jit
def add_sums(slots, members, TILE: tl.constexpr, SLOT: tl.constexpr):
    """The same for the column sums behind each tile."""
    at = SLOT - _SUM_SLOT + tl.arange(0, TILE)
    sums = tl.load(slots + at, cache_modifier=".cg")
    for member in range(1, members):
        sums += tl.load(slots + member * SLOT + at, cache_modifier=".cg")
    return sums


@triton.jit
def kept_and(kept, total, fresh, inside, C: tl.constexpr):
    """What is to be written where `kept` points: the total, in a site's sums added to what is there."""
    if C.accumulate:
        total += tl.load(kept, mask=inside & (fresh == 0), other=0.0)
    return total


@triton.jit
def write_slice(
    gram, side, total, row, column, fresh, C: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr
):
    """Writes rows of a tile to both triangles; returns the sum of the total's diagonal entries among them."""
    r = (row + tl.arange(0, ROWS))[:, None]
    c = (column + tl.arange(0, TILE))[None, :]
    inside = (r < side) & (c < side) & (r >= c)
    value = kept_and(gram + (r * side + c), total, fresh, inside, C)
    tl.store(gram + (r * side + c), value, mask=inside)
    tl.store(gram + (c * side + r), value, mask=inside & (r > c))
    return tl.sum(tl.sum(tl.where((r == c) & inside, total, 0.0), axis=1), axis=0)


@triton.jit
def write_tile(gram, side, total, row0, column0, fresh, C: tl.constexpr, TILE: tl.constexpr):
    """Writes a tile's entries of the lower triangle, then mirrors them from there a few rows at a time."""
    ROWS: tl.constexpr = 16
    corner = gram + row0 * side + column0
    row, column = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    inside = (row0 + row < side) & (column0 + column < side) & (row0 + row >= column0 + column)
    at = row * side.to(tl.int32) + column
    tl.store(corner + at, kept_and(corner + at, total, fresh, inside, C), mask=inside)
    tl.debug_barrier()
    for start in range(0, TILE, ROWS):
        r = (row0 + start + tl.arange(0, ROWS))[:, None]
        c = (column0 + tl.arange(0, TILE))[None, :]
        below = (r < side) & (c < side) & (r > c)
        value = tl.load(gram + r * side + c, mask=below, other=0.0, cache_modifier=".cg")
        tl.store(gram + c * side + r, value, mask=below)


@triton.jit
def add_totals(entry, totals_ptr, trace, squares, fresh, C: tl.constexpr):
    """Adds rows, bound of the error and one addition to a site's totals (docs/certificates.md, section 8)."""
    side = tl.load(entry + _SIDE).to(tl.float64)
    # Zeros are added without an error; NaN shows in the Gram matrix.
    error = tl.where(trace > 0, float("inf"), 0.0)
    if C.precision == 64:
        roundings = tl.load(entry + _ROUNDINGS).to(tl.float64)
        depth = (tl.load(entry + _OUTER) * tl.load(entry + _INNER)).to(tl.float64)
        # The trace was computed, so it is smaller than what it stands for by a factor at most.
        grown = 1 + 4 * gamma(roundings + 2 * depth)
        if C.shift == _BY_MEAN:
            error = tl.where(trace > 0, (2 * gamma(roundings) + 3 * gamma(side + 6)) * grown * squares, 0.0)
        else:
            error = tl.where(trace > 0, gamma(roundings) * grown * trace, 0.0)
    # What products, and later those with a decay, may push below the smallest normal number.
    error += tl.where(trace > 0, side * _UNDERFLOW, 0.0)
    more = fresh == 0
    rows = tl.load(totals_ptr, mask=more, other=0.0) + tl.load(entry + _M).to(tl.float64)
    error += tl.load(totals_ptr + 1, mask=more, other=0.0)
    additions = tl.load(totals_ptr + 2, mask=more, other=0.0) + 1.0
    tl.store(totals_ptr, rows)
    tl.store(totals_ptr + 1, error)
    tl.store(totals_ptr + 2, additions)


@triton.jit
def arrive(entry, out, trace, squares, row0, C: tl.constexpr, TILE: tl.constexpr):
    """A tile on the diagonal of a site's Gram matrix is done; the last one adds to the totals."""
    grams_ptr, sums_ptr, totals_ptr, work_ptr, counters_ptr, stats_stride, fresh = out
    tiles = ((tl.load(entry + _SIDE) + TILE - 1) // TILE).to(tl.int32)
    last = tiles == 1
    if tiles > 1:
        traces = work_ptr + stats_stride
        tl.store(traces + row0 // TILE, trace)
        tl.debug_barrier()
        if tl.atomic_add(counters_ptr, 1, sem="acq_rel") == tiles - 1:
            tl.store(counters_ptr, 0)
            trace = tl.load(traces, cache_modifier=".cg")
            for k in range(1, tiles):
                trace += tl.load(traces + k, cache_modifier=".cg")
            last = tiles > 1
    if last:
        add_totals(entry, totals_ptr, trace, squares, fresh, C)


@triton.jit
def add_formed(entry, out, row0, column0, C: tl.constexpr, TILE: tl.constexpr):
    """Adds a tile that an earlier launch has formed in the work buffer to a site's Gram matrix."""
    grams_ptr, sums_ptr, totals_ptr, work_ptr, counters_ptr, stats_stride, fresh = out
    ROWS: tl.constexpr = C.slice // TILE if C.slice // TILE < TILE else TILE
    side = tl.load(entry + _SIDE)
    formed = work_ptr + tl.load(entry + _FIRST_GRAM)
    trace = tl.full((), 0.0, tl.float64)
    for start in range(0, TILE, ROWS):
        r = (row0 + start + tl.arange(0, ROWS))[:, None]
        c = (column0 + tl.arange(0, TILE))[None, :]
        total = tl.load(formed + (r * side + c), mask=(r < side) & (c < side) & (r >= c), other=0.0)
        trace += write_slice(grams_ptr, side, total, row0 + start, column0, fresh, C, TILE, ROWS)
    if row0 == column0:
        arrive(entry, out, trace, trace, row0, C, TILE)


@triton.jit
def finish(
    entry,
    out,
    total,
    sums,
    place,
    sub,
    C: tl.constexpr,
    TILE: tl.constexpr,
    SLOT: tl.constexpr,
):
    """Meets the other splits of the tile; the last to arrive writes the result.

    Works on a few rows of tiles at a time, so that it needs fewer registers than the products did. SLOT: how
    far apart partial tiles stand; sub: where this one begins in its slot.
    """
    grams_ptr, sums_ptr, totals_ptr, work_ptr, counters_ptr, stats_stride, fresh = out
    matrix, tile, tiles, split, row0, column0 = place
    ROWS: tl.constexpr = C.slice // TILE if C.slice // TILE < TILE else TILE
    side = tl.load(entry + _SIDE)
    gram = grams_ptr
    if not C.accumulate:
        gram = grams_ptr + tl.load(entry + _FIRST_GRAM) + matrix * side * side
    splits = tl.load(entry + _SPLITS).to(tl.int32)
    diagonal = row0 == column0
    trace = tl.full((), 0.0, tl.float64)
    # Tiles that fill the registers go through memory even where there is nothing to add.
    last = (splits == 1) & (SLOT < _MEMORY_SLOT)
    if last:
        if SLOT < _MEMORY_SLOT:
            write_tile(gram, side, total, row0, column0, fresh, C, TILE)
            if C.stats or C.accumulate:
                trace = trace_of(total, TILE)
    else:
        fan = fan_of(splits)
        groups = (splits + fan - 1) // fan
        first = tl.load(entry + _FIRST_PARTIAL) + sub
        first += (matrix.to(tl.int64) * tiles + tile) * (splits + groups) * SLOT
        store_partial(work_ptr + first + split * SLOT, total, sums, diagonal, C, TILE, ROWS, SLOT)
        group = split // fan
        members = tl.minimum(splits - group * fan, fan)
        slots = work_ptr + first + group * fan * SLOT
        # A counter for every 256 elements of partials: slots and their quarters are that far apart at least.
        # The one before them is of `arrive`.
        own = first + (splits + group) * SLOT
        counter = counters_ptr + 1 + own // 256
        if tl.atomic_add(counter, 1, sem="acq_rel") == members - 1:
            tl.store(counter, 0)
            last = groups == 1
            if groups > 1:
                for row in range(0, TILE, ROWS):
                    added = add_slice(slots, members, row, diagonal, TILE, ROWS, SLOT)
                    r, c = (row + tl.arange(0, ROWS))[:, None], tl.arange(0, TILE)[None, :]
                    wanted = (c < row + ROWS) | (diagonal == 0)
                    tl.store(work_ptr + own + (r * TILE + c), added, mask=wanted)
                if C.sums:
                    added_sums = add_sums(slots, members, TILE, SLOT)
                    tl.store(work_ptr + own + SLOT - _SUM_SLOT + tl.arange(0, TILE), added_sums)
                tl.debug_barrier()
                counter = counters_ptr + 1 + first // 256
                if tl.atomic_add(counter, 1, sem="acq_rel") == groups - 1:
                    tl.store(counter, 0)
                    slots = work_ptr + first + splits * SLOT
                    members = groups
                    last = groups > 1
            if last:
                for row in range(0, TILE, ROWS):
                    added = add_slice(slots, members, row, diagonal, TILE, ROWS, SLOT)
                    trace += write_slice(gram, side, added, row0 + row, column0, fresh, C, TILE, ROWS)
                if C.sums:
                    sums = add_sums(slots, members, TILE, SLOT)
    if last & diagonal:
        if C.stats:
            index = (tl.load(entry + _FIRST_MATRIX) + matrix) * stats_stride + row0 // TILE
            tl.store(work_ptr + index, trace)
        squares = trace
        if C.shift == _BY_MEAN:
            squares = tl.sum(sums, axis=0)
        elif C.sums:
            n = tl.load(entry + _N)
            if n == side:
                column = column0 + tl.arange(0, TILE)
                vector = sums_ptr + tl.load(entry + _FIRST_VECTOR) + matrix * n + column
                if C.accumulate:
                    sums += tl.load(vector, mask=(column < side) & (fresh == 0), other=0.0)
                tl.store(vector, sums, mask=column < side)
        if C.accumulate:
            arrive(entry, out, trace, squares, row0, C, TILE)
