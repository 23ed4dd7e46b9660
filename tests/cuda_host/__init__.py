"""The CUDA kernels of csrc/cuda on the CPU, from their own source: tensors in, tensors out, no GPU.

``count_grams``, ``summaries`` and ``fill_table`` take CPU tensors and do what the private ops
``_cuda_counts``, ``_cuda_summaries`` and ``_cuda_fill`` do on a GPU; ``launches`` says which kernels ran,
with grid and memory.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import proven
import torch
from torch import Tensor

from cuda_host import build

COMPILER = build.COMPILER
SUMMARY_COLUMNS = 10


@dataclass(frozen=True)
class Launch:
    """One kernel launch as the host code asked for it."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    """Bytes of dynamic shared memory."""


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels with CUDA threads as fibers."""
    lib = ctypes.CDLL(str(build.build("kernels.cpp", "fibers")))
    lib.bsgap_last_error.restype = ctypes.c_char_p
    lib.bsgap_launch_log_size.restype = ctypes.c_int64
    lib.bsgap_launch_log_clear.restype = None
    lib.bsgap_launch_log_entry.restype = None
    return lib


def clear_launches() -> None:
    """Forgets the launches so far."""
    library().bsgap_launch_log_clear()


def launches(first: int = 0) -> list[Launch]:
    """Kernel launches since ``clear_launches``, in order, but for the first ones."""
    lib = library()
    result = []
    for index in range(first, lib.bsgap_launch_log_size()):
        name, numbers = ctypes.create_string_buffer(256), (ctypes.c_int64 * 5)()
        lib.bsgap_launch_log_entry(ctypes.c_int64(index), name, ctypes.c_int64(256), numbers)
        x, y, z, threads, shared = numbers
        result.append(Launch(name.value.decode(), (x, y, z), threads, shared))
    return result


def invalid_operations() -> bool:
    """Whether the last count computed with memory that nobody had written, which holds signalling NaN."""
    return bool(library().bsgap_invalid_operations())


def _pointer(tensor: Tensor | None, dtype: torch.dtype) -> ctypes.c_void_p:
    """Address of the data, null for no tensor; an error for what is no contiguous CPU tensor of the type."""
    if tensor is None:
        return ctypes.c_void_p(None)
    if tensor.dtype != dtype or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise TypeError(f"expected a contiguous {dtype} CPU tensor, got {tensor.dtype} {tensor.stride()}")
    return ctypes.c_void_p(tensor.data_ptr())


def _integers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * max(1, len(values)))(*values)


def _run(function: str, *arguments: object, sides: Sequence[int] = (), matrices: int = 0) -> None:
    """Calls the library, raises its error, and notes the kernels that it launched."""
    lib = library()
    before = lib.bsgap_launch_log_size()
    if getattr(lib, function)(*arguments) != 0:
        raise RuntimeError(lib.bsgap_last_error().decode())
    facts: dict[str, int | tuple[int, int]] = {}
    if sides:
        facts = {"sides": (min(sides), max(sides)), "matrices": matrices}
    for launch in launches(before):
        blocks = launch.grid[0] * launch.grid[1] * launch.grid[2]
        proven.note(launch.kernel, proven.HOST, blocks=blocks, threads=launch.threads, **facts)


