"""covariance with weights of observations: batches, values that torch refuses, derivatives, transforms."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import jacfwd, jacrev, vmap

import bsgap_kernels as bsgap

F = torch.tensor([[1, 0, 3, 2, 1], [2, 2, 1, 1, 5]])
A = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
W = torch.rand(2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("weights", [{"fweights": F}, {"aweights": W}, {"fweights": F, "aweights": W}])
def test_batches_against_numpy(weights: dict[str, Tensor], correction: int) -> None:
    ours = bsgap.covariance(A, correction=correction, **weights)
    shared = bsgap.covariance(A, correction=correction, **{key: w[0] for key, w in weights.items()})
    many = bsgap.covariance(A[0], correction=correction, **weights)
    for i in range(2):
        own, first = ({k: w[j].numpy() for k, w in weights.items()} for j in (i, 0))
        for found, rows, options in ((ours, i, own), (shared, i, first), (many, 0, own)):
            right = np.cov(A[rows].numpy(), rowvar=False, ddof=correction, **options)
            np.testing.assert_allclose(found[i], right, rtol=1e-13, atol=1e-15)


def test_a_large_mean_costs_no_digits() -> None:
    steps = [0, 1, 5, 2, 7]
    X = torch.tensor([[2.0**52 + step] for step in steps], dtype=torch.float64)
    mean = Fraction(sum(int(f) * s for f, s in zip(F[1], steps, strict=True)), int(F[1].sum()))
    squares = sum(int(f) * (s - mean) ** 2 for f, s in zip(F[1], steps, strict=True))
    right = squares / (int(F[1].sum()) - 1)
    assert bsgap.covariance(X, fweights=F[1]).item() == pytest.approx(float(right), rel=1e-14)


def test_values_that_torch_refuses_give_nan() -> None:
    for weights in (
        {"fweights": torch.tensor([1, -1, 1, 1, 1])},
        {"aweights": torch.tensor([1.0, 1, 1, 1, -0.5])},
        {"fweights": torch.tensor([-1, 1, 1, 1, 1]), "aweights": torch.tensor([-1.0, 1, 1, 1, 1])},
        {"fweights": torch.zeros(5, dtype=torch.int8)},
    ):
        assert bsgap.covariance(A, **weights).isnan().all()
        with pytest.raises(RuntimeError):
            torch.cov(A[0].mT, **weights)


def test_what_is_wrong_is_named() -> None:
    for weights, kind, text in (
        ({"fweights": W[0]}, TypeError, "fweights must be integers, got torch.float64"),
        ({"aweights": F[0]}, TypeError, "aweights must be floating, got torch.int64"),
        ({"fweights": F[0] > 1}, TypeError, "fweights must be integers, got torch.bool"),
        ({"fweights": F[0, :4]}, ValueError, r"one entry for each of 5 observations, got shape \(4,\)"),
        ({"aweights": W.expand(3, 2, 5).mT}, ValueError, "one entry for each of 5 observations"),
        ({"aweights": W[[0, 1, 0]]}, ValueError, "does not broadcast with the batch shape"),
        ({"aweights": [1.0] * 5}, TypeError, "aweights must be a torch.Tensor or None, got list"),
    ):
        with pytest.raises(kind, match=text):
            bsgap.covariance(A, **weights)
    with pytest.raises(RuntimeError, match="bsgap::covariance: fweights must be integers"):
        torch.ops.bsgap.covariance(A, fweights=W[0])


def test_derivatives_and_transforms() -> None:
    def ours(X: Tensor, w: Tensor) -> Tensor:
        return bsgap.covariance(X, fweights=F[0], aweights=w)

    def theirs(X: Tensor, w: Tensor) -> Tensor:
        return torch.cov(X.mT, fweights=F[0], aweights=w)

    for transform in (jacrev, jacfwd):
        for found, right in zip(
            transform(ours, (0, 1))(A[0], W[0]), jacrev(theirs, (0, 1))(A[0], W[0]), strict=True
        ):
            torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-13)
    zero = W[0].clone()
    zero[1] = 0
    assert jacrev(ours, 1)(A[0], zero).isfinite().all()
    parts = torch.stack([ours(A[i], W[j]) for i in range(2) for j in range(2)]).view(2, 2, 3, 3)
    found = vmap(vmap(ours, (None, 0)), (0, None))(A, W)
    torch.testing.assert_close(found, parts)
    torch.testing.assert_close(vmap(ours, (0, 0))(A, W), ours(A, W))
    assert torch.autograd.gradgradcheck(ours, (A[0].clone().requires_grad_(), W[0].clone().requires_grad_()))
