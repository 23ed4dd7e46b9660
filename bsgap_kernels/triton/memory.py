"""Device memory that outlives the call that makes it: tables, counters, a tracker's sums."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def is_capturing(device: torch.device) -> bool:
    """Whether the device's current stream is recording a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def kept(device: torch.device, make: Callable[[], T]) -> T:
    """The result of `make`, which allocates on the device's current stream what is to be kept.

    While torch.compile(mode="reduce-overhead") warms up, all that the thread allocates comes from the pool of
    its graphs, without a capture: `_use_cuda_memory_pool_manager` of torch/_inductor/cudagraph_trees.py calls
    `_cuda_beginAllocateCurrentThreadToPool`. What is still alive there afterwards is an error or is
    overwritten. A pool of our own does not help: of nested ones the allocator takes the outermost
    (`captures_underway` of c10/cuda/CUDACachingAllocator.cpp). But it asks which thread allocates, and
    another one is not redirected. Under capture another thread may not allocate; what is made then is the
    graph's.
    """
    if device.type != "cuda" or is_capturing(device):
        return make()
    stream = torch.cuda.current_stream(device)

    def on_stream() -> T:
        with torch.cuda.stream(stream):
            return make()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(on_stream).result()


@functools.cache
def _fills(device_type: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("bsgap::_cuda_fill", device_type.upper())


def device_table(values: list[int], device: torch.device) -> Tensor:
    """int64 values on the device, written by a kernel that carries them as parameters: capturable."""
    if not _fills(device.type):
        return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)
    table = torch.empty(len(values), dtype=torch.int64, device=device)
    torch.ops.bsgap._cuda_fill(table, values)
    return table