def count_grams(
    grams: Tensor,
    table: Tensor,
    sides: Sequence[int],
    batches: Sequence[int],
    thresholds: Tensor | None,
    atol: float,
    rtol: float,
    exponent: Tensor | None,
    gram_error: Tensor | None,
    certify: bool,
    spectrum: bool,
    moments: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Counts, lower, upper (N, t), eigenvalues (flat) and moments (N, 3), as ``_cuda_counts`` returns."""
    matrices, count = sum(batches), 1 if thresholds is None else thresholds.shape[1]
    if thresholds is not None and thresholds.shape not in {(1, count, 2), (matrices, count, 2)}:
        raise ValueError(f"thresholds {tuple(thresholds.shape)} do not match {matrices} matrices")
    shape = (matrices, count)
    # Filled, so that what no kernel wrote is seen.
    counts = torch.full(shape, -77, dtype=torch.int64)
    lower, upper = (torch.full(shape if certify else (0, count), -77, dtype=torch.int64) for _ in range(2))
    total = sum(s * b for s, b in zip(sides, batches, strict=True)) if spectrum else 0
    eigenvalues = torch.full((total,), -77.0, dtype=torch.float64)
    traces = torch.full((matrices if moments else 0, 3), -77.0, dtype=torch.float64)
    _run(
        "bsgap_count_grams",
        _pointer(grams, torch.float64),
        _pointer(table, torch.int64),
        ctypes.c_int64(len(sides)),
        _integers(sides),
        _integers(batches),
        _pointer(thresholds, torch.float64),
        ctypes.c_int(thresholds is None or thresholds.shape[0] == 1),
        ctypes.c_int64(count),
        ctypes.c_double(atol),
        ctypes.c_double(rtol),
        _pointer(exponent, torch.int32),
        _pointer(gram_error, torch.float64),
        ctypes.c_int(certify),
        ctypes.c_int(spectrum),
        _pointer(counts, torch.int64),
        _pointer(lower, torch.int64),
        _pointer(upper, torch.int64),
        _pointer(eigenvalues, torch.float64),
        _pointer(traces if moments else None, torch.float64),
        sides=sides,
        matrices=matrices,
    )
    return counts, lower, upper, eigenvalues, traces


def summaries(
    eigenvalues: Tensor, table: Tensor, sides: Sequence[int], batches: Sequence[int], exponent: Tensor | None
) -> Tensor:
    """The summary (N, columns), as ``_cuda_summaries`` returns it."""
    matrices = sum(batches)
    summary = torch.full((matrices, SUMMARY_COLUMNS), -77.0, dtype=torch.float64)
    _run(
        "bsgap_summaries",
        _pointer(eigenvalues, torch.float64),
        _pointer(table, torch.int64),
        ctypes.c_int64(len(sides)),
        _integers(batches),
        _pointer(exponent, torch.int32),
        _pointer(summary, torch.float64),
        sides=sides,
        matrices=matrices,
    )
    return summary


def fill_table(values: Sequence[int]) -> Tensor:
    """An int64 tensor of the values, as ``_cuda_fill`` writes it."""
    out = torch.full((len(values),), -77, dtype=torch.int64)
    _run("bsgap_fill_table", _pointer(out, torch.int64), _integers(values), ctypes.c_int64(len(values)))
    return out


def inertia(G: Tensor, shift: float) -> tuple[int, bool, float]:
    """Positive pivots of G - shift I of up to 128 rows, whether that is known, and the bound of its error."""
    out = torch.full((3,), -77.0, dtype=torch.float64)
    n, value = ctypes.c_int(G.shape[0]), ctypes.c_double(shift)
    _run("bsgap_inertia", _pointer(G, torch.float64), n, value, _pointer(out, torch.float64))
    return int(out[0]), bool(out[1]), float(out[2])


def factorisation(index: int) -> list[float]:
    """Shift, factorisation, shift and underflow error, positive pivots and whether one was replaced.

    Of the first matrix of the last count, which had more than 128 rows.
    """
    out = torch.full((6,), -77.0, dtype=torch.float64)
    _run("bsgap_factorisation", ctypes.c_int64(index), _pointer(out, torch.float64))
    found: list[float] = out.tolist()
    return found


def gram_error(trace: float, side: int, depth: int, roundings: int, exponent: int = 0) -> float:
    """The bound of the error of a computed Gram matrix of that trace."""
    out = torch.full((1,), -77.0, dtype=torch.float64)
    sizes = [ctypes.c_int64(value) for value in (side, depth, roundings)]
    pointer = _pointer(out, torch.float64)
    _run("bsgap_gram_error", ctypes.c_double(trace), *sizes, ctypes.c_int(exponent), pointer)
    return float(out[0])


def largest_eigenvalue(G: Tensor, proposal: float) -> tuple[float, float]:
    """Certified bounds of the largest eigenvalue of a matrix of 33 to 128 rows, from a proposal for it."""
    out = torch.full((2,), -77.0, dtype=torch.float64)
    n, value = ctypes.c_int(G.shape[0]), ctypes.c_double(proposal)
    _run("bsgap_largest_eigenvalue", _pointer(G, torch.float64), n, value, _pointer(out, torch.float64))
    return float(out[0]), float(out[1])
