"""Gram matrices of many activation matrices at once on a GPU: from views to one flat float64 buffer."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from . import config
from .config import Precision
from .launch import Launch
from .memory import device_table, is_capturing, kept
from .plan import GramPlan, gram_plan, launch_constants
from .table import COLUMNS, MatrixView, Table

# The device assumed where kernels run in the interpreter on the CPU.
INTERPRETER_PROCESSORS = 4
INTERPRETER_ARCHITECTURE = 9

# Largest |binary exponent| of an entry of float64 input that is not scaled: squares then stay within
# [2^-400, 2^400] with room for 2^40 terms, the range in which nothing later over- or underflows.
UNSCALED_EXPONENT = 180
MAX_EXPONENT = 1000

PREPARED_KEPT = 1024
"""Calls whose preparation is remembered."""

ARGUMENTS = {
    "origin": "i64",
    "table_ptr": "*i64",
    "rows": "i32",
    "grams_ptr": "*fp64",
    "sums_ptr": "*fp64",
    "totals_ptr": "*fp64",
    "shift_ptr": "*fp64",
    "scale_ptr": "*fp64",
    "work_ptr": "*fp64",
    "counters_ptr": "*i32",
    "stats_stride": "i32",
    "fresh": "i32",
}
"""Types of the Gram kernel's arguments, in its order."""
_GRAMS = list(ARGUMENTS).index("grams_ptr")


@dataclass(frozen=True)
class GramSet:
    """Gram matrices of a list of views, and what counting kernels need to know of them."""

    grams: Tensor  # float64, table row i's matrices from rows[i]["first_gram"] on
    table: Tensor  # int64 (rows, columns)
    exponent: Tensor | None  # int32, caller's order: Gram matrices are those of 2^exponent A (float64 input)
    # float64, caller's order, from plan.vector_offsets on: column sums of 2^exponent (A - shift)
    sums: Tensor | None
    plan: Table

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


def current_stream(device: torch.device) -> int | None:
    """The device's current stream, or None where nothing may be kept between calls.

    What one stream keeps is read and reused in its order. A graph under capture needs memory of its own: it
    is replayed on any stream, at any time.
    """
    if device.type != "cuda" or is_capturing(device):
        return None
    return torch.cuda.current_stream(device).cuda_stream


_Place = tuple[torch.device, int]  # device and stream


def on_device(table: Table, device: torch.device, known: dict[_Place, Tensor]) -> Tensor:
    """The rows on the device; written there once a stream, once a capture."""
    stream = current_stream(device)

    def write() -> Tensor:
        return device_table(table.values, device).view(len(table.rows), len(COLUMNS))

    if stream is None:
        return write()
    found = known.get((device, stream))
    if found is None:
        found = known[device, stream] = kept(device, write)
    return found


_COUNTERS: dict[_Place, Tensor] = {}


def zero_counters(number: int, device: torch.device) -> Tensor:
    """Counters that are zero."""
    return torch.zeros(number, dtype=torch.int32, device=device)


def _counters(number: int, device: torch.device) -> Tensor:
    stream = current_stream(device)
    if stream is None:
        return zero_counters(number, device)
    counters = _COUNTERS.get((device, stream))
    if counters is None or counters.numel() < number:
        counters = kept(device, lambda: zero_counters(max(number, 4096), device))
        _COUNTERS[device, stream] = counters
    return counters


def counter_number(plan: GramPlan) -> int:
    """Counters that the launches of a plan use."""
    return plan.work_elements // 256 + 2


@dataclass
class Prepared:
    """What equal calls share. Addresses count relative to the first, so a call on new memory is equal too."""

    plan: GramPlan
    launches: list[Launch]
    tables: dict[_Place, Tensor] = field(default_factory=dict)

    def run(self, *arguments: Any, formed: Tensor | None = None) -> None:
        """Launch all. formed: where an earlier launch than the last puts Gram matrices, if elsewhere."""
        for launch in self.launches:
            if formed is not None and launch is not self.launches[-1]:
                launch(*arguments[:_GRAMS], formed, *arguments[_GRAMS + 1 :])
            else:
                launch(*arguments)


_PREPARED: dict[tuple[Any, ...], Any] = {}


def remembered(key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """What was made under that key before, or now."""
    found = _PREPARED.pop(key, None) or make()  # put back as the newest
    _PREPARED[key] = found
    while len(_PREPARED) > PREPARED_KEPT:
        _PREPARED.pop(next(iter(_PREPARED)), None)
    return found


def prepare(
    views: Sequence[MatrixView],
    *,
    precision: Precision,
    features_side: bool,
    shift: int = config.NO_SHIFT,
    sums: bool = False,
    splits: int | None = None,
    accumulate: bool = False,
) -> Prepared:
    """Plan and launches of a call; see `gram_set` and `config.Constants`."""
    from .gram_kernel import gram_kernel

    device = views[0].tensor.device
    processors, architecture = processors_of(device)
    if device.type == "cuda":
        config.check_compiler(architecture, triton_version())
    plan = gram_plan(
        views,
        precision=precision,
        features_side=features_side,
        sums=sums,
        processors=processors,
        architecture=architecture,
        splits=splits,
        accumulate=accumulate,
    )
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    launches = []
    for launch in plan.launches:
        constants, options = launch_constants(launch, precision, shift, sums, interpreted, architecture)
        launches.append(Launch(gram_kernel, launch.items, ARGUMENTS, {"C": constants}, options, device))
    return Prepared(plan, launches)


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
    splits: int | None = None,
) -> GramSet:
    """Gram matrices of every view, on its device's current stream; does not synchronise.

    Each is of the smaller side, or of the features if `features_side`. precision "float32" sums products in
    float32 and adds them in float64 every `GramConfig.chunk` depths (float64 input: float64 throughout);
    over- and underflow of float32 is redone in float64.
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
    mode = config.BY_VECTOR if isinstance(shift, Tensor) else config.BY_FIRST_ROW
    mode = config.NO_SHIFT if shift is None else mode

    geometry = [(view.tensor.data_ptr() - origin, view.tensor.dtype, *view.geometry) for view in views]
    call: Prepared = remembered(
        (device, precision, features_side, mode, splits, origin % 16, *geometry),
        lambda: prepare(
            views,
            precision=precision,
            features_side=features_side,
            shift=mode,
            sums=mode != config.NO_SHIFT,
            splits=splits,
        ),
    )
    plan = call.plan

    def buffer(elements: int) -> Tensor:
        return torch.empty(elements, dtype=torch.float64, device=device)

    grams = buffer(plan.gram_elements)  # stands in for what this call has no use of, too
    exponent = scaling_exponents(views) if scaled else None
    sums = buffer(plan.vector_elements) if shift is not None else None
    table = on_device(plan, device, call.tables)
    call.run(
        origin,
        table,
        len(plan.rows),
        grams,
        grams if sums is None else sums,
        grams,
        shift if isinstance(shift, Tensor) else grams,
        grams if exponent is None else power_of_two(exponent),
        buffer(plan.work_elements) if plan.work_elements else grams,
        _counters(counter_number(plan), device),
        plan.stats_stride,
        0,
    )
    return GramSet(grams, table, exponent, sums, plan)
