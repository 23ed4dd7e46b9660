"""spectral_summary: the metrics that follow from the singular values, from one Gram matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..schema import LIBRARY
from . import _checks
from ._register import implement

SUMMARY_COLUMNS = (  # SummaryColumn in csrc/core/summary.h
    "sigma_max",
    "frobenius_norm",
    "stable_rank",
    "participation_ratio",
    "effective_rank",
    "rankme",
    "srank",
    "pca_rank",
    "feature_rank",
    "alpha_req",
)


def spectral_summary(A: Tensor, *, center: bool = False, **refused: Any) -> Tensor:
    """Metrics of the singular values σ_1 ≥ … ≥ σ_k of each matrix, one column each (`SUMMARY_COLUMNS`).

    sigma_max; frobenius_norm ‖A‖_F; stable_rank ‖A‖_F²/σ_1² (with `center`, NESum); participation_ratio
    (Σσ²)²/Σσ⁴; effective_rank exp(-Σ p log p), p = σ/Σσ; rankme, the same with p + 1e-7; srank, the first
    k with Σ_{i≤k} σ ≥ 0.99 Σσ; pca_rank, the same with σ²; feature_rank #{σ/√m > 0.01}; alpha_req, minus
    the slope of log σ_i² against log i for 10 ≤ i < 100 (NaN with fewer than three).
    Sources: bsgap_kernels/reference.py.

    Shapes: A (*, m, n) as `near_rank`; result (*, 10), float64. A zero or empty matrix gives 0 (alpha_req
    NaN), non-finite input NaN. From the float64 Gram matrix, so σ below about 1e-8·σ_1 is rounding.
    Differentiable in the first five columns, elsewhere the gradient is 0; singular values below 1e-8·σ_1
    contribute none (the derivative of effective_rank does not exist at σ = 0).
    Cost: a Gram matrix and its eigenvalues (4/3 k³). Raises TypeError / ValueError that name the argument.
    """
    _checks.refuse("spectral_summary", refused)
    _checks.raise_public(_checks.first(_checks.matrix(A), _checks.flag(center, "center")))
    return torch.ops.bsgap.spectral_summary(A, center=center)


def _empty_summary(A: Tensor) -> Tensor:
    result = A.new_zeros((*A.shape[:-2], len(SUMMARY_COLUMNS)), dtype=torch.float64)
    result[..., -1] = torch.nan
    return result


def _kernel(A: Tensor, *, center: bool = False) -> Tensor:
    _checks.raise_raw("spectral_summary", _checks.matrix(A))
    if A.numel() == 0:
        return _empty_summary(A)
    return torch.ops.bsgap._spectral_summary(A, center).view(*A.shape[:-2], -1)


def _fake(A: Tensor, *, center: bool = False) -> Tensor:
    _checks.raise_raw("spectral_summary", _checks.matrix(A))
    return A.new_empty((*A.shape[:-2], len(SUMMARY_COLUMNS)), dtype=torch.float64)


def _setup_context(
    ctx: Any, inputs: tuple[Tensor], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.center = keyword_only_inputs["center"]


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    """Chain rule through λ = σ²: dG = V diag(∂/∂λ) Vᵀ, dA = 2 A dG (on the smaller side).

    NaN for a matrix that is not finite, which `eigh` would refuse together with all others.
    """
    (A,) = ctx.saved_tensors
    if A.numel() == 0:
        return torch.zeros_like(A)
    X = A.to(torch.float64)
    finite = X.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    X = torch.where(finite, X, 0.0)
    if ctx.center:
        X = X - X.mean(-2, keepdim=True)
    scale = X.abs().amax((-2, -1), keepdim=True)
    scale = torch.where(scale == 0, 1.0, scale)
    X = X / scale
    features_side = X.shape[-1] <= X.shape[-2]
    lam, V = torch.linalg.eigh(X.mT @ X if features_side else X @ X.mT)
    lam = lam.clamp(min=0)
    g = grad.unsqueeze(-1)
    total, squares, top = lam.sum(-1, keepdim=True), (lam * lam).sum(-1, keepdim=True), lam[..., -1:]
    alive = lam > 1e-16 * top
    is_top = torch.zeros_like(lam)
    is_top[..., -1] = 1

    def safe(x: Tensor) -> Tensor:
        return torch.where(x == 0, 1.0, x)

    sigma = torch.where(alive, lam, 1.0).sqrt()
    sigma_sum = torch.where(alive, sigma, 0.0).sum(-1, keepdim=True)
    p = torch.where(alive, sigma, 0.0) / safe(sigma_sum)
    entropy = torch.special.entr(p).sum(-1, keepdim=True)
    d_entropy = -(torch.where(alive, p, 1.0).log() + entropy) / safe(sigma_sum) / (2 * sigma)
    d_lam = (
        g[..., 0, :] * scale[..., 0] * is_top / (2 * safe(top).sqrt())
        + g[..., 1, :] * scale[..., 0] / (2 * safe(total).sqrt())
        + g[..., 2, :] * (1 / safe(top) - is_top * total / safe(top) ** 2)
        + g[..., 3, :] * (2 * total / safe(squares) - 2 * total**2 * lam / safe(squares) ** 2)
        + g[..., 4, :] * entropy.exp() * torch.where(alive, d_entropy, 0.0)
    ) * (top > 0)
    d_gram = V @ (d_lam.unsqueeze(-1) * V.mT)
    d_x = 2 * (X @ d_gram if features_side else d_gram @ X) / scale
    if ctx.center:
        d_x = d_x - d_x.mean(-2, keepdim=True)
    return torch.where(finite, d_x, torch.nan).to(A.dtype)


implement("spectral_summary", _kernel, _fake)
torch.library.register_autograd(
    "bsgap::spectral_summary", _backward, setup_context=_setup_context, lib=LIBRARY
)
