"""PyTorch's own samples: near_rank gives matrix_rank's result, covariance that of torch.cov in float64."""

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
(COV,) = (info for info in op_db if info.name == "cov")
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


@pytest.mark.filterwarnings("ignore:cov")
@pytest.mark.parametrize("call", [bsgap.covariance, torch.ops.bsgap.covariance], ids=["wrapper", "op"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=_id)
def test_samples_of_cov(call: Callable[..., Tensor], dtype: torch.dtype) -> None:
    given = list(samples(COV, dtype))
    assert len(given) >= 40
    for X, options in given:
        aweights = options.get("aweights")
        exact = options if aweights is None else options | {"aweights": aweights.double()}
        right = torch.atleast_2d(torch.cov(X.double(), **exact))
        ours = call(torch.atleast_2d(X).mT, **options)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert torch.equal(ours, ours.mT) or ours.isnan().any()
        unit = torch.finfo(wide).eps
        torch.testing.assert_close(ours, right.to(wide), rtol=8 * unit, atol=64 * unit, equal_nan=True)


def test_samples_of_cov_in_other_dtypes_are_refused() -> None:
    for dtype in COV.dtypes - {torch.float64, torch.float32, *HALVES}:
        X, options = next(samples(COV, dtype))
        kind = "complex input" if dtype.is_complex else "must be float64, float32, bfloat16 or float16"
        with pytest.raises(TypeError, match=kind):
            bsgap.covariance(torch.atleast_2d(X).mT, **options)
