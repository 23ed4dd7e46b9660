"""The private ops of CUDA in an installation without the CUDA C++ kernels; test_virtual_gpu.py runs it."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator

import pytest
import spectra
import torch

import bsgap_kernels as bsgap
from bsgap_kernels import _native
from bsgap_kernels.dispatch import select_backend

pytestmark = pytest.mark.skipif(
    os.environ.get("BSGAP_VIRTUAL_GPU") != "1", reason="runs in the process of test_virtual_gpu.py"
)


@pytest.fixture(autouse=True)
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_native, "CUDA_LIBRARY_PATH", None)
    _native.has_cuda_kernels.cache_clear()
    select_backend.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield
    _native.has_cuda_kernels.cache_clear()
    select_backend.cache_clear()
    assert ["without nvcc" in str(warning.message) for warning in said].count(True) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_are_right(dtype: torch.dtype) -> None:
    A = spectra.with_count(90, 20, 12, 1e-2, margin=0.1, seed=1).to(dtype)
    bad = A.clone()
    bad[0, 0] = math.nan
    assert bsgap.near_rank(torch.stack([A, bad, 0 * A]), rtol=1e-2).tolist() == [12, -1, 0]
    assert bsgap.near_rank_grouped([A, A.mT.contiguous()], rtol=1e-2).tolist() == [12, 12]
    counts = bsgap.singular_value_counts(A, torch.tensor([1e-2, 2.0], dtype=torch.float64))
    assert counts.tolist() == [12, 0]


def test_bounds_and_summaries_are_those_of_the_cpu() -> None:
    A = spectra.with_count(90, 20, 12, 1e-2, margin=0.1, seed=1)
    assert [int(x) for x in bsgap.near_rank_interval(A, rtol=1e-2)] == [12, 12]
    assert bool(bsgap.spectral_summary(A).isfinite().all())
