"""Device time by events, graph replays, host time to return, and the kernels of a call."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")
FLUSH_BYTES = 256 << 20
"""Least size of the buffer that is overwritten before a sample; twice the L2 cache where that is more."""
CAPTURE_WARM_UPS = 2
PROFILED_CALLS = 3
KERNELS_KEPT = 16


class Clock:
    """Times calls on one device; on a CPU by the host's clock, without flush, graphs and kernels."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self._buffer: torch.Tensor | None = None
        if self.on_gpu:
            l2 = torch.cuda.get_device_properties(device).L2_cache_size
            self._buffer = torch.empty(max(FLUSH_BYTES, 2 * l2), dtype=torch.int8, device=device)

    def synchronize(self) -> None:
        """Waits until the device is idle."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def flush(self) -> None:
        """Overwrites the L2 cache, so that a sample reads its input from memory."""
        if self._buffer is not None:
            self._buffer.zero_()

    def seconds(self, call: Callable[[], object]) -> float:
        """From the launch on an idle device to the last kernel's end; launching is part of it."""
        if not self.on_gpu:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        self.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def host_seconds(self, call: Callable[[], object]) -> float:
        """Until the call returns, on an idle device: what the training loop waits."""
        self.synchronize()
        start = time.perf_counter()
        call()
        spent = time.perf_counter() - start
        self.synchronize()
        return spent

    def captured(self, call: Callable[[], T]) -> Callable[[], T] | None:
        """The call as a CUDA graph: a function that replays it and returns its (static) result."""
        if not self.on_gpu:
            return None
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(CAPTURE_WARM_UPS):
                call()
        torch.cuda.current_stream(self.device).wait_stream(side)
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()

        def replay() -> T:
            graph.replay()
            return result

        return replay

    def kernels(self, call: Callable[[], object]) -> list[dict[str, Any]]:
        """Kernels of one call, the longest first: name, launches a call, microseconds a call; L2 as it is."""
        if not self.on_gpu:
            return []
        activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        self.synchronize()
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(PROFILED_CALLS):
                call()
            self.synchronize()
        number: dict[str, int] = defaultdict(int)
        spent: dict[str, float] = defaultdict(float)
        for event in profiler.events():
            if str(event.device_type).endswith("CUDA"):
                number[event.name] += 1
                spent[event.name] += event.time_range.elapsed_us()
        rows = [
            {
                "name": name[:80],
                "launches": round(number[name] / PROFILED_CALLS, 2),
                "us": round(spent[name] / PROFILED_CALLS, 2),
            }
            for name in number
        ]
        return sorted(rows, key=lambda row: -float(row["us"]))


def launches(kernels: list[dict[str, Any]]) -> float:
    """Kernel launches a call; copies and fills by the driver are none."""
    return sum(row["launches"] for row in kernels if not row["name"].startswith(("Memcpy", "Memset")))
