"""covariance: the centred Gram matrix over (m - correction), in the input's dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks
from ._autodiff import derivative
from ._register import implement
from .gram import gram_gradient, gram_tangent


def covariance(A: Tensor, *, correction: int = 1) -> Tensor:
    """Covariance matrix of the columns, Aᵀ H A / (m - correction), H = I - 11ᵀ/m.

    Shapes: A (*, m, n), rows are observations; result (*, n, n) in A's dtype, float32 for bfloat16 and
    float16. Sums in float64 about the mean (two sweeps), so a large mean costs no digits.
    Non-finite input gives NaN. Differentiable as `gram`. Does not synchronise. Cost: as `gram` with `center`.
    Raises ValueError where m <= correction, TypeError / ValueError that name the argument otherwise.
    Agrees with torch.cov(A.T, correction=...).
    """
    _checks.raise_public(_problem(A, correction))
    return torch.ops.bsgap.covariance(A, correction=correction)


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


def _result_dtype(A: Tensor) -> torch.dtype:
    return torch.float64 if A.dtype == torch.float64 else torch.float32


def _kernel(A: Tensor, *, correction: int = 1) -> Tensor:
    _checks.raise_raw("covariance", _problem(A, correction))
    gram = torch.ops.bsgap.gram(A, center=True)
    return gram.div_(A.shape[-2] - correction).to(_result_dtype(A))


def _fake(A: Tensor, *, correction: int = 1) -> Tensor:
    _checks.raise_raw("covariance", _problem(A, correction))
    return A.new_empty((*A.shape[:-2], A.shape[-1], A.shape[-1]), dtype=_result_dtype(A))


def _gradient(A: Tensor, grad: Tensor, correction: int = 1) -> Tensor:
    return gram_gradient(A, grad.to(torch.float64) / (A.shape[-2] - correction), True)


def _tangent(A: Tensor, tangent: Tensor, correction: int = 1) -> Tensor:
    return (gram_tangent(A, tangent, True) / (A.shape[-2] - correction)).to(_result_dtype(A))


implement("covariance", _kernel, _fake)
derivative("covariance", gradient=_gradient, tangent=_tangent)
