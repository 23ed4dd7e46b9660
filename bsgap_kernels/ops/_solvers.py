"""Counts by torch's solvers: eigenvalues of a Gram matrix, or singular values."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ..triton.memory import is_capturing


def eigenvalue_counts(op: str, A: Tensor, pairs: Tensor, center: bool, hermitian: bool = False) -> Tensor:
    """Counts (*, t) from the eigenvalues of the float64 Gram matrix, or what resolves all pairs (*, t, 2)."""
    batch = A.shape[:-2]
    lam, exponent = torch.ops.bsgap._eigenvalues(A, center)
    finite = exponent != torch.iinfo(torch.int32).min
    sigma = lam.flip(-1).clamp_min(0).sqrt().masked_fill(~finite[:, None], 0.0).view(*batch, -1)
    counts, tau = _counts_above(sigma, exponent.where(finite, 0).view(batch), pairs, finite.view(batch))
    return (
        counts
        if dispatch.resolved(op, A, (tau / sigma[..., :1]).nan_to_num(torch.inf), hermitian=hermitian)
        else svd_counts(op, A, pairs, center, hermitian)
    )


def svd_counts(op: str, A: Tensor, pairs: Tensor, center: bool, hermitian: bool = False) -> Tensor:
    """Counts (*, t) from float64 singular values, -1 for non-finite; pairs (*, t, 2) broadcast.

    Those of a Hermitian matrix are the absolute values of its eigenvalues, which are computed instead.
    """
    if is_capturing(A.device):
        limit = dispatch.float64_gram_min_rtol(A.shape[-2], A.shape[-1], "cuda")
        raise RuntimeError(
            f"bsgap::{op}: rtol lies below what a float64 Gram matrix resolves ({limit:.1e} for this shape), "
            "so singular values would be computed, which waits for the device: not possible while a CUDA "
            f"graph is captured (dtype {A.dtype}, shape {tuple(A.shape)}); pass a larger rtol"
        )
    wide = A.to(torch.complex128) if A.is_complex() else A.double()
    # Of the parts of a complex number: its own absolute value may overflow.
    largest = (torch.view_as_real(wide).flatten(-2) if A.is_complex() else wide).abs().amax((-2, -1))
    finite = torch.isfinite(largest)
    if A.device.type != "cpu" or not bool(finite.all()):
        wide = torch.where(finite[..., None, None], wide, torch.zeros((), dtype=torch.float64))
        largest = largest.where(finite, 0.0)
    exponent: Tensor | None = None
    if A.dtype == wide.dtype:  # σ_max, or a difference of rows, may exceed the largest double
        exponent = 1 - torch.frexp(largest).exponent
        wide = _scaled(wide, exponent[..., None, None])
    if center:
        # About the first row, so that equal rows leave exactly 0; twice, as a far first row costs digits.
        wide = wide - wide[..., :1, :]
        for _ in range(2):
            wide = wide - wide.mean(-2, keepdim=True)
    if hermitian:
        sigma = torch.linalg.eigvalsh(wide).abs().sort(descending=True).values
    else:
        sigma = torch.linalg.svdvals(wide)
    return _counts_above(sigma, exponent, pairs, finite)[0]


def _scaled(x: Tensor, exponent: Tensor) -> Tensor:
    """x·2^exponent. In two steps: the power alone may exceed float64's range."""
    for part in (exponent // 2, exponent - exponent // 2):
        x = x * ((part.to(torch.int64) + 1023) << 52).view(torch.float64)  # exact, as a pow need not be
    return x


def _counts_above(
    sigma: Tensor, exponent: Tensor | None, pairs: Tensor, finite: Tensor
) -> tuple[Tensor, Tensor]:
    """Counts (*, t) of σ·2^-exponent above τ = max(atol, rtol·σ_max), and τ·2^exponent.

    sigma (*, k) descending, exponent (None: 0) and finite (*). A NaN threshold or a matrix that is not finite
    gives -1, a negative threshold k, rtol ≥ 1 gives 0.
    """
    absolute, relative = pairs.unbind(-1)
    if exponent is not None:
        absolute = _scaled(absolute, exponent[..., None])
    top = sigma[..., :1]
    # Not relative·top as it stands, or an infinite threshold times σ_max = 0 would be NaN.
    tau = torch.maximum(absolute, torch.where(relative < 1, relative.clamp(min=0) * top, torch.inf))
    counts = (sigma[..., None, :] > tau[..., None]).sum(-1)
    counts = torch.where((absolute < 0) & (relative < 0), sigma.shape[-1], counts)
    undefined = ~finite[..., None] | torch.isnan(absolute) | torch.isnan(relative)
    return counts.masked_fill(undefined, -1), tau
