"""The probes' kernels: Gaussian vectors, and float64 products of a matrix with a few of them.

Both products with X (depth x side) read it in its own type and never hold a float64 copy of it. Offsets are
64-bit; layouts and blocks of depth are those of gram_blocks.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .config import ANY, DEPTH_ALIGNED, PROBE_COLUMNS, PROBES, SIDE_ALIGNED
from .gram_blocks import aligned, depth_offsets, load_block, next_start, start_of, widened

_PROBES = tl.constexpr(PROBES)
_WIDTH = tl.constexpr(PROBE_COLUMNS)
_SIDE_ALIGNED = tl.constexpr(SIDE_ALIGNED)
_DEPTH_ALIGNED = tl.constexpr(DEPTH_ALIGNED)
_ANY = tl.constexpr(ANY)


@triton.jit
def uniform(high, low):
    """53-bit numbers in (0, 1]."""
    bits = ((high.to(tl.uint64) << 32) | low.to(tl.uint64)) >> 11
    return (bits.to(tl.int64).to(tl.float64) + 1.0) * 1.1102230246251565e-16


@triton.jit(do_not_specialize=["seed", "side"])
def omega_kernel(omega_ptr, seed, side, BLOCK: tl.constexpr):
    """Ω[i, j, r] = gaussian_pair(seed + i, j, r + 1).first of csrc/core/philox.h. Grid: (i, blocks of j)."""
    matrix = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    r = tl.arange(0, _WIDTH)[None, :]
    zero = tl.zeros((BLOCK, _WIDTH), tl.uint32)
    key = seed.to(tl.uint64) + matrix.to(tl.uint64)
    a, b, c, d = tl.philox(key, zero + j.to(tl.uint32), zero, zero + (r + 1).to(tl.uint32), zero)
    radius = tl.sqrt(-2.0 * tl.log(uniform(a, b)))
    # cos(2 pi t) = sin(2 pi (|t - 1/2| - 1/4)), by its series: within pi / 2, x^25 / 25! < 1e-20. tl.cos
    # would reduce large angles, which takes a stack.
    x = 6.283185307179586 * (tl.abs(uniform(c, d) - 0.5) - 0.25)
    series = tl.full((BLOCK, _WIDTH), 1.0, tl.float64)
    for n in tl.static_range(11, 0, -1):
        series = 1.0 - series * (x * x) * (1.0 / (2 * n * (2 * n + 1)))
    value = tl.where(r < _PROBES, radius * (x * series), 0.0)
    tl.store(omega_ptr + (matrix * side + j) * _WIDTH + r, value, mask=j < side)


@triton.jit
def view_of(
    side, outer, inner, stride_outer, stride_inner, stride_side, VECTOR: tl.constexpr, LAYOUT: tl.constexpr
):
    """What read_view of gram_blocks.py returns, from arguments of the launch."""
    side, outer, inner = side.to(tl.int64), outer.to(tl.int64), inner.to(tl.int64)
    stride_outer, stride_inner = stride_outer.to(tl.int64), stride_inner.to(tl.int64)
    stride_side = stride_side.to(tl.int64)
    side, outer, inner, stride_outer, stride_inner, stride_side = aligned(
        side, outer, inner, stride_outer, stride_inner, stride_side, VECTOR, LAYOUT
    )
    return side, outer, inner, stride_outer, stride_inner, stride_side, side


@triton.jit
def depth_index(inner, hop, at, LAYOUT: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which depths a block holds, counted through all outer steps."""
    first = hop * inner + (at if LAYOUT == _ANY else at * BLOCK_D)
    return first + tl.arange(0, BLOCK_D)


@triton.jit
def thin_rows(thin, index, inside):
    """Rows of a (*, _WIDTH) matrix; zeros where there are none."""
    at = index[:, None] * _WIDTH + tl.arange(0, _WIDTH)[None, :]
    return tl.load(thin + at, mask=inside[:, None], other=0.0)


