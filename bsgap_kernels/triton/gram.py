"""Gram matrices of many activation matrices at once on a GPU: from views to one flat float64 buffer."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from . import config
from .config import GramConfig, Precision
from .table import COLUMNS, MatrixView, flat, orient

TableOf = Callable[[list[int], torch.device], Tensor]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# The device assumed where kernels run in the interpreter on the CPU.
INTERPRETER_PROCESSORS = 4
INTERPRETER_ARCHITECTURE = 9

# Largest |binary exponent| of an entry of float64 input that is not scaled: squares then stay within
# [2^-400, 2^400] with room for 2^40 terms, the range in which nothing later over- or underflows.
UNSCALED_EXPONENT = 180
MAX_EXPONENT = 1000


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


@dataclass(frozen=True)
class GramPlan:
    """Everything the host knows before it launches: a pure function of views, precision and processors."""

    rows: list[dict[str, int]]  # table order
    launches: list[Launch]
    order: list[int]  # table row -> index of the view
    gram_elements: int
    partial_elements: int
    vector_elements: int
    stats_stride: int  # tiles along the diagonal of the largest matrix that needs a rescue, 0: none

    @property
    def matrices(self) -> int:
        """Matrices in all rows."""
        return sum(row["count"] for row in self.rows)


@dataclass(frozen=True)
class GramSet:
    """Gram matrices of a list of views, and what counting kernels need to know of them."""

    grams: Tensor  # float64, table row i's matrices from rows[i]["first_gram"] on
    table: Tensor  # int64 (rows, columns)
    sides: tuple[int, ...]  # of table rows
    batches: tuple[int, ...]  # matrices of table rows
    roundings: tuple[int, ...]  # of table rows; true for precision float64 only
    exponent: Tensor | None  # int32, caller's order: Gram matrices are those of 2^exponent A (float64 input)
    # float64, caller's order, from vector_offsets on: column sums of 2^exponent (A - shift)
    sums: Tensor | None
    vector_offsets: tuple[int, ...]  # of views: first element of the per-feature vectors in sums and shift
    plan: GramPlan

    def gram(self, view: int) -> Tensor:
        """The Gram matrices of one view, (count, k, k): a view into grams."""
        row = self.plan.rows[self.plan.order.index(view)]
        count, side, first = row["count"], row["side"], row["first_gram"]
        return self.grams[first : first + count * side * side].view(count, side, side)


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
    """Rows of the table and the launches that they need."""
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
        depth = config.gram_config(precision, itemsizes[i], tile, k[1], architecture).block_depth(tile)
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
                "pointer": view.tensor.data_ptr(),
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
    return GramPlan(rows, launches, order, grams, partials, vectors[-1], stats)


def processors_of(device: torch.device) -> tuple[int, int]:
    """Number of multiprocessors of the device, and its major compute capability."""
    if device.type != "cuda":
        return INTERPRETER_PROCESSORS, INTERPRETER_ARCHITECTURE
    properties = torch.cuda.get_device_properties(device)
    return int(properties.multi_processor_count), int(properties.major)


# Device tables by (device, stream, values): a training step asks for the same ones again and again. On one
# stream a table's memory is reused only after the kernels that read it.
_TABLES: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()
_TABLES_KEPT = 256


def device_table(values: list[int], device: torch.device) -> Tensor:
    """The values as int64 on the device, by a plain copy."""
    return torch.tensor(values, dtype=torch.int64).to(device)


def cached_table(values: list[int], device: torch.device, table_of: TableOf) -> Tensor:
    """The values' device table, from the cache unless a graph is being captured: it may outlive the cache."""
    if device.type != "cuda":
        return table_of(values, device)
    if torch.cuda.is_current_stream_capturing():
        return table_of(values, device)
    key = (device.index, torch.cuda.current_stream(device).cuda_stream, *values)
    table = _TABLES.get(key)
    if table is None:
        table = _TABLES[key] = table_of(values, device)
        if len(_TABLES) > _TABLES_KEPT:
            _TABLES.popitem(last=False)
    else:
        _TABLES.move_to_end(key)
    return table


