"""The probes' kernels in Triton's interpreter against NumPy, on CPU tensors."""

from __future__ import annotations

import numpy as np
import own_process
import pytest
import torch
from numpy.typing import NDArray
from own_process import interpreted
from test_triton_gram import random
from torch import Tensor

from bsgap_kernels import _core
from bsgap_kernels.triton import config, probe
from bsgap_kernels.triton.gram import gram_set
from bsgap_kernels.triton.table import MatrixView, describe, orient

U = 2.0**-53
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@own_process.starts
def test_in_the_interpreter() -> None:
    own_process.run(__file__, "interpreter", "not slow")


def viewed(A: Tensor) -> MatrixView:
    view = describe(A, batch=True)
    assert view is not None
    return view


def extended(A: Tensor) -> NDArray[np.longdouble]:
    """In 64-bit precision, whose own roundings are 2^-11 of those looked at."""
    return A.to(torch.float64).numpy().astype(np.longdouble)


def oracle(view: MatrixView) -> Tensor:
    """X, (count, depth, side) float64, from the view's strides; depths in the kernel's order."""
    o = orient(view, False)
    size = (view.count, o.outer, o.inner, o.side)
    stride = (view.stride_batch, o.stride_outer, o.stride_inner, o.stride_side)
    return view.tensor.as_strided(size, stride).flatten(1, 2).to(torch.float64)


LAYOUTS = {
    "row-major": (lambda d: random(449, 424, dtype=d), config.SIDE_ALIGNED),
    "unaligned": (lambda d: random(411, 301, dtype=d), config.ANY),
    "batch": (lambda d: random(2, 2, 290, 264, dtype=d), config.SIDE_ALIGNED),
    "sliced": (lambda d: random(2, 604, 630, dtype=d)[:, ::2, 1::2][..., :300], config.ANY),
    "wide": (lambda d: random(2, 296, 424, dtype=d), config.DEPTH_ALIGNED),
    "wide, odd": (lambda d: random(291, 403, dtype=d)[:, 2:], config.DEPTH_CONTIGUOUS),
    "expanded": (lambda d: random(1, 300, 259, dtype=d).expand(2, 300, 259), config.ANY),
}


@interpreted
@pytest.mark.parametrize(("name", "splits"), [(name, 3) for name in LAYOUTS] + [("row-major", 1)])
def test_products(name: str, splits: int) -> None:
    build, layout = LAYOUTS[name]
    for dtype in DTYPES if name == "row-major" else DTYPES[:2]:  # float16 is read as bfloat16 is
        view = viewed(build(dtype))
        check_products(view, layout, splits)


@interpreted
@pytest.mark.parametrize(
    ("shape", "layout", "memory_format"),
    [
        ((2, 264, 16, 17), config.DEPTH_ALIGNED, torch.contiguous_format),
        ((3, 257, 11, 13), config.DEPTH_CONTIGUOUS, torch.contiguous_format),
        ((40, 260, 3, 3), config.ANY, torch.contiguous_format),
        ((3, 264, 11, 13), config.SIDE_ALIGNED, torch.channels_last),
    ],
)
def test_products_of_images(shape: tuple[int, ...], layout: int, memory_format: torch.memory_format) -> None:
    for dtype in DTYPES[:2]:
        A = random(*shape, dtype=dtype).to(memory_format=memory_format).permute(0, 2, 3, 1)
        view = describe(A, batch=False)
        assert view is not None
        assert view.tensor.data_ptr() == A.data_ptr()
        check_products(view, layout, 2)


def check_products(view: MatrixView, layout: int, splits: int) -> None:
    """Each entry within its own order's bound, on three tiles of either product at least, ragged."""
    X = oracle(view)
    count, depth, side = X.shape
    omega = probe.probe_vectors(count, side, 3, X.device)
    y, squares, first = probe.thin_product(view, omega, transposed=False, splits=splits)
    z, _, second = probe.thin_product(view, y, transposed=True, splits=splits)
    assert (first.layout, second.layout) == (layout, layout)
    assert (first.splits, second.splits) == (splits, splits)
    assert min(first.tiles, second.tiles, first.blocks, second.blocks) >= 3
    assert depth % probe.BLOCK_OUT
    assert side % probe.BLOCK_OUT
    wide = extended(X)
    for transposed, plan, thin, out in ((False, first, omega, y), (True, second, y, z)):
        factor, other = np.swapaxes(wide, 1, 2) if transposed else wide, extended(thin)
        error = np.abs(extended(out) - factor @ other)
        assert (error <= plan.roundings * U * (np.abs(factor) @ np.abs(other)))[..., :9].all()
        assert not out[..., 9:].any()
    expected = (wide * wide).sum((1, 2))
    assert (np.abs(extended(squares) - expected) <= 1e-13 * expected).all()


def test_plan_counts_roundings() -> None:
    view = viewed(torch.empty(1, 1, dtype=torch.bfloat16).expand(100_000, 512))
    o = orient(view, False)
    plan = probe.plan_product(view, o, True, processors=132)
    assert (plan.tiles, plan.blocks, plan.splits) == (4, 3125, 66)
    # Product and sums of a block of 32, 48 blocks, 66 splits, two to spare.
    assert plan.roundings == 32 + 48 + 65 + 2
    assert probe.plan_product(view, o, False, processors=132).splits == 1
    small = viewed(torch.empty(500, 450))
    assert probe.plan_product(small, orient(small, False), False, processors=132).splits == 3


