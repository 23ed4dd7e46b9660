"""What the host decides before it launches the Gram kernel: table rows, launches, compile-time constants."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import config
from .config import GramConfig, Precision
from .table import MatrixView, orient


@dataclass(frozen=True)
class Launch:
    """One kernel launch: which rows it serves, and with what constants."""

    group: int
    dtype: torch.dtype
    items: int
    codes: int
    multi: bool  # some matrix has several tiles
    config: GramConfig
    stats: bool  # diagonal tiles store their squares, which a rescue reads
    rescue: bool


@dataclass(frozen=True, eq=False)
class GramPlan:
    """Everything the host knows before it launches: a pure function of views, precision and processors."""

    rows: list[dict[str, int]]  # table order
    launches: list[Launch]
    order: list[int]  # table row -> index of the view
    gram_elements: int
    partial_elements: int
    vector_offsets: list[int]  # of views: first element of the per-feature vectors in sums and shift
    vector_elements: int
    stats_stride: int  # tiles along the diagonal of the largest matrix that needs a rescue, 0: none

    @functools.cached_property
    def sides(self) -> tuple[int, ...]:
        """Of table rows."""
        return tuple(row["side"] for row in self.rows)

    @functools.cached_property
    def batches(self) -> tuple[int, ...]:
        """Matrices of table rows."""
        return tuple(row["count"] for row in self.rows)

    @functools.cached_property
    def matrices(self) -> int:
        """Matrices in all rows."""
        return sum(self.batches)


def gram_plan(
    views: Sequence[MatrixView],
    *,
    precision: Precision,
    features_side: bool,
    sums: bool,
    processors: int,
    architecture: int,
    splits: int | None = None,
) -> GramPlan:
    """Rows of the table, their addresses relative to the first view's, and the launches that they need."""
    origin = views[0].tensor.data_ptr()
    oriented = [orient(view, features_side) for view in views]
    itemsizes = [view.tensor.element_size() for view in views]
    order = sorted(range(len(views)), key=lambda i: -oriented[i].side)
    read = sum(v.count * o.side * o.depth * s for v, o, s in zip(views, oriented, itemsizes, strict=True))
    wanted = config.split_bytes(read, processors)

    choices = [
        config.choose(o, v.tensor.data_ptr(), v.stride_batch, s, precision, architecture)
        for v, o, s in zip(views, oriented, itemsizes, strict=True)
    ]

    # A launch serves one dtype; of float32 sums, sides up to 64 or beyond; of tiles of 128, one layout, since
    # the registers hold no more.
    def key(i: int) -> tuple[torch.dtype, bool, int]:
        tile, layout = choices[i]
        big = precision == "float32" and oriented[i].side > 64
        return views[i].tensor.dtype, big, layout if tile == 128 else -1

    groups: dict[tuple[torch.dtype, bool, int], list[int]] = {}
    for i in order:
        groups.setdefault(key(i), []).append(i)
    group_of = {k: number for number, k in enumerate(groups)}

    first_results, vectors = [0], [0]
    for view in views:
        first_results.append(first_results[-1] + view.count)
        vectors.append(vectors[-1] + view.count * view.n)
    rows: list[dict[str, int]] = []
    items = dict.fromkeys(groups, 0)
    codes = dict.fromkeys(groups, 0)
    tiles_of = {
        k: sum(views[i].count * config.tile_count(oriented[i].side, choices[i][0]) for i in members)
        for k, members in groups.items()
    }
    matrices = grams = partials = 0
    for i in order:
        view, o, k = views[i], oriented[i], key(i)
        tile, layout = choices[i]
        depth = config.gram_config(precision, itemsizes[i], tile, k[1], architecture).block_depth(
            tile, layout
        )
        blocks = config.block_count(o, layout, depth)
        ranges = splits or config.split_count(o, itemsizes[i], tile, wanted, tiles_of[k], processors)
        ranges = min(ranges, blocks, config.MAX_SPLITS)
        code = config.TILES.index(tile) * config.CODE_LAYOUTS + layout
        tiles = config.tile_count(o.side, tile)
        rows.append(
            {
                "first_item": items[k],
                "first_matrix": matrices,
                "count": view.count,
                "offset": view.tensor.data_ptr() - origin,
                "stride_batch": view.stride_batch,
                "side": o.side,
                "outer": o.outer,
                "inner": o.inner,
                "stride_outer": o.stride_outer,
                "stride_inner": o.stride_inner,
                "stride_side": o.stride_side,
                "splits": ranges,
                "first_gram": grams,
                "first_partial": partials,
                "layout": code + config.CODES * group_of[k],
                "first_result": first_results[i],
                "roundings": config.gram_roundings(o, layout, depth, blocks, ranges),
                "m": view.m,
                "n": view.n,
                "first_vector": vectors[i],
            }
        )
        items[k] += view.count * tiles * ranges
        codes[k] |= 1 << code
        matrices += view.count
        grams += view.count * o.side * o.side
        elements = config.slot_elements(tile, sums)
        partials += view.count * tiles * config.slots(ranges, elements) * elements
    launches = []
    stats = 0
    for k, members in groups.items():
        dtype, big, _ = k
        largest = max(choices[i][0] for i in members)
        launch = Launch(
            group=group_of[k],
            dtype=dtype,
            items=items[k],
            codes=codes[k],
            multi=any(oriented[i].side > choices[i][0] for i in members),
            config=config.gram_config(precision, itemsizes[members[0]], largest, big, architecture),
            stats=big,
            rescue=False,
        )
        launches.append(launch)
        if big:
            stats = max(stats, *(-(-oriented[i].side // largest) for i in members), 1)
            rescue = config.rescue_config(launch.config)
            launches.append(replace(launch, config=rescue, stats=False, rescue=True))
    return GramPlan(rows, launches, order, grams, partials, vectors[:-1], vectors[-1], stats)


def launch_constants(
    launch: Launch, precision: Precision, shift: int, interpreted: bool, architecture: int
) -> dict[str, Any]:
    """Compile-time constants of a launch, and the compiler's options."""
    import triton.language as tl

    dtype = {
        torch.float64: tl.float64,
        torch.float32: tl.float32,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
    }[launch.dtype]
    constants = launch.config
    return {
        "GROUP": launch.group,
        "CODES": launch.codes,
        "MULTI": launch.multi,
        "DTYPE": dtype,
        "VECTOR": config.VECTOR_BYTES // launch.dtype.itemsize,
        "PRECISION": 64 if precision == "float64" else 32,
        "DOT": constants.dot,
        "CHUNK": constants.chunk,
        "ELEMENTS": constants.elements,
        "MAX_DEPTH": constants.max_depth,
        "ELEMENTWISE": constants.elementwise,
        "STATS": launch.stats,
        "SHIFT": shift,
        "SCALED": launch.dtype == torch.float64,
        "RESCUE": launch.rescue,
        # The interpreter's product of bfloat16 operands is wrong.
        "UPCAST": interpreted and launch.dtype == torch.bfloat16,
        "WARPGROUP": launch.dtype.itemsize == 2 and architecture in (9, 10),
        "SLICES": constants.num_warps if launch.dtype.itemsize == 2 and precision == "float32" else 1,
        "num_warps": constants.num_warps,
        "num_stages": constants.num_stages,
        "enable_fp_fusion": True,
        "maxnreg": config.register_limit(constants.num_warps, launch.rescue, architecture),
    }
