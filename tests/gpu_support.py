"""What the GPU tests share: the device, inputs of known near-rank, and the kernels that a call launched.

BSGAP_GPU_TEST_DEVICE=cpu runs the same tests on the CPU's engine, without those of streams, graphs and
kernels: whether they are right themselves shows without a GPU.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import pytest
import spectra
import torch
from tolerances import COUNT_MARGIN
from torch import Tensor

from bsgap_kernels.bench.cuda.clock import Clock

DEVICE = torch.device(os.environ.get("BSGAP_GPU_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
cuda_only = pytest.mark.skipif(not ON_GPU, reason="streams, graphs and kernels need a CUDA device")
SMALL_SIDE = 128
"""Sides up to here are counted by count_small_kernel."""
FOREIGN = ("syev", "gesv", "cusolver", "geqr", "sytr", "steqr", "stebz", "laed")
"""Parts of the names of cuSOLVER's kernels: no count of ours goes through them."""


@functools.lru_cache(maxsize=64)
def known(k: int, rtol: float) -> tuple[Tensor, int]:
    """A tall float64 matrix (3k + 5, k) on the CPU, and its number of singular values above rtol."""
    count = (k + 1) // 2
    return spectra.with_count(3 * k + 5, k, count, rtol, margin=COUNT_MARGIN, seed=k), count


def on_device(k: int, rtol: float, dtype: torch.dtype, *, wide: bool = False) -> tuple[Tensor, int]:
    """The matrix (or its transpose, contiguous) in a dtype on the device, and its near-rank."""
    A, count = known(k, rtol)
    return (A.mT.contiguous() if wide else A).to(DEVICE, dtype), count


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Gaussian entries, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def launched(call: Callable[[], object]) -> list[str]:
    """Names of the kernels of a call, after a first one that compiles; empty on the CPU."""
    call()
    return [row["name"] for row in Clock(DEVICE).kernels(call)]


def assert_ran(call: Callable[[], object], *, small: bool | None) -> None:
    """The Gram matrix came from our Triton kernel and the count from our counting kernel of that regime."""
    if not ON_GPU:
        return
    names = launched(call)
    assert any("gram" in name for name in names), names
    assert not [name for name in names if any(part in name.lower() for part in FOREIGN)]
    if small is not None:
        assert any("count_small_kernel" in name for name in names) == small, names