@interpreted
@pytest.mark.parametrize("seed", [0, 1, 12345678901234567, 2**63 - 1])
def test_vectors_are_those_of_the_cpu(seed: int) -> None:
    omega = probe.probe_vectors(3, 131, seed, torch.device("cpu")).numpy()
    for i in range(3 if seed < 2**63 - 1 else 1):
        assert np.allclose(omega[i, :, :9].T, _core.probe_vectors(131, seed + i), rtol=1e-13, atol=1e-14)
    assert not omega[..., 9:].any()
    assert (omega[..., :9] != 0).all()


def true_error(G: Tensor, view: MatrixView) -> Tensor:
    X = oracle(view)
    return torch.linalg.matrix_norm(G - X.mT @ X, 2)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_bound_holds_and_is_near(dtype: torch.dtype) -> None:
    A = random(2, 300, 130, dtype=dtype) if dtype != torch.float16 else random(2, 130, 300, dtype=dtype)
    view = viewed(A)
    found = gram_set([view], precision="float32", splits=1)
    bound = probe.probe_error(view, found, seed=5)
    error = true_error(found.gram(0), view)
    assert (bound >= error).all()
    assert (bound <= 200 * error).all()
    assert torch.equal(bound, probe.probe_error(view, found, seed=5))
    other = probe.probe_error(view, found, seed=6)
    assert (other != bound).all()
    # Matrix i takes the vectors of seed + i.
    second = viewed(A[1])
    alone = probe.probe_error(second, gram_set([second], precision="float32", splits=1), seed=6)
    assert torch.isclose(alone[0], bound[1], rtol=1e-3)


@interpreted
def test_bound_follows_an_injected_error() -> None:
    view = viewed(random(2, 300, 130))
    found = gram_set([view], precision="float64")
    G = found.gram(0)
    before, right = probe.probe_error(view, found, seed=1), G[0].clone()
    # A float64 Gram matrix leaves only the roundings that the bound assumes of its own products.
    assert (before < 1e-9 * G[:, 0, 0]).all()
    entry, v = right.clone(), torch.nn.functional.normalize(random(130, dtype=torch.float64), dim=0)
    entry[70, 70] += 1.0
    for wrong in (entry, right - torch.outer(v, v), right.half()):
        G[0] = wrong
        after = probe.probe_error(view, found, seed=1)
        error = true_error(G, view)
        assert error[0] > 0.05
        assert error[0] <= after[0] <= 200 * error[0]
        assert after[1] == before[1]


@interpreted
def test_rounding_terms_alone() -> None:
    # G = AᵀA exactly and the probes see no difference but their own roundings: what is left is the bound of
    # these, a small share of ‖A‖_F².
    A = torch.zeros(300, 130)
    A[:130] = torch.eye(130)
    view = viewed(A)
    found = gram_set([view], precision="float32")
    assert torch.equal(found.gram(0)[0], torch.eye(130, dtype=torch.float64))
    bound = probe.probe_error(view, found, seed=1).item()
    length = np.linalg.norm(_core.probe_vectors(130, 1), axis=1).max()
    o = orient(view, False)
    roundings = sum(probe.plan_product(view, o, t, 4).roundings for t in (False, True))
    least = probe.PROBE_FACTOR * roundings * U * 130 * length
    assert least <= bound <= 1.5 * least


@interpreted
@pytest.mark.parametrize(("bad", "where"), [(float("nan"), "matrix"), (float("inf"), "gram")])
def test_nothing_is_known_of_what_is_not_finite(bad: float, where: str) -> None:
    A = random(3, 200, 130)
    if where == "matrix":
        A[1, 7, 100] = bad
    view = viewed(A)
    found = gram_set([view], precision="float32")
    if where == "gram":
        found.gram(0)[1, 3, 100] = bad
    bound = probe.probe_error(view, found, seed=1)
    assert bound.isinf().tolist() == [False, True, False]


@interpreted
@pytest.mark.parametrize("scale", [1e-38, 1e-22, 1e30, 0.0])
def test_range(scale: float) -> None:
    # float32: the interpreter misreads bfloat16's subnormals.
    view = viewed(random(140, 130) * scale)
    found = gram_set([view], precision="float32")
    bound = probe.probe_error(view, found, seed=1)
    assert bound.isfinite().all()
    assert (bound >= true_error(found.gram(0), view)).all()
    assert (bound < 1e-4 * (found.gram(0)[:, 0, 0] + 1e-150)).all()


@interpreted
@pytest.mark.parametrize("where", ["batch", "outer", "inner", "side"])
def test_offsets_beyond_32_bits(where: str) -> None:
    # Address space only: pages that nobody touches take no memory.
    far = 2**31 + 4096
    memory = torch.empty(far + 100000, dtype=torch.bfloat16)
    shape, stride = {
        "batch": ((2, 30, 8), (far, 8, 1)),
        "outer": ((2, 40, 8), (far, 8, 1)),
        "inner": ((2, 2), (far, 1)),
        "side": ((40, 2), (1, far)),
    }[where]
    A = memory.as_strided(shape, stride)
    A.copy_(random(*shape, dtype=torch.bfloat16))
    view = describe(A, batch=where != "outer")
    assert view is not None
    X = oracle(view)
    omega = probe.probe_vectors(view.count, X.shape[2], 3, X.device)
    y, squares, _ = probe.thin_product(view, omega, transposed=False)
    z, _, _ = probe.thin_product(view, y, transposed=True)
    assert torch.allclose(y, X @ omega, rtol=1e-12, atol=1e-12)
    assert torch.allclose(z, X.mT @ (X @ omega), rtol=1e-12, atol=1e-12)
    assert torch.allclose(squares, (X * X).sum((1, 2)), rtol=1e-12)
