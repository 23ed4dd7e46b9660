"""gram: A^T A in float64, optionally about the column means."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks
from ._autodiff import derivative
from ._register import implement


def gram(A: Tensor, *, center: bool = False) -> Tensor:
    """Gram matrix G = Aᵀ A of each matrix, or Aᵀ H A with H = I - 11ᵀ/m if `center`.

    Shapes: A (*, m, n), any strides, float64 / float32 / bfloat16 / float16; result (*, n, n), float64.
    Accumulation: float64, each entry within (256 + m/256 + 18) units of roundoff of Σ|a_ki||a_kj|; on a GPU
    within m/8 + 162 (`gram_roundings` in triton/config.py).
    Non-finite input gives a matrix of NaN; m = 0 gives zeros. Differentiable to any order, in both modes;
    the gradient A (g + gᵀ) comes back in A's dtype. Does not synchronise. Cost: m n² multiply-adds (half the
    tiles), one read of A (on a GPU for n up to 64; beyond, one a pair of column blocks, most from its cache);
    centring adds three reads on a CPU. Raises TypeError / ValueError that name the argument.
    """
    _checks.raise_public(_checks.first(_checks.matrix(A), _checks.flag(center, "center")))
    return torch.ops.bsgap.gram(A, center=center)


def _kernel(A: Tensor, *, center: bool = False) -> Tensor:
    _checks.raise_raw("gram", _checks.matrix(A))
    n = A.shape[-1]
    if A.numel() == 0:
        return A.new_zeros((*A.shape[:-2], n, n), dtype=torch.float64)
    G: Tensor = torch.ops.bsgap._feature_gram(A, center)
    return G.view(*A.shape[:-2], n, n)


def _fake(A: Tensor, *, center: bool = False) -> Tensor:
    _checks.raise_raw("gram", _checks.matrix(A))
    return A.new_empty((*A.shape[:-2], A.shape[-1], A.shape[-1]), dtype=torch.float64)


def wide(A: Tensor, center: bool) -> Tensor:
    """A in float64, about the column means if centred."""
    X = A.to(torch.float64)
    return X - X.mean(-2, keepdim=True) if center else X


def gram_gradient(A: Tensor, grad: Tensor, center: bool = False) -> Tensor:
    """Gradient with respect to A of <grad, gram(A)>, in A's dtype."""
    return (wide(A, center) @ (grad + grad.mT)).to(A.dtype)


def gram_tangent(A: Tensor, tangent: Tensor, center: bool = False) -> Tensor:
    """Derivative of gram(A) along a tangent of A."""
    half = wide(A, center).mT @ tangent.to(torch.float64)
    return half + half.mT


implement("gram", _kernel, _fake)
derivative("gram", gradient=gram_gradient, tangent=gram_tangent)
