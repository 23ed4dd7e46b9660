"""Every public op on CUDA against its oracle: all regimes of k, dtypes, layouts, extremes, gradients.

Capture, streams, compilation and synchronisation are in test_gpu_runtime.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from gpu_support import DEVICE, ON_GPU, SMALL_SIDE, assert_ran, on_device, random
from tolerances import metric_rtol, sum_rtol
from torch import Tensor

import bsgap_kernels as bsgap
from bsgap_kernels import reference
from bsgap_kernels.dispatch import select_backend

pytestmark = pytest.mark.gpu
SIDES = [1, 5, 16, 17, 32, 33, 64, 100, 128, 129, 200, 512, 700, 1100]
# Rounding to 16 bits fills the spectrum below its own precision, so halves take a high threshold.
PRECISIONS = [
    (torch.bfloat16, 0.3),
    (torch.float16, 0.3),
    (torch.float32, 1e-2),
    (torch.float32, 1e-4),
    (torch.float64, 1e-2),
    (torch.float64, 1e-4),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def equal(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found.cpu(), expected.cpu())


# Counts


@pytest.mark.parametrize("wide", [False, True], ids=["tall", "wide"])
@pytest.mark.parametrize(("dtype", "rtol"), PRECISIONS, ids=lambda v: str(v).removeprefix("torch."))
@pytest.mark.parametrize("k", SIDES)
def test_counts_in_every_regime(k: int, dtype: torch.dtype, rtol: float, wide: bool) -> None:
    A, count = on_device(k, rtol, dtype, wide=wide)
    if k <= 200:
        assert int(reference.near_rank(A.cpu(), rtol=rtol)) == count
    found = bsgap.near_rank(A, rtol=rtol)
    assert (found.device.type, found.dtype, found.shape) == (DEVICE.type, torch.int64, ())
    assert int(found) == count
    assert float(bsgap.near_rank_ratio(A, rtol=rtol)) == count / k
    for mode in ("rigorous", "probed"):
        lower, upper = bsgap.near_rank_interval(A, rtol=rtol, mode=mode)
        assert int(lower) <= count <= int(upper)
        if mode == "rigorous" and rtol >= 1e-2:
            assert int(lower) == int(upper)


@pytest.mark.parametrize("k", [17, 128, 129, 700])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_our_kernels_ran(k: int, dtype: torch.dtype) -> None:
    A, _ = on_device(k, 0.3, dtype)
    small = k <= SMALL_SIDE
    plan = select_backend("near_rank", dtype, *A.shape, rtol=0.3, device="cuda")
    assert plan.count == "kernels"
    assert_ran(lambda: bsgap.near_rank(A, rtol=0.3), small=small)
    assert_ran(lambda: bsgap.near_rank_grouped([A], rtol=0.3), small=small)
    assert_ran(lambda: bsgap.near_rank_interval(A, rtol=0.3), small=None)
    assert_ran(lambda: bsgap.spectral_summary(A), small=None)
    assert_ran(lambda: bsgap.gram(A), small=None)


def test_the_cuda_library_is_loaded() -> None:
    if ON_GPU:
        assert "cuda" in bsgap.build_info()["backends"]


@pytest.mark.parametrize("k", [5, 64, 129, 512])
@pytest.mark.parametrize("relative", [True, False])
def test_singular_value_counts(k: int, relative: bool) -> None:
    A, count = on_device(k, 1e-2, torch.float64)
    thresholds = torch.tensor([1e-2, 0.999, -1.0, math.nan, 2.0], dtype=torch.float64, device=DEVICE)
    found = bsgap.singular_value_counts(A, thresholds, relative=relative)
    # sigma_max is 1, so relative and absolute thresholds are the same numbers.
    assert found.tolist() == [count, 1, k, -1, 0]
    assert bsgap.singular_value_counts(A, thresholds[:2], relative=relative).tolist() == [count, 1]


def test_absolute_and_tensor_tolerances() -> None:
    A, count = on_device(33, 1e-2, torch.float32)
    batch = torch.stack([A, 100 * A])
    assert equal(bsgap.near_rank(batch, atol=1e-2), reference.near_rank(batch.cpu(), atol=1e-2))
    rtol = torch.tensor([1e-2, 0.999], device=DEVICE)
    assert bsgap.near_rank(batch, rtol=rtol).tolist() == [count, 1]
    assert bsgap.near_rank(batch, atol=torch.tensor([1e-2, 1.0], device=DEVICE)).tolist() == [count, count]


# Layouts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 40, 9), (2, 3, 20, 50), (3, 150, 140)])
def test_batches_equal_single_matrices(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    A = random(*shape, dtype=dtype)
    expected = reference.near_rank(A.cpu(), rtol=0.3)
    assert equal(bsgap.near_rank(A, rtol=0.3), expected)
    lower, upper = bsgap.near_rank_interval(A, rtol=0.3)
    assert bool((lower.cpu() <= expected).all())
    assert bool((expected <= upper.cpu()).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    base = random(4, 64, 80, dtype=dtype)
    views = [
        base.mT,
        base[:, ::2, ::3],
        base[::2, 3:, 5:],
        base[:, :, :1].expand(4, 64, 7),
        base.transpose(0, 1),
        base[0].expand(3, 64, 80),
        base.flip(1)[:, :, 1::2],
    ]
    for view in views:
        assert equal(bsgap.near_rank(view, rtol=0.1), bsgap.near_rank(view.contiguous(), rtol=0.1))
        assert equal(bsgap.near_rank(view, rtol=0.1), reference.near_rank(view.cpu(), rtol=0.1))
        torch.testing.assert_close(bsgap.gram(view), bsgap.gram(view.contiguous()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES)
def test_convolution_outputs(dtype: torch.dtype, layout: torch.memory_format) -> None:
    sizes = [(3, 17, 5, 7), (8, 16, 9, 9), (2, 130, 12, 11), (4, 64, 1, 1)]
    images = [random(*size, dtype=dtype, seed=i).to(memory_format=layout) for i, size in enumerate(sizes)]
    flat = [image.movedim(1, -1).flatten(0, -2) for image in images]
    expected = torch.stack([reference.near_rank(A.cpu(), rtol=0.3) for A in flat])
    assert equal(bsgap.near_rank_grouped([image.movedim(1, -1) for image in images], rtol=0.3), expected)
    assert equal(torch.stack([bsgap.near_rank(A, rtol=0.3) for A in flat]), expected)
    per_image = images[1].flatten(2).mT
    assert equal(bsgap.near_rank(per_image, rtol=0.3), reference.near_rank(per_image.cpu(), rtol=0.3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_views_read_nothing_else(dtype: torch.dtype) -> None:
    for rows, columns in ((37, 16), (64, 33), (200, 130), (5, 3)):
        # NaN all around: what is read beside the view and used would show as -1.
        storage = torch.full((rows * columns + 70,), math.nan, device=DEVICE, dtype=dtype)
        for offset in (1, 3):
            view = storage[offset : offset + rows * columns].view(rows, columns)
            view.copy_(random(rows, columns, dtype=dtype, seed=offset))
            assert view.storage_offset() == offset
            assert equal(bsgap.near_rank(view, rtol=0.3), reference.near_rank(view.cpu(), rtol=0.3))
            inner = view[:, 1:]
            assert equal(bsgap.near_rank(inner, rtol=0.3), reference.near_rank(inner.cpu(), rtol=0.3))
            storage.fill_(math.nan)


def test_grouped_ragged_shapes_and_dtypes() -> None:
    shapes = [(40, 9), (9, 40), (300, 130), (1, 1), (129, 700), (0, 4), (65, 64), (4, 0), (33, 32)]
    As = [random(*shape, dtype=DTYPES[i % 4], seed=i) for i, shape in enumerate(shapes)]
    expected = torch.stack([reference.near_rank(A.cpu(), rtol=0.3) for A in As])
    assert equal(bsgap.near_rank_grouped(As, rtol=0.3), expected)


def test_grouped_lists_of_no_and_of_ten_thousand_layers() -> None:
    assert bsgap.near_rank_grouped([], rtol=0.1).shape == (0,)
    few = [random(8, 4, seed=1), random(20, 17, seed=2), torch.zeros(6, 5, device=DEVICE)]
    expected = torch.stack([reference.near_rank(A.cpu(), rtol=0.3) for A in few])
    found = bsgap.near_rank_grouped([few[i % 3] for i in range(10_000)], rtol=0.3)
    assert found.shape == (10_000,)
    assert equal(found[:9999].view(-1, 3), expected.expand(3333, 3))
    assert int(found[-1]) == int(expected[0])


def test_rows_beyond_two_to_the_31_elements() -> None:
    elements = 2**31 + 2**20
    if not ON_GPU or torch.cuda.mem_get_info()[0] < 3 * elements:
        pytest.skip("needs 5 GB of device memory")
    storage = torch.full((elements,), math.nan, dtype=torch.bfloat16, device=DEVICE)
    view = storage.as_strided((64, 16), (2**31 // 63, 1))
    assert 63 * view.stride(0) + 16 > 2**31 - 64
    view.copy_(random(64, 16, dtype=torch.bfloat16))
    assert equal(bsgap.near_rank(view, rtol=0.3), reference.near_rank(view.cpu(), rtol=0.3))
    far = storage.as_strided((32, 8), (9, 1), 2**31 + 5)
    far.copy_(random(32, 8, dtype=torch.bfloat16, seed=1))
    assert equal(bsgap.near_rank(far, rtol=0.3), reference.near_rank(far.cpu(), rtol=0.3))


# Extremes


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (3, 0, 4), (0, 4, 4)])
def test_empty(shape: tuple[int, ...]) -> None:
    A = torch.empty(shape, device=DEVICE)
    zeros = torch.zeros(shape[:-2], dtype=torch.int64)
    assert equal(bsgap.near_rank(A, rtol=0.1), zeros)
    assert all(equal(end, zeros) for end in bsgap.near_rank_interval(A, rtol=0.1))
    assert bsgap.singular_value_counts(A, torch.ones(2, device=DEVICE)).shape == (*shape[:-2], 2)
    assert bsgap.gram(A).shape == (*shape[:-2], shape[-1], shape[-1])
    assert bsgap.spectral_summary(A).shape == (*shape[:-2], len(bsgap.SUMMARY_COLUMNS))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [7, 64, 140])
def test_non_finite_is_reported_and_does_not_spread(k: int, dtype: torch.dtype, bad: float) -> None:
    A = random(3, 2 * k + 1, k, dtype=dtype)
    clean = bsgap.near_rank(A, rtol=0.3)
    summary = bsgap.spectral_summary(A)
    A[1, -1, -1] = bad
    expected = torch.stack([clean[0], torch.full_like(clean[0], -1), clean[2]])
    assert equal(bsgap.near_rank(A, rtol=0.3), expected)
    assert equal(bsgap.near_rank_grouped(list(A), rtol=0.3), expected)
    for end in bsgap.near_rank_interval(A, rtol=0.3):
        assert int(end[1]) == -1
    spoiled = bsgap.spectral_summary(A)
    assert bool(spoiled[1].isnan().all())
    assert torch.equal(spoiled[::2].nan_to_num(-7.0), summary[::2].nan_to_num(-7.0))
    assert bool(bsgap.gram(A)[1].isnan().all())
    assert not bool(bsgap.gram(A)[0].isnan().any())


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float64, 1e-300),
        (torch.float64, 1e300),
        (torch.float32, 1e-30),
        (torch.float32, 1e30),
        (torch.bfloat16, 1e-30),
        (torch.bfloat16, 1e30),
        (torch.float16, 2.0**-10),
        (torch.float16, 2.0**10),
    ],
)
@pytest.mark.parametrize("k", [12, 100, 150])
def test_huge_and_tiny_scales(k: int, dtype: torch.dtype, scale: float) -> None:
    A, count = on_device(k, 0.3, torch.float64)
    B = (A * scale).to(dtype)
    assert int(bsgap.near_rank(B, rtol=0.3)) == count
    lower, upper = bsgap.near_rank_interval(B, rtol=0.3)
    assert int(lower) <= count <= int(upper)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_and_rank_one(dtype: torch.dtype) -> None:
    for shape in ((20, 6), (6, 20), (200, 140)):
        zero, ones = (
            torch.zeros(shape, dtype=dtype, device=DEVICE),
            torch.ones(shape, dtype=dtype, device=DEVICE),
        )
        assert int(bsgap.near_rank(zero, rtol=0.1)) == 0
        assert [int(end) for end in bsgap.near_rank_interval(zero, rtol=0.1)] == [0, 0]
        assert int(bsgap.near_rank(ones, rtol=0.1)) == 1
        assert int(bsgap.near_rank(ones, rtol=0.1, center=True)) == 0


# Matrices and metrics


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(50, 7), (7, 50), (300, 64), (400, 140), (3, 33, 20)])
def test_gram_and_covariance(shape: tuple[int, ...], dtype: torch.dtype, center: bool) -> None:
    A = random(*shape, dtype=dtype) + (3 if center else 0)
    expected = reference.gram(A.cpu(), center=center)
    size = A.cpu().double().abs()
    allowed = sum_rtol(torch.float64, shape[-2]) * (size.mT @ size)
    difference = bsgap.gram(A, center=center).cpu() - expected
    assert bool((difference.abs() <= allowed).all())
    covariance = bsgap.covariance(A)
    assert covariance.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close = sum_rtol(covariance.dtype, shape[-2]) * (size.mT @ size) / (shape[-2] - 1)
    assert bool(((covariance.cpu().double() - reference.covariance(A.cpu())).abs() <= close).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 4), (50, 7), (7, 50), (300, 128), (300, 129), (2, 60, 40)])
def test_spectral_summary(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    A = random(*shape, dtype=dtype)
    found, expected = bsgap.spectral_summary(A).cpu(), reference.spectral_summary(A.cpu())
    assert found.dtype == torch.float64
    tolerance = metric_rtol(torch.float64, *shape[-2:]) * 1e3  # alpha_req divides small differences of logs
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-9, equal_nan=True)


def test_accumulating_chunks_equals_one_gram() -> None:
    A, shift = random(500, 19) + 5, torch.full((19,), 4.5, dtype=torch.float64, device=DEVICE)
    state = torch.zeros(20, 20, dtype=torch.float64, device=DEVICE)
    for chunk in A.split((200, 0, 299, 1)):
        bsgap.gram_accumulate_(state, chunk, shift)
    ones = torch.ones(500, 1, dtype=torch.float64, device=DEVICE)
    extended = torch.cat([ones, A.double() - shift], 1)
    torch.testing.assert_close(state, extended.mT @ extended, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("op", [bsgap.gram, bsgap.covariance, lambda A: bsgap.spectral_summary(A)[..., :5]])
@pytest.mark.parametrize("shape", [(9, 4), (2, 6, 5)])
def test_gradients(op: object, shape: tuple[int, ...]) -> None:
    A = random(*shape, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(op, (A,), fast_mode=True, nondet_tol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_equal_those_of_the_cpu(dtype: torch.dtype) -> None:
    A = random(40, 12, dtype=dtype)
    gradients = []
    for X in (A.clone().requires_grad_(), A.cpu().clone().requires_grad_()):
        bsgap.gram(X).square().sum().backward()
        assert X.grad is not None
        assert X.grad.dtype == dtype
        gradients.append(X.grad.cpu().double())
    torch.testing.assert_close(*gradients, rtol=4 * torch.finfo(dtype).eps, atol=1e-9)


def test_counts_never_require_grad() -> None:
    A = random(10, 4).requires_grad_()
    assert not bsgap.near_rank(A, rtol=0.1).requires_grad
    assert not bsgap.near_rank_ratio(A, rtol=0.1).requires_grad
    assert not bsgap.near_rank_grouped([A], rtol=0.1).requires_grad


def test_input_is_not_changed_and_not_aliased() -> None:
    A = random(3, 30, 8)
    before = A.clone()
    for found in (
        bsgap.gram(A),
        bsgap.covariance(A),
        bsgap.near_rank(A, rtol=0.1),
        bsgap.spectral_summary(A),
    ):
        assert found.untyped_storage().data_ptr() != A.untyped_storage().data_ptr()
    assert torch.equal(A, before)
