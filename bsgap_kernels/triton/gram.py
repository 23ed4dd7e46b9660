"""Gram matrices of many activation matrices at once on a GPU: from views to one flat float64 buffer."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from . import config
from .config import Precision
from .plan import GramPlan, gram_plan, launch_constants
from .table import COLUMNS, MatrixView, flat

TableOf = Callable[[list[int], torch.device], Tensor]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# The device assumed where kernels run in the interpreter on the CPU.
INTERPRETER_PROCESSORS = 4
INTERPRETER_ARCHITECTURE = 9

# Largest |binary exponent| of an entry of float64 input that is not scaled: squares then stay within
# [2^-400, 2^400] with room for 2^40 terms, the range in which nothing later over- or underflows.
UNSCALED_EXPONENT = 180
MAX_EXPONENT = 1000

PREPARED_KEPT = 1024
"""Calls whose preparation is remembered."""


@dataclass(frozen=True)
class GramSet:
    """Gram matrices of a list of views, and what counting kernels need to know of them."""

    grams: Tensor  # float64, table row i's matrices from rows[i]["first_gram"] on
    table: Tensor  # int64 (rows, columns)
    exponent: Tensor | None  # int32, caller's order: Gram matrices are those of 2^exponent A (float64 input)
    # float64, caller's order, from plan.vector_offsets on: column sums of 2^exponent (A - shift)
    sums: Tensor | None
    plan: GramPlan

    def gram(self, view: int) -> Tensor:
        """The Gram matrices of one view, (count, k, k): a view into grams."""
        row = self.plan.rows[self.plan.order.index(view)]
        count, side, first = row["count"], row["side"], row["first_gram"]
        return self.grams[first : first + count * side * side].view(count, side, side)


def processors_of(device: torch.device) -> tuple[int, int]:
    """Number of multiprocessors of the device, and its major compute capability."""
    if device.type != "cuda":
        return INTERPRETER_PROCESSORS, INTERPRETER_ARCHITECTURE
    properties = torch.cuda.get_device_properties(device)
    return int(properties.multi_processor_count), int(properties.major)


def triton_version() -> tuple[int, int]:
    """Major and minor version of Triton."""
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def device_table(values: list[int], device: torch.device) -> Tensor:
    """The values as int64 on the device, by a plain copy."""
    return torch.tensor(values, dtype=torch.int64).to(device)


def current_stream(device: torch.device) -> int | None:
    """The device's current stream, or None where nothing may be kept between calls.

    What one stream keeps is read and reused in its order. A graph under capture needs memory of its own: it
    is replayed on any stream, at any time.
    """
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            return None
        return torch.cuda.current_stream().cuda_stream


@dataclass
class Prepared:
    """What equal calls share. Addresses count relative to the first, so a call on new memory is equal too."""

    plan: GramPlan
    constants: list[dict[str, Any]] = field(default_factory=list)  # of plan.launches
    _tables: dict[tuple[torch.device, int], Tensor] = field(default_factory=dict)

    def table(self, device: torch.device, table_of: TableOf) -> Tensor:
        """The plan's rows on the device; written there once a stream, once a capture."""
        stream = current_stream(device)
        table = None if stream is None else self._tables.get((device, stream))
        if table is None:
            table = table_of(flat(self.plan.rows), device).view(len(self.plan.rows), len(COLUMNS))
            if stream is not None:
                self._tables[device, stream] = table
        return table


_PREPARED: dict[tuple[Any, ...], Prepared] = {}


def prepared(key: tuple[Any, ...], prepare: Callable[[], Prepared]) -> Prepared:
    """The preparation under that key, made if it is not known."""
    found = _PREPARED.pop(key, None) or prepare()  # put back as the newest
    _PREPARED[key] = found
    while len(_PREPARED) > PREPARED_KEPT:
        _PREPARED.pop(next(iter(_PREPARED)), None)
    return found


# Counters of arrived splits, by device and stream: kernels leave them at zero.
_COUNTERS: dict[tuple[torch.device, int], Tensor] = {}


def _counters(number: int, device: torch.device) -> Tensor:
    stream = current_stream(device)
    if stream is None:
        return torch.zeros(number, dtype=torch.int32, device=device)
    counters = _COUNTERS.get((device, stream))
    if counters is None or counters.numel() < number:
        counters = _COUNTERS[device, stream] = torch.zeros(
            max(number, 4096), dtype=torch.int32, device=device
        )
    return counters


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


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float64, exactly (ldexp on a GPU goes through pow), for normal results."""
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


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
    device, origin = views[0].tensor.device, views[0].tensor.data_ptr()
    scaled = any(view.tensor.dtype == torch.float64 for view in views)
    if precision == "float32" and scaled:
        raise ValueError("bsgap: float64 input needs precision 'float64'")
    if shift is not None and precision != "float64":
        raise ValueError("bsgap: a shift needs precision 'float64'")
    shift_mode = 0 if shift is None else 1 if isinstance(shift, Tensor) else 2

    def prepare() -> Prepared:
        processors, architecture = processors_of(device)
        if device.type == "cuda":
            config.check_compiler(architecture, triton_version())
        plan = gram_plan(
            views,
            precision=precision,
            features_side=features_side,
            sums=shift is not None,
            processors=processors,
            architecture=architecture,
            splits=splits,
        )
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return Prepared(
            plan,
            [launch_constants(x, precision, shift_mode, interpreted, architecture) for x in plan.launches],
        )

    geometry = [(view.tensor.data_ptr() - origin, view.tensor.dtype, *view.geometry) for view in views]
    call = prepared((device, precision, features_side, shift_mode, splits, origin % 16, *geometry), prepare)
    plan = call.plan

    def buffer(elements: int) -> Tensor:
        return torch.empty(elements, dtype=torch.float64, device=device)

    grams = buffer(plan.gram_elements)  # stands in for what this call has no use of, too
    exponent = scaling_exponents(views) if scaled else None
    scale = grams
    if exponent is not None:
        scale = power_of_two(exponent)
    sums = buffer(plan.vector_elements) if shift is not None else None
    table = call.table(device, table_of)
    buffers = {
        "origin": origin,
        "table_ptr": table,
        "grams_ptr": grams,
        "partials_ptr": buffer(plan.partial_elements) if plan.partial_elements else grams,
        "counters_ptr": _counters(plan.partial_elements // 256 + 1, device),
        "stats_ptr": buffer(plan.matrices * plan.stats_stride) if plan.stats_stride else grams,
        "shift_ptr": shift if isinstance(shift, Tensor) else grams,
        "sums_ptr": grams if sums is None else sums,
        "scale_ptr": scale,
        "rows": len(plan.rows),
        "stats_stride": plan.stats_stride,
    }
    _launch(call, buffers, device)
    return GramSet(grams, table, exponent, sums, plan)


def _launch(call: Prepared, buffers: dict[str, Any], device: torch.device) -> None:
    from .gram_kernel import gram_kernel

    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for launch, constants in zip(call.plan.launches, call.constants, strict=True):
            gram_kernel[(launch.items,)](**buffers, **constants)
