"""PyTorch's own samples of torch.linalg.matrix_rank, run through near_rank, give matrix_rank's result."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import bsgap_kernels as bsgap

with warnings.catch_warnings():  # of torch's own test helpers
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db

HALVES = (torch.bfloat16, torch.float16)
RANK = [info for info in op_db if info.name == "linalg.matrix_rank"]
RANK_CASES = [(info, dtype) for info in RANK for dtype in (*sorted(info.dtypes, key=str), *HALVES)]
LEAST_SAMPLES = {"": 72, "hermitian": 8}
"""Of torch 2.11; later versions may add some."""


def samples(info: Any, dtype: torch.dtype) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Inputs and keywords of an OpInfo. Torch has no 16-bit samples of what it cannot factor: casts, then."""
    torch.manual_seed(0)
    for sample in info.sample_inputs("cpu", torch.float32 if dtype in HALVES else dtype):
        assert not sample.args
        yield sample.input.to(dtype) if dtype in HALVES else sample.input, sample.kwargs


def _id(value: Any) -> str:
    return str(getattr(value, "variant_test_name", value)).removeprefix("torch.") or "plain"


@pytest.mark.filterwarnings("ignore:rtol is 1")
@pytest.mark.parametrize("call", [bsgap.near_rank, torch.ops.bsgap.near_rank], ids=["wrapper", "op"])
@pytest.mark.parametrize(("info", "dtype"), RANK_CASES, ids=_id)
def test_samples_of_matrix_rank(call: Callable[..., Tensor], info: Any, dtype: torch.dtype) -> None:
    given = list(samples(info, dtype))
    assert len(given) >= LEAST_SAMPLES[info.variant_test_name]
    for A, options in given:
        right = torch.linalg.matrix_rank(A.float() if dtype in HALVES else A, **options)
        ours = call(A, **options)
        assert ours.dtype == torch.int64
        assert ours.shape == right.shape, (A.shape, options)
        assert torch.equal(ours, right), (A, options)