def scaling_exponents(views: Sequence[MatrixView]) -> Tensor:
    """int32 exponents e, caller's order: 2^e brings the largest entry of an extreme matrix into [1/2, 1).

    0 for matrices that need none, and for zero and non-finite ones. No sync, no copy of the data.
    """
    largest = []
    for view in views:
        size = (view.count, view.row_outer, view.row_inner, view.n)
        stride = (view.stride_batch, view.stride_row_outer, view.stride_row_inner, view.stride_column)
        matrices = view.tensor.as_strided(size, stride)
        largest.append(torch.linalg.vector_norm(matrices, float("inf"), dim=(1, 2, 3)).to(torch.float64))
    values = torch.cat(largest)
    exponent = torch.frexp(values).exponent
    wanted = torch.isfinite(values) & (values > 0) & (exponent.abs() > UNSCALED_EXPONENT)
    return torch.where(wanted, (-exponent).clamp(-MAX_EXPONENT, MAX_EXPONENT), 0).to(torch.int32)


def gram_set(
    views: Sequence[MatrixView],
    *,
    precision: Precision,
    features_side: bool = False,
    shift: Literal["first_row"] | Tensor | None = None,
    table_of: TableOf = device_table,
    splits: int | None = None,
) -> GramSet:
    """Gram matrices of every view, on its device's current stream; does not synchronise.

    Each is of the smaller side, or of the features if `features_side`. precision "float32" sums products in
    float32 and adds 256 of them at a time in float64 (float64 input: float64 throughout); over- and underflow
    of float32 is redone in float64.
    shift (precision "float64"): a float64 vector over features that is subtracted from every observation, one
    for each matrix, back to back in the caller's order; "first_row" takes each matrix's first observation.
    Then `sums` holds the column sums of what is left, for matrices whose side is their features.
    views must not be empty. splits overrides the heuristic, for tests and benchmarks.
    """
    device = views[0].tensor.device
    scaled = any(view.tensor.dtype == torch.float64 for view in views)
    if precision == "float32" and scaled:
        raise ValueError("bsgap: float64 input needs precision 'float64'")
    if shift is not None and precision != "float64":
        raise ValueError("bsgap: a shift needs precision 'float64'")
    processors, architecture = processors_of(device)
    plan = gram_plan(
        views,
        precision=precision,
        features_side=features_side,
        sums=shift is not None,
        processors=processors,
        architecture=architecture,
        splits=splits,
    )
    table = cached_table(flat(plan.rows), device, table_of).view(len(plan.rows), len(COLUMNS))

    def buffer(elements: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(max(elements, 1), dtype=dtype, device=device)

    grams = buffer(plan.gram_elements)
    counters = torch.zeros(plan.partial_elements // 256 + 1, dtype=torch.int32, device=device)
    exponent = scaling_exponents(views) if scaled else None
    scale = buffer(1)
    if exponent is not None:
        scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent)
    sums = buffer(plan.vector_elements) if shift is not None else None
    buffers = {
        "table_ptr": table,
        "grams_ptr": grams,
        "partials_ptr": buffer(plan.partial_elements),
        "counters_ptr": counters,
        "stats_ptr": buffer(plan.matrices * plan.stats_stride),
        "shift_ptr": shift if isinstance(shift, Tensor) else grams,
        "sums_ptr": grams if sums is None else sums,
        "scale_ptr": scale,
    }
    mode = 0 if shift is None else 1 if isinstance(shift, Tensor) else 2
    _launch(plan, buffers, precision, mode, scaled, device)
    vectors = [0]
    for view in views:
        vectors.append(vectors[-1] + view.count * view.n)
    return GramSet(
        grams=grams,
        table=table,
        sides=tuple(row["side"] for row in plan.rows),
        batches=tuple(row["count"] for row in plan.rows),
        roundings=tuple(row["roundings"] for row in plan.rows),
        exponent=exponent,
        sums=sums,
        vector_offsets=tuple(vectors[:-1]),
        plan=plan,
    )


def launch_constants(launch: Launch, precision: Precision, shift: int, interpreted: bool) -> dict[str, Any]:
    """Compile-time constants of a launch, and its warps and stages."""
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
        "STATS": launch.stats,
        "SHIFT": shift,
        "SCALED": launch.dtype == torch.float64,
        "RESCUE": launch.rescue,
        # The interpreter's product of bfloat16 operands is wrong.
        "UPCAST": interpreted and launch.dtype == torch.bfloat16,
        "num_warps": constants.num_warps,
        "num_stages": constants.num_stages,
    }


def _launch(
    plan: GramPlan,
    buffers: dict[str, Tensor],
    precision: Precision,
    shift: int,
    scaled: bool,
    device: torch.device,
) -> None:
    from .gram_kernel import gram_kernel

    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for launch in plan.launches:
            gram_kernel[(launch.items,)](
                **buffers,
                rows=len(plan.rows),
                stats_stride=plan.stats_stride,
                **launch_constants(launch, precision, shift, interpreted),
            )
