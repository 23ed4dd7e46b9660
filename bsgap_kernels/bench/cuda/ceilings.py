"""What this device reaches: bandwidth and matmul rates, measured before anything is compared with them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from .clock import Clock

REPEATS = 7
GPU_BYTES = 2 << 30
GPU_SIDE = 8192


def measure_ceilings(clock: Clock, *, size: int = GPU_BYTES, side: int = GPU_SIDE) -> dict[str, Any]:
    """Bytes per second (copy: read and write counted; read: best of two reductions) and FLOP/s of matmuls.

    A ceiling that cannot be measured is None, with its reason beside it.
    """
    found: dict[str, Any] = {"bytes": size, "side": side}

    def record(name: str, amount: float, build: Callable[[], Callable[[], object]]) -> None:
        try:
            call = build()
            call()
            samples = [clock.seconds(call) for _ in range(REPEATS)]
            rate = amount / statistics.median(samples)
            found[name] = max(rate, found.get(name) or 0.0)
        except RuntimeError as error:
            found[name] = found.get(name)
            found[f"{name}_error"] = str(error).splitlines()[0]

    def copy() -> Callable[[], object]:
        source = torch.zeros(size // 4, device=clock.device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def reduction(name: str) -> Callable[[], Callable[[], object]]:
        def build() -> Callable[[], object]:
            source = torch.zeros(size // 4, device=clock.device)
            return lambda: getattr(torch, name)(source)

        return build

    record("copy_bytes_per_s", 2.0 * size, copy)
    for name in ("sum", "amax"):
        record("read_bytes_per_s", float(size), reduction(name))
    for name, dtype, tf32 in (
        ("bf16_flops", torch.bfloat16, False),
        ("tf32_flops", torch.float32, True),
        ("fp32_flops", torch.float32, False),
        ("fp64_flops", torch.float64, False),
    ):
        record(name, 2.0 * side**3, _matmul(clock.device, dtype, side, tf32))
    return found


def _matmul(
    device: torch.device, dtype: torch.dtype, side: int, tf32: bool
) -> Callable[[], Callable[[], object]]:
    def build() -> Callable[[], object]:
        # Random values: constant ones draw less power, and the clocks would be higher than in use.
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)

        def call() -> None:
            before = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = tf32
            try:
                torch.mm(a, b, out=out)
            finally:
                torch.backends.cuda.matmul.allow_tf32 = before

        return call

    return build


def gpu_description(device: torch.device) -> dict[str, Any]:
    """What a figure of a GPU has to be read with, beside machine.describe()."""
    if device.type != "cuda":
        return {"gpu": None}
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "sms": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
    }
