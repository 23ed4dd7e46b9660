"""What the host decides before it launches the Gram kernel: table rows, launches, compile-time constants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import config
from .config import Constants, GramConfig, Precision
from .table import MatrixView, Table, orient


@dataclass(frozen=True)
class PlannedLaunch:
    """One kernel launch: which rows it serves, and with what constants."""

    group: int
    dtype: torch.dtype
    items: int
    codes: int
    multi: bool  # some matrix has several tiles
    config: GramConfig
    stats: bool  # diagonal tiles store their squares, which a rescue reads
    rescue: bool
    accumulate: bool = False  # adds to a site's sums
    hops: int = 1  # steps of `outer` in a block of depth

    @property
    def kernel(self) -> str:
        """The kernel, as the table of what is proven without a GPU names it."""
        return "gram_kernel" + ", rescue" * self.rescue + ", a site's sums" * self.accumulate


@dataclass(frozen=True, eq=False)
class GramPlan(Table):
    """Everything the host knows before it launches: a pure function of views, precision and processors."""

    launches: list[PlannedLaunch]
    gram_elements: int  # 0: they are added to a site's
    work_elements: int  # what splits and launches leave for each other
    vector_offsets: list[int]  # of views: first element of the per-feature vectors in sums and shift
    vector_elements: int
    stats_stride: int  # tiles along the diagonal of the largest matrix that needs a rescue, 0: none


def gram_plan(
    views: Sequence[MatrixView],
    *,
    precision: Precision,
    features_side: bool,
    sums: bool,
    processors: int,
    architecture: int,
    splits: int | None = None,
    accumulate: bool = False,
) -> GramPlan:
    """Rows of the table, their addresses relative to the first view's, and the launches that they need.

    accumulate: the one matrix of the one view is added to a site's sums, by the last launch.
    """
    assert not accumulate or (len(views) == 1 and views[0].count == 1)
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
    # Before the partial tiles stand the squares of a matrix's diagonal tiles, and of a site's their traces.
    stats = max((-(-oriented[i].side // choices[i][0]) for i in order if key(i)[1]), default=0)
    partials = stats * sum(view.count for view in views)
    if accumulate:
        partials += -(-oriented[0].side // min(choices[0][0], 64))
    partials = -(-partials // 256) * 256
    depths = [
        config.gram_config(precision, size, tile, key(i)[1], architecture).block_depth(tile, layout)
        for i, (size, (tile, layout)) in enumerate(zip(itemsizes, choices, strict=True))
    ]
    # A launch's blocks are alike.
    hops_of = {
        k: min(config.hop_count(oriented[i], choices[i][1], depths[i]) for i in members)
        for k, members in groups.items()
    }
    matrices = grams = 0
    for i in order:
        view, o, k = views[i], oriented[i], key(i)
        tile, layout = choices[i]
        depth = depths[i]
        blocks = config.block_count(o, layout, depth, hops_of[k])
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
    for k, members in groups.items():
        dtype, big, _ = k
        largest = max(choices[i][0] for i in members)
        launch = PlannedLaunch(
            group=group_of[k],
            dtype=dtype,
            items=items[k],
            codes=codes[k],
            multi=any(oriented[i].side > choices[i][0] for i in members),
            config=config.gram_config(precision, itemsizes[members[0]], largest, big, architecture),
            stats=big,
            rescue=False,
            accumulate=accumulate and not big,
            hops=hops_of[k],
        )
        launches.append(launch)
        if big:
            rescue = config.rescue_config(launch.config)
            launches.append(replace(launch, config=rescue, stats=False, rescue=True, accumulate=accumulate))
    if accumulate:
        # What a rescue may have to replace is formed apart first.
        rows[0]["first_gram"] = partials
        partials, grams = partials + (grams if stats else 0), 0
    return GramPlan(rows, order, launches, grams, partials, vectors[:-1], vectors[-1], stats)


def launch_constants(
    launch: PlannedLaunch, precision: Precision, shift: int, sums: bool, interpreted: bool, architecture: int
) -> tuple[Constants, dict[str, Any]]:
    """Compile-time constants of a launch, and the compiler's options."""
    import triton.language as tl

    dtype = {
        torch.float64: tl.float64,
        torch.float32: tl.float32,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
    }[launch.dtype]
    own, half = launch.config, launch.dtype.itemsize == 2
    constants = Constants(
        group=launch.group,
        codes=launch.codes,
        dtype=dtype,
        precision=64 if precision == "float64" else 32,
        dot=own.dot,
        chunk=own.chunk,
        elements=own.elements,
        max_depth=own.max_depth,
        elementwise=own.elementwise,
        hops=launch.hops,
        multi=launch.multi,
        stats=launch.stats,
        rescue=launch.rescue,
        accumulate=launch.accumulate,
        shift=shift,
        sums=sums,
        # A site's sums are not: what over- or underflows unscaled does so in them.
        scaled=launch.dtype == torch.float64 and not launch.accumulate,
        # The interpreter's product of bfloat16 operands is wrong.
        upcast=interpreted and launch.dtype == torch.bfloat16,
        warpgroup=half and architecture in (9, 10),
        slices=own.num_warps if half and precision == "float32" else 1,
        slice=config.REDUCE_SLICE * own.num_warps,
    )
    options = {
        "num_warps": own.num_warps,
        "num_stages": own.num_stages,
        "enable_fp_fusion": True,
        "maxnreg": config.register_limit(own.num_warps, launch.rescue, architecture),
    }
    return constants, options
