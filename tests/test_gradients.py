"""Gradients of the ops: against differences, of rank-deficient and non-finite input; counts have none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bsgap_kernels as bsgap


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def test_accumulating_keeps_no_graph_alive() -> None:
    A = random(9, 3).requires_grad_() * 2
    state = torch.zeros(4, 4, dtype=torch.float64)
    version = state._version
    bsgap.gram_accumulate_(state, A, torch.zeros(3, dtype=torch.float64))
    assert not state.requires_grad
    assert state._version > version


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (2, 5, 3)])
@pytest.mark.parametrize("center", [False, True])
def test_gradients(shape: tuple[int, ...], center: bool) -> None:
    A = random(*shape, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: bsgap.gram(x, center=center), A)
    assert torch.autograd.gradgradcheck(lambda x: bsgap.gram(x, center=center), A)
    if center:
        assert torch.autograd.gradcheck(bsgap.covariance, A)
    else:
        # sigma_max, Frobenius norm, stable rank, participation ratio, effective rank
        assert torch.autograd.gradcheck(lambda x: bsgap.spectral_summary(x)[..., :5], A)


def test_gradients_with_centring_where_the_spectrum_is_full() -> None:
    A = random(9, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: bsgap.spectral_summary(x, center=True)[..., :5], A)


def test_gradient_dtype_and_rank_deficient_input() -> None:
    A = random(40, 8, dtype=torch.bfloat16)
    A[:, 3] = 0
    A.requires_grad_()
    bsgap.spectral_summary(A)[:5].sum().backward()
    assert A.grad is not None
    assert A.grad.dtype == torch.bfloat16
    assert A.grad.isfinite().all()
    Z = torch.zeros(5, 4, requires_grad=True)
    bsgap.spectral_summary(Z)[:5].sum().backward()
    assert Z.grad is not None
    assert (Z.grad == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_has_no_gradient_and_spoils_no_other(bad: float) -> None:
    A = random(3, 9, 4)
    alone = A[[0, 2]].clone().requires_grad_()
    A[1, 2, 3] = bad
    A.requires_grad_()
    for batch in (A, alone):
        bsgap.spectral_summary(batch)[..., :5].sum().backward()
    assert A.grad is not None
    assert alone.grad is not None
    assert A.grad[1].isnan().all()
    assert torch.equal(A.grad[[0, 2]], alone.grad)


def test_counts_never_require_grad() -> None:
    A = random(9, 5).requires_grad_()
    outputs = [
        bsgap.near_rank(A),
        bsgap.near_rank_ratio(A),
        *bsgap.near_rank_interval(A),
        bsgap.singular_value_counts(A, torch.tensor([0.1])),
        bsgap.near_rank_grouped([A]),
        bsgap.near_rank(A, rtol=torch.tensor(0.1)),
    ]
    assert not any(out.requires_grad for out in outputs)
    assert bsgap.gram(A).requires_grad