@triton.jit(
    do_not_specialize=[
        "side",
        "outer",
        "inner",
        "stride_batch",
        "stride_outer",
        "stride_inner",
        "stride_side",
        "tiles",
        "splits",
    ]
)
def product_kernel(
    x_ptr,
    thin_ptr,
    out_ptr,
    squares_ptr,
    side,
    outer,
    inner,
    stride_batch,
    stride_outer,
    stride_inner,
    stride_side,
    tiles,
    splits,
    LAYOUT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
):
    """BLOCK_OUT rows of X thin (or Xᵀ thin if TRANSPOSED), summed over one of `splits` ranges.

    Grid: (matrix, split, tile), the tile fastest so that tiles share what they read of `thin`. out is
    (matrix, split, row, _WIDTH). squares, of X thin only: the sum of the squares that the program read.
    """
    item = tl.program_id(0).to(tl.int64)
    slot = item // tiles  # matrix * splits + split
    tile = item - slot * tiles
    matrix = slot // splits
    split = slot - matrix * splits
    view = view_of(side, outer, inner, stride_outer, stride_inner, stride_side, VECTOR, LAYOUT)
    side, outer, inner, stride_outer, stride_inner, stride_side, n = view
    stride_batch = stride_batch.to(tl.int64)
    if LAYOUT == _SIDE_ALIGNED or LAYOUT == _DEPTH_ALIGNED:
        stride_batch = stride_batch // VECTOR * VECTOR
    base = x_ptr + matrix * stride_batch
    total = tl.zeros((BLOCK_OUT, _WIDTH), tl.float64)
    # Of tl.dot, max_num_imprecise_acc: see sum_float64 in gram_blocks.py.
    if TRANSPOSED:
        rows = side
        row = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        inside = row < side
        if LAYOUT == _ANY:
            blocks = (outer * inner + BLOCK_SUM - 1) // BLOCK_SUM
        else:
            blocks = outer * ((inner + BLOCK_SUM - 1) // BLOCK_SUM)
        begin = split * blocks // splits
        hop, at = start_of(view, begin, LAYOUT, BLOCK_SUM)
        thin = thin_ptr + matrix * outer * inner * _WIDTH
        for _ in range(begin, (split + 1) * blocks // splits):
            offsets, valid = depth_offsets(view, hop, at, LAYOUT, BLOCK_SUM)
            x = widened(load_block(base, view, offsets, valid, tile * BLOCK_OUT, LAYOUT, BLOCK_OUT))
            y = thin_rows(thin, depth_index(inner, hop, at, LAYOUT, BLOCK_SUM), valid)
            total += tl.dot(tl.trans(x), y, out_dtype=tl.float64, max_num_imprecise_acc=BLOCK_SUM)
            hop, at = next_start(view, hop, at, LAYOUT, BLOCK_SUM)
    else:
        rows = outer * inner
        hop, at = start_of(view, tile, LAYOUT, BLOCK_OUT)
        offsets, inside = depth_offsets(view, hop, at, LAYOUT, BLOCK_OUT)
        row = depth_index(inner, hop, at, LAYOUT, BLOCK_OUT)
        blocks = (side + BLOCK_SUM - 1) // BLOCK_SUM
        thin = thin_ptr + matrix * side * _WIDTH
        squares = tl.zeros((BLOCK_OUT,), tl.float64)
        for block in range(split * blocks // splits, (split + 1) * blocks // splits):
            first = block * BLOCK_SUM
            x = widened(load_block(base, view, offsets, inside, first, LAYOUT, BLOCK_SUM))
            index = first + tl.arange(0, BLOCK_SUM)
            y = thin_rows(thin, index, index < side)
            total += tl.dot(x, y, out_dtype=tl.float64, max_num_imprecise_acc=BLOCK_SUM)
            squares += tl.sum(x * x, axis=1)
        tl.store(squares_ptr + item, tl.sum(squares, axis=0))
    at_out = (slot * rows + row)[:, None] * _WIDTH + tl.arange(0, _WIDTH)[None, :]
    tl.store(out_ptr + at_out, total, mask=inside[:, None])
