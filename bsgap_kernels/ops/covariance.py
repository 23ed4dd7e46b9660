"""covariance: the centred Gram matrix over (m - correction), in the input's dtype; weights as torch.cov."""

from __future__ import annotations

import torch
from torch import Tensor

from ..schema import LIBRARY
from . import _checks
from ._autodiff import derivative
from ._register import implement
from .gram import gram_gradient, gram_tangent


def covariance(
    A: Tensor, *, correction: int = 1, fweights: Tensor | None = None, aweights: Tensor | None = None
) -> Tensor:
    """Covariance matrix of the columns, Aᵀ H A / (m - correction), H = I - 11ᵀ/m.

    Shapes: A (*, m, n), rows are observations; result (*, n, n) in A's dtype, float32 for bfloat16 and
    float16. Weights of observations: fweights (*, m), integers, how often each was seen; aweights (*, m),
    real, how much each counts; leading dimensions broadcast with those of A. With w their product, and
    μ = Σ w x / Σ w: Σ w (x - μ)(x - μ)ᵀ / (Σ w - correction · Σ w·aweights / Σ w), the last quotient 1
    without aweights.
    Sums in float64 about the mean (two sweeps), so a large mean costs no digits.
    Non-finite input, a negative weight and weights that sum to 0 give NaN; a divisor that is not positive
    counts as 0, as in torch, of whose warning there is none. Differentiable as `gram`, in aweights too. Does
    not synchronise. Cost: as `gram` with `center`; with weights a float64 copy of A and torch's product.
    Raises ValueError where m <= correction, TypeError / ValueError that name the argument otherwise.
    Agrees with torch.cov(A.T, correction=..., fweights=..., aweights=...).
    """
    if fweights is None and aweights is None:
        _checks.raise_public(_problem(A, correction))
        return torch.ops.bsgap.covariance.default(A, correction=correction)
    _checks.raise_public(_weighted_problem(A, correction, fweights, aweights))
    return torch.ops.bsgap.covariance.weighted(A, correction=correction, fweights=fweights, aweights=aweights)


def _problem(A: object, correction: object) -> _checks.Problem | None:
    wrong = _checks.matrix(A)
    if wrong is not None:
        return wrong
    assert isinstance(A, Tensor)
    if isinstance(correction, bool) or not isinstance(correction, (int, torch.SymInt)):
        return TypeError, f"correction must be an int, got {correction!r}"
    if correction < 0 or A.shape[-2] <= correction:
        text = f"correction must lie in 0 ... m - 1 (m = {A.shape[-2]} observations), got {correction}"
        return ValueError, text
    return None


def _weighted_problem(
    A: Tensor, correction: object, fweights: object, aweights: object
) -> _checks.Problem | None:
    return (
        _problem(A, correction)
        or _weight_problem(A, fweights, "fweights", "integers")
        or _weight_problem(A, aweights, "aweights", "floating")
    )


def _weight_problem(A: Tensor, weights: object, name: str, kind: str) -> _checks.Problem | None:
    if weights is None:
        return None
    if not isinstance(weights, Tensor):
        return TypeError, f"{name} must be a torch.Tensor or None, got {type(weights).__name__}"
    real = not weights.dtype.is_complex and weights.dtype != torch.bool
    if not real or weights.dtype.is_floating_point != (kind == "floating"):
        return TypeError, f"{name} must be {kind}, got {weights.dtype}"
    if weights.device != A.device:
        return ValueError, f"{name} must be on the device of A ({A.device}), got {weights.device}"
    if weights.dim() < 1 or weights.shape[-1] != A.shape[-2]:
        text = f"{name} must have one entry for each of {A.shape[-2]} observations, got shape"
        return ValueError, f"{text} {tuple(weights.shape)}"
    return _checks.broadcasts(weights.shape[:-1], A.shape[:-2], name)


def _result_dtype(A: Tensor) -> torch.dtype:
    return torch.float64 if A.dtype == torch.float64 else torch.float32


def _kernel(A: Tensor, *, correction: int = 1) -> Tensor:
    _checks.raise_raw("covariance", _problem(A, correction))
    gram = torch.ops.bsgap.gram(A, center=True)
    return gram.div_(A.shape[-2] - correction).to(_result_dtype(A))


def _weighted_kernel(
    A: Tensor, *, correction: int = 1, fweights: Tensor | None = None, aweights: Tensor | None = None
) -> Tensor:
    _checks.raise_raw("covariance", _weighted_problem(A, correction, fweights, aweights))
    w = torch.ones((), dtype=torch.float64, device=A.device).expand(A.shape[-2])
    negative = torch.zeros((), dtype=torch.bool, device=A.device)
    for given in (fweights, aweights):
        if given is not None:
            w = w * given.double()
            negative = negative | (given < 0).any(-1)
    total = w.sum(-1)
    X = A.double()
    for _ in range(2):
        X = X - ((w[..., None] * X).sum(-2) / total[..., None])[..., None, :]
    product = X.mT @ (w[..., None] * X)
    share = correction if aweights is None else correction * (w * aweights).sum(-1) / total
    divisor = (total - share).clamp_min(0).masked_fill(negative, torch.nan)[..., None, None]
    return ((product + product.mT) / (2 * divisor)).to(_result_dtype(A))


def _fake(A: Tensor, *, correction: int = 1) -> Tensor:
    _checks.raise_raw("covariance", _problem(A, correction))
    return A.new_empty((*A.shape[:-2], A.shape[-1], A.shape[-1]), dtype=_result_dtype(A))


def _gradient(A: Tensor, grad: Tensor, correction: int = 1) -> Tensor:
    return gram_gradient(A, grad.to(torch.float64) / (A.shape[-2] - correction), True)


def _tangent(A: Tensor, tangent: Tensor, correction: int = 1) -> Tensor:
    return (gram_tangent(A, tangent, True) / (A.shape[-2] - correction)).to(_result_dtype(A))


implement("covariance", _kernel, _fake)
derivative("covariance", gradient=_gradient, tangent=_tangent)
LIBRARY.impl("covariance.weighted", _weighted_kernel, "CompositeImplicitAutograd")
