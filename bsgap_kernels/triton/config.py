"""What the Gram kernel is launched with: pure functions of shapes and of the number of processors.

Tiles are square, of the lower triangle only. Sides up to 16, 32 and 64 have a tile of their own size. Beyond
that tiles are 64, and 128 for float32 sums of aligned 16-bit input on capability 9 and 10 (`choose`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from .table import Orientation

Precision = Literal["float32", "float64"]

# Memory layouts of a block. Aligned: 16-byte loads. ANY walks over depth with a division per element.
SIDE_ALIGNED, DEPTH_ALIGNED, DEPTH_CONTIGUOUS, ANY = range(4)
ELEMENTWISE = DEPTH_CONTIGUOUS  # this one and the next have an address for each element
CODE_LAYOUTS = 4

# What is subtracted from every observation. BY_MEAN: of one matrix with fewer rows than features that is one
# tile wide, so that a program sees all rows.
NO_SHIFT, BY_VECTOR, BY_FIRST_ROW, BY_MEAN = range(4)

TILES = (16, 32, 64, 128)
CODE_CLASSES = len(TILES)
CODES = CODE_LAYOUTS * CODE_CLASSES

# Partial tiles are added in at most two levels of at most this many: its square of splits at most.
REDUCE_FAN = 16
MAX_SPLITS = REDUCE_FAN * REDUCE_FAN

# Elements of partial tiles that a warp handles at once: with 16 members 64 registers a thread, and 8 KiB on
# their way to each warp.
REDUCE_SLICE = 64

# Elements behind a partial tile that hold its column sums; a multiple of 256, as every slot must be.
SUM_SLOT = 256

# Partial tiles of this many elements are written and read back even where there is one split: its registers
# do not allow for more than that.
MEMORY_SLOT = 128 * 128

VECTOR_BYTES = 16

BLACKWELL_TRITON = (3, 8)
"""The first Triton seen to compile every kernel for compute capability 10; 3.6 and 3.7 were seen not to."""

PROBES = 9
PROBE_COLUMNS = 16
"""Columns in memory, those past PROBES zero: tl.dot takes no fewer."""


@dataclass(frozen=True)
class GramConfig:
    """Constants of one launch."""

    elements: int  # of a block (depth x tile): fixes the depth of a block
    max_depth: int  # of a block
    chunk: int  # depths summed in float32 before they are added up in float64
    dot: str  # how float32 operands are multiplied: "tf32x3" or "ieee"
    num_warps: int
    num_stages: int
    elementwise: int = 1  # blocks of layouts that are read element by element are that much smaller

    def block_depth(self, tile: int, layout: int) -> int:
        """Depths of a block."""
        return min(self.max_depth, self.elements // tile) // (
            self.elementwise if layout >= ELEMENTWISE else 1
        )


@dataclass(frozen=True)
class Constants:
    """Everything that the Gram kernel is compiled for: one argument of it."""

    group: int  # the launch's rows of the table
    codes: int  # bit c: some row has code c
    dtype: Any  # triton's, of the input
    precision: int  # of the sums, bits
    dot: str
    chunk: int
    elements: int
    max_depth: int
    elementwise: int
    hops: int  # steps of `outer` in a block
    multi: bool  # some matrix has several tiles
    stats: bool  # diagonal tiles leave their squares for a rescue
    rescue: bool
    accumulate: bool  # adds to a site's sums
    shift: int
    sums: bool  # of columns; BY_MEAN: of squares about the first row
    scaled: bool  # by a power of two
    upcast: bool
    warpgroup: bool  # products of 64 and more rows are those of a warp group, straight from shared memory
    slices: int  # of the depths of a block of the narrowest tiles
    slice: int  # elements of a tile that are handled at once when its splits meet


def gram_config(precision: Precision, itemsize: int, tile: int, big: bool, architecture: int) -> GramConfig:
    """The constants of a launch whose tiles are at most `tile`; big: of float32 sums of sides beyond 64.

    architecture: major compute capability. The depth of a block must not depend on `tile` otherwise, since
    smaller tiles share the launch.
    """
    num_warps = 4 if tile <= 32 else 8
    if precision == "float64":
        # Most devices of 8 and all of 12 have no float64 tensor cores: their products fill the registers.
        stages = 2 if architecture in (9, 10) else 1
        if itemsize == 8:
            return GramConfig(1024, 128, 0, "ieee", num_warps, stages)
        return GramConfig(2048, 128, 0, "ieee", num_warps, stages, elementwise=2)
    if itemsize == 4:
        # Operands of older and of consumer devices pass through registers: less of them at a time. What
        # chunks of 64 lose the limit in `dispatch.py` allows for (docs/certificates.md).
        if architecture in (9, 10):
            return GramConfig(2048, 32, 64, "tf32x3", num_warps, 4)
        return GramConfig(1024, 32, 64, "tf32x3", num_warps, 2)
    if tile == 128:
        return GramConfig(4096, 32, 256, "tf32x3", 8, 4)
    if big:
        return GramConfig(8192, 64, 256, "tf32x3", 8, 3)
    # Reading binds. Two blocks of 4 warps a multiprocessor, 16 KiB on their way to each, keep memory busy; on
    # consumer devices one of 8 does, and 4 would spill.
    return GramConfig(8192, 512, 256, "tf32x3", 8 if architecture == 12 else 4, 3, elementwise=4)


def check_compiler(architecture: int, version: tuple[int, int]) -> None:
    """Raises RuntimeError where this Triton is known to fail, before it does with pages of its own."""
    if architecture == 10 and version < BLACKWELL_TRITON:
        raise RuntimeError(
            f"bsgap: Triton {version[0]}.{version[1]} does not compile float64 products for capability "
            f"10; expected Triton >= {BLACKWELL_TRITON[0]}.{BLACKWELL_TRITON[1]}, which torch 2.14 brings"
        )


def register_limit(num_warps: int, rescue: bool, architecture: int) -> int | None:
    """Registers that a thread may have, or None: the compiler's choice.

    Which would be to spill a few words where that makes room for a second block of warps; but where
    arithmetic binds, or two fit anyway, registers are worth more (benchmarks/results/triton_resources.json).
    """
    return 255 if rescue or num_warps == 4 or architecture not in (9, 10) else None


def tile_count(side: int, tile: int) -> int:
    """Tiles of the lower triangle."""
    per_side = -(-side // tile)
    return per_side * (per_side + 1) // 2


def layout_of(view: Orientation, pointer: int, stride_batch: int, itemsize: int, block_depth: int) -> int:
    """The fastest layout that the view's strides allow."""
    vector = VECTOR_BYTES // itemsize
    aligned = pointer % VECTOR_BYTES == 0 and stride_batch % vector == 0 and view.stride_outer % vector == 0
    # Blocks end where `inner` does: with short ones most of a block would be empty, and the float64 sums, one
    # a block, more than the limit of rtol allows for (`float64_gram_min_rtol` in dispatch.py).
    if view.outer > 1 and 2 * view.inner < block_depth:
        return ANY
    if aligned and view.stride_side == 1 and view.side % vector == 0 and view.stride_inner % vector == 0:
        return SIDE_ALIGNED
    if view.stride_inner == 1:
        if aligned and view.stride_side % vector == 0 and view.inner % vector == 0:
            return DEPTH_ALIGNED
        return DEPTH_CONTIGUOUS
    return ANY


