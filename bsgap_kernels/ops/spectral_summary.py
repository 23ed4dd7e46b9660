"""spectral_summary: the metrics that follow from the singular values, from one Gram matrix."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._autodiff import derivative
from ._register import implement
from .gram import wide

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
    Twice differentiable, in both modes, in the first five columns; elsewhere the gradient is 0. A third
    backward pass raises NotImplementedError; nested transforms of torch.func do not, and are wrong. Where no
    derivative exists: singular values below 1e-8·σ_1 are left out of effective_rank, as of a matrix of lower
    rank; of a multiple σ_1 the derivative is that of one of its vectors; a zero matrix has derivatives 0.
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


class _Spectrum(NamedTuple):
    """Functions f(G) of a Gram matrix that the columns are made of, and their gradients M, tr(M dG) = df.

    Both are right to the first derivative with respect to G, so that a gradient made of them can be
    differentiated once more. Eigenvectors are constants: f(G) = Σ φ(λ_i) changes by Σ φ'(λ_i) E_ii with
    E = Vᵀ(G - G₀)V, and M by V (L ∘ E) Vᵀ with L_ij = (φ'(λ_i) - φ'(λ_j)) / (λ_i - λ_j), or φ''(λ_i) where
    the two are equal: no pole there (Daleckii & Krein; Horn & Johnson, Topics in Matrix Analysis, section
    6.6).
    """

    trace: Tensor  # Σ λ, gradient I
    squares: Tensor  # Σ λ², gradient 2 G
    top: tuple[Tensor, Tensor]  # λ_1
    sigma: tuple[Tensor, Tensor]  # Σ σ
    sigma_log_sigma: tuple[Tensor, Tensor]  # Σ σ log σ


def _spectrum(G: Tensor) -> _Spectrum:
    """Singular values below 1e-8 σ_1 are left out, as those of a matrix of lower rank."""
    lam, V = torch.linalg.eigh(G.detach())
    lam = lam.clamp(min=0)
    top = lam[..., -1:]
    alive = lam > 1e-16 * top
    E = V.mT @ (G - G.detach()) @ V
    _refuse_third_derivatives(E)
    E_ii = E.diagonal(dim1=-2, dim2=-1)
    sigma = torch.where(alive, lam, 1.0).sqrt()
    a, b = sigma[..., :, None], sigma[..., None, :]
    row, column = alive[..., :, None], alive[..., None, :]
    scale = 1 / (2 * a * b * (a + b))
    x = a / b - 1
    log_ratio = torch.where(x.abs() < 1e-8, 1 - x / 2, torch.log1p(x) / torch.where(x == 0, 1.0, x))

    def term(value: Tensor, slope: Tensor, difference: Tensor) -> tuple[Tensor, Tensor]:
        slope = torch.where(alive, slope, 0.0)
        # Beside an eigenvalue that is left out, whose slope is 0 at λ = 0.
        beside = (slope / torch.where(alive, lam, 1.0))[..., :, None]
        L = torch.where(column, difference, beside)
        L = torch.where(row, L, beside.mT)
        total = torch.where(alive, value, 0.0).sum(-1) + (slope * E_ii).sum(-1)
        return total, V @ (torch.diag_embed(slope) + torch.where(row | column, L, 0.0) * E) @ V.mT

    one = torch.zeros_like(lam)
    one[..., -1] = 1
    gap = top - lam
    apart = gap > 1e-14 * top  # a multiple largest value: the derivative of one of its vectors
    towards = torch.where(apart, 1 / torch.where(apart, gap, 1.0), 0.0)
    L = one[..., :, None] * towards[..., None, :] + towards[..., :, None] * one[..., None, :]
    return _Spectrum(
        trace=G.diagonal(dim1=-2, dim2=-1).sum(-1),
        squares=(G * G).sum((-2, -1)),
        top=(top[..., 0] + E_ii[..., -1], V @ (torch.diag_embed(one) + L * E) @ V.mT),
        sigma=term(sigma, 1 / (2 * sigma), -scale),
        sigma_log_sigma=term(
            sigma * sigma.log(), (sigma.log() + 1) / (2 * sigma), (log_ratio - b.log() - 1) * scale
        ),
    )


def _refuse_third_derivatives(E: Tensor) -> None:
    """Have them raise: what is made of E is right to its first derivative, the second of a column."""
    if torch.compiler.is_compiling() or not E.requires_grad:
        return

    def refuse(grad: Tensor | None) -> None:
        if grad is not None and bool((grad != 0).any()):
            raise NotImplementedError(
                "spectral_summary: third derivatives are not supported, first and second ones are"
            )

    def guard(grad: Tensor | None) -> None:  # autograd calls with None where nothing flows
        if grad is not None and grad.requires_grad:
            grad.register_hook(refuse)

    E.register_hook(guard)


def _columns(A: Tensor, center: bool) -> tuple[Tensor, bool, Tensor, Tensor]:
    """Gradients (*, 5, k, k) of the columns with respect to G.

    Before them X = A / scale and whether G = XᵀX or XXᵀ, after them which matrices are finite.
    """
    X = A.to(torch.float64)
    finite = X.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    X = wide(torch.where(finite, X, 0.0), center)
    scale = X.detach().abs().amax((-2, -1), keepdim=True)
    scale = torch.where(scale == 0, 1.0, scale)
    X = X / scale
    features_side = X.shape[-1] <= X.shape[-2]
    G = X.mT @ X if features_side else X @ X.mT
    s = _spectrum(G)
    zero = s.trace.detach() == 0

    def positive(x: Tensor) -> Tensor:
        return torch.where(zero, 1.0, x)

    t, q, top, total = (positive(x) for x in (s.trace, s.squares, s.top[0], s.sigma[0]))
    w = torch.where(zero, 0.0, s.sigma_log_sigma[0])
    effective_rank = (total.log() - w / total).exp()
    identity = torch.eye(G.shape[-1], dtype=torch.float64, device=G.device)
    unit = scale[..., 0, 0]
    terms = (
        (s.top[1], unit / (2 * top.sqrt())),
        (identity, unit / (2 * t.sqrt())),
        (identity, 1 / top),
    )
    M = [matrix * factor[..., None, None] for matrix, factor in terms]
    M[2] = M[2] - s.top[1] * (t / top**2)[..., None, None]
    M.append(identity * (2 * t / q)[..., None, None] - G * (2 * t**2 / q**2)[..., None, None])
    M.append(
        s.sigma[1] * (effective_rank * (total + w) / total**2)[..., None, None]
        - s.sigma_log_sigma[1] * (effective_rank / total)[..., None, None]
    )
    gradients = torch.stack(M, -3) / scale[..., None]
    return X, features_side, torch.where(zero[..., None, None, None], 0.0, gradients), finite


def _gradient(A: Tensor, grad: Tensor, center: bool = False) -> Tensor:
    """dA = 2 X M, or 2 M X, with M the gradient with respect to G."""
    if A.numel() == 0:
        return torch.zeros_like(A)
    X, features_side, gradients, finite = _columns(A, center)
    M = (grad[..., :5, None, None] * gradients).sum(-3)
    d_x = 2 * (X @ M if features_side else M @ X)
    if center:
        d_x = d_x - d_x.mean(-2, keepdim=True)
    return torch.where(finite, d_x, torch.nan).to(A.dtype)


def _tangent(A: Tensor, tangent: Tensor, center: bool = False) -> Tensor:
    if A.numel() == 0:
        return torch.zeros((*A.shape[:-2], len(SUMMARY_COLUMNS)), dtype=torch.float64, device=A.device)
    X, features_side, gradients, finite = _columns(A, center)
    T = tangent.to(torch.float64)
    half = X.mT @ T if features_side else X @ wide(T, center).mT
    along = 2 * (gradients * half[..., None, :, :]).sum((-2, -1))
    along = torch.where(finite[..., 0], along, torch.nan)
    rest = along.new_zeros((*along.shape[:-1], len(SUMMARY_COLUMNS) - along.shape[-1]))
    return torch.cat((along, rest), -1)


implement("spectral_summary", _kernel, _fake)
derivative("spectral_summary", gradient=_gradient, tangent=_tangent)
