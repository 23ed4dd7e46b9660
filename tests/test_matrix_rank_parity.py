"""near_rank where torch.linalg.matrix_rank stood: same defaults, batching, shapes, dtypes and counts."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import spectra
import torch
from torch import Tensor

import bsgap_kernels as bsgap

SHAPES = [(1, 1), (3, 3), (7, 4), (4, 7), (65, 65), (2, 5, 3), (3, 2, 6, 6), (2, 1, 4, 9)]
EMPTY = [(0, 3), (3, 0), (0, 0), (0, 3, 3), (2, 0, 4), (2, 4, 0), (2, 0, 3, 3)]
DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]


def low_rank(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    *batch, m, n = shape
    inner = max(1, min(m, n) - 1)
    left = torch.randn(*batch, m, inner, generator=generator, dtype=dtype)
    return left @ torch.randn(*batch, inner, n, generator=generator, dtype=dtype)


def assert_same(A: Tensor, **tolerances: float | Tensor) -> None:
    ours, theirs = bsgap.near_rank(A, **tolerances), torch.linalg.matrix_rank(A, **tolerances)
    assert ours.dtype == theirs.dtype == torch.int64
    assert ours.shape == theirs.shape
    assert torch.equal(ours, theirs), (ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_defaults_on_full_and_deficient_rank(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for seed in range(3):
        full = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        for A in (full, low_rank(shape, dtype, seed), torch.zeros(shape, dtype=dtype), full.mT):
            assert_same(A)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", EMPTY)
def test_empty(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    A = torch.empty(shape, dtype=dtype)
    assert_same(A)
    assert_same(A, atol=1.0)
    assert_same(A, rtol=torch.tensor(0.1))


@pytest.mark.parametrize(
    ("atol", "rtol"), list(itertools.product((None, 0.0, 0.3, 1e6), (None, 0.0, 0.05, 0.5)))
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_float_tolerances(dtype: torch.dtype, atol: float | None, rtol: float | None) -> None:
    tolerances = {k: v for k, v in (("atol", atol), ("rtol", rtol)) if v is not None}
    for shape in SHAPES:
        A = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=dtype)
        if tolerances.get("atol", 1.0) == 0.0 and not tolerances.get("rtol"):
            A = A + 10 * torch.eye(*shape[-2:], dtype=dtype)  # away from rounding noise at tau = 0
        assert_same(A, **tolerances)


def test_tensor_tolerances_broadcast_like_matrix_rank() -> None:
    A = torch.randn(3, 2, 6, 4, generator=torch.Generator().manual_seed(2))
    for shape in [(), (1,), (2,), (3, 1), (3, 2)]:
        values = torch.rand(shape, generator=torch.Generator().manual_seed(3)) * 2
        assert_same(A, atol=values)
        assert_same(A, rtol=values / 4)
        assert_same(A, atol=values, rtol=values / 4)
    single = A[0, 0]
    assert_same(single, atol=torch.tensor([1e-3, 1.0, 100.0]))  # more thresholds than matrices
    assert_same(single, atol=torch.tensor([0.0, 1.0]))  # rtol's default only where atol is 0
    with pytest.raises(ValueError, match="atol of shape"):
        bsgap.near_rank(A, atol=torch.ones(4))


def test_numpy_style_examples() -> None:
    eye = torch.eye(10)
    assert_same(eye)
    eye[-1, -1] = 0
    assert_same(eye)
    assert_same(torch.ones(4, 4))
    assert_same(torch.zeros(4, 4), atol=0.5)
    assert_same(torch.diag(torch.tensor([1.0, 1e-3, 1e-5, 0.0])), rtol=1e-4)
    assert bsgap.near_rank(torch.eye(3), rtol=2e-2).item() == torch.linalg.matrix_rank(
        torch.eye(3), rtol=2e-2
    )


def test_tolerance_of_a_different_kind_mixes() -> None:
    # matrix_rank refuses a number beside a tensor; here the number is one threshold for all.
    A = torch.diag(torch.tensor([4.0, 2.0, 1.0]))
    assert bsgap.near_rank(A, atol=torch.tensor([0.5, 1.5]), rtol=0.3).tolist() == [2, 2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_graded_spectra_at_the_default_tolerance(dtype: torch.dtype) -> None:
    # Singular values down to the last digit of the dtype: the path must resolve its own default.
    for m, n in [(40, 30), (30, 40), (200, 100)]:
        default = torch.finfo(dtype).eps * max(m, n)
        k = min(m, n)
        sigma = spectra.geometric(k, default**2).to(dtype.to_real())  # half of them below the tolerance
        A = spectra.signed_permutation_spectrum(sigma.double(), m, n, dtype=dtype, seed=m)
        assert_same(A)
        assert bsgap.near_rank(A).item() == (sigma > default).sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_formats_take_float32_defaults(dtype: torch.dtype) -> None:
    A = torch.randn(300, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert bsgap.near_rank(A).item() == torch.linalg.matrix_rank(A.float()).item() == 40


@pytest.mark.parametrize("call", [bsgap.near_rank, torch.ops.bsgap.near_rank], ids=["wrapper", "op"])
def test_tol_is_an_absolute_threshold(call: Callable[..., Tensor]) -> None:
    A = 3 * torch.randn(3, 2, 6, 4, generator=torch.Generator().manual_seed(4))
    tensors = [torch.tensor(2.0), torch.tensor([1, 9]), torch.rand(3, 1) * 9, torch.rand(2, 3, 2) * 9]
    for tol in (0.5, 7.0, 2, *tensors):
        right = torch.linalg.matrix_rank(A, tol)
        assert torch.equal(call(A, tol), right)
        assert torch.equal(call(A, tol=tol), right)


@pytest.mark.parametrize("call", [bsgap.near_rank, torch.ops.bsgap.near_rank], ids=["wrapper", "op"])
def test_out_is_filled_and_returned(call: Callable[..., Tensor]) -> None:
    A = low_rank((3, 6, 4), torch.float32, 0)
    limits = torch.rand(2, 3, generator=torch.Generator().manual_seed(1)) * 4
    for options in ({}, {"rtol": 0.3}, {"tol": 1.5}, {"tol": limits}, {"atol": limits}):
        right = torch.linalg.matrix_rank(A, **options)
        for dtype in (torch.int64, torch.int8, torch.float32, torch.complex64):
            out = torch.empty(right.shape, dtype=dtype)
            assert call(A, **options, out=out) is out
            assert torch.equal(out, right.to(dtype))
        strided = torch.full((*right.shape, 2), 77)
        call(A, **options, out=strided[..., 0])
        assert torch.equal(strided[..., 0], right)
        assert (strided[..., 1] == 77).all()
        empty = torch.empty(0, dtype=torch.int64)
        assert torch.equal(call(A, **options, out=empty), right)
        with pytest.warns(UserWarning, match="An output with one or more elements was resized"):
            assert call(A, **options, out=torch.empty(5, dtype=torch.int64)).shape == right.shape