def choose(
    view: Orientation, pointer: int, stride_batch: int, itemsize: int, precision: Precision, architecture: int
) -> tuple[int, int]:
    """Side of the tiles of a matrix, and its layout.

    Tiles of 128 halve what is read. Only sums of 16-bit products are fast enough to be held up by reading,
    and only with aligned operands that come from shared memory do such tiles fit into the registers
    (benchmarks/results/triton_resources.json).
    """
    tile = next((t for t in TILES[:2] if view.side <= t), 64)
    big = precision == "float32" and view.side > 64
    depth = gram_config(precision, itemsize, tile, big, architecture).block_depth(tile, SIDE_ALIGNED)
    layout = layout_of(view, pointer, stride_batch, itemsize, depth)
    if big and itemsize == 2 and architecture in (9, 10) and layout in (SIDE_ALIGNED, DEPTH_ALIGNED):
        tile = 128
    return tile, layout


def hop_count(view: Orientation, layout: int, block_depth: int) -> int:
    """Steps of `outer` that a block of depth holds: two of images that would leave half of it empty."""
    return 2 if layout == DEPTH_ALIGNED and view.outer > 1 and 2 * view.inner == block_depth else 1


def block_count(view: Orientation, layout: int, block_depth: int, hops: int = 1) -> int:
    """Blocks of depth of one matrix."""
    if layout == ANY:
        return -(-view.depth // block_depth)
    if hops > 1:
        return -(-view.outer // hops)
    return view.outer * -(-view.inner // block_depth)


def split_bytes(total_bytes: int, processors: int) -> int:
    """Bytes that one work item should read, given what the whole call reads.

    Two waves of two programs a processor for small calls, 1 MiB an item for big ones; below 32 KiB an item
    the launch and the reduction cost more than they save.
    """
    return min(max(total_bytes // (4 * processors), 1 << 15), 1 << 20)


def split_count(
    view: Orientation, itemsize: int, tile: int, wanted_bytes: int, tiles: int, processors: int
) -> int:
    """Ranges of depth wanted for one matrix; `tiles` is the number of tiles of its whole launch group.

    With several tiles a matrix there is parallelism without splits, and every split costs a partial tile.
    """
    splits = -(-view.depth * min(view.side, 2 * tile) * itemsize // wanted_bytes)
    if view.side > tile:
        splits = min(splits, -(-4 * processors // tiles))
    return max(splits, 1)


def gram_roundings(view: Orientation, layout: int, block_depth: int, blocks: int, splits: int) -> int:
    """Most sequential float64 roundings that a term of an entry of a float64 Gram passes through.

    Its product and the sums of its block (in any order: at most block_depth + 1 together), one a block of
    its split, at most 15 in each level of the reduction; two to spare for the shift and the scaling.
    """
    longest = -(-blocks // splits)
    fan = reduce_fan(splits)
    levels = fan - 1 + -(-splits // fan) - 1
    return min(block_depth, view.depth) + 1 + longest + levels + 2


def reduce_fan(splits: int) -> int:
    """Partial tiles that are added at once: all, or the root of their number, rounded up.

    What one processor reads is then least: 2 sqrt(s) tiles after each other.
    """
    return splits if splits <= REDUCE_FAN else math.isqrt(splits - 1) + 1


def slots(splits: int, elements: int) -> int:
    """Partial tiles that the splits of one tile leave: their own and one a group."""
    return 0 if splits == 1 and elements < MEMORY_SLOT else splits + -(-splits // reduce_fan(splits))


def slot_elements(tile: int, sums: bool) -> int:
    """Elements of one partial tile."""
    return tile * tile + (SUM_SLOT if sums else 0)


def rescue_config(config: GramConfig) -> GramConfig:
    """The same blocks and tiles, for the launch that redoes float32 sums in float64."""
    return replace(config, num_warps=8, num_stages=1)
