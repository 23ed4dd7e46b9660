"""Rates of this processor, measured before all else: multiply-adds, reading, the products of the peers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch

from .. import _core
from .machine import OtherWork
from .measure import last_level_cache_bytes

REPEATS = 5
SECONDS = 0.2
"""Of one repeat of one measurement; six seconds in all."""
LEAST_BYTES, MOST_BYTES = 1 << 30, 2 << 30
GEMM_SIDE = 1024
CACHES = 4
"""Memory that is read, as a multiple of the last-level cache, within the two limits."""


def measure_ceilings(*, seconds: float = SECONDS, size: int | None = None) -> dict[str, Any]:
    """FLOP/s (a multiply-add counts as two) and read bytes per second: one thread alone, and all of torch's.

    Threads measure at the same time, in the instruction set that the kernels use; best of five repeats.
    `size` is the memory that is read, in bytes. `gemm_flops`: float32 products of
    torch and NumPy, all threads.
    """
    threads = torch.get_num_threads()
    if size is None:
        size = min(max(CACHES * last_level_cache_bytes(), LEAST_BYTES), MOST_BYTES)
    others = OtherWork()
    memory = np.ones(size // 4, np.float32)  # written, so that every page is there
    found: dict[str, Any] = {"threads": threads, "bytes": memory.nbytes}
    for name, dtype in (("fp32_flops", "float32"), ("fp64_flops", "float64")):
        found[name] = multiply_add_rate(dtype, threads, seconds)
        found[f"{name}_per_core"] = multiply_add_rate(dtype, 1, seconds)
    parts = np.array_split(memory, threads)
    found["read_bytes_per_s"] = _together([partial(_core.read_rate, part, seconds) for part in parts])
    found["read_bytes_per_s_per_core"] = _together([partial(_core.read_rate, memory, seconds)])
    A = torch.ones(GEMM_SIDE, GEMM_SIDE)
    a = A.numpy()
    # Two operands: of one array and its transpose NumPy forms half of the products.
    b = a.copy()
    found["gemm_flops"] = {"torch": _gemm_rate(lambda: A @ A), "numpy": _gemm_rate(lambda: a @ b)}
    return {**found, "other_work": others.share()}


def _gemm_rate(product: Callable[[], object]) -> float:
    product()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        product()
        times.append(time.perf_counter() - start)
    return 2 * GEMM_SIDE**3 / min(times)


def multiply_add_rate(dtype: str, threads: int, seconds: float = SECONDS) -> float:
    """FLOP/s of so many threads in registers, in "float32" or "float64"; the best of five repeats."""
    return _together([partial(_core.fma_rate, dtype, seconds)] * threads)


def _together(rates: list[Callable[[], float]]) -> float:
    """Sum of rates measured at the same time, one thread each; the best of the repeats."""
    barrier = threading.Barrier(len(rates))

    def started_together(rate: Callable[[], float]) -> float:
        barrier.wait()
        return rate()

    with ThreadPoolExecutor(len(rates)) as pool:
        return max(sum(pool.map(started_together, rates)) for _ in range(REPEATS))
