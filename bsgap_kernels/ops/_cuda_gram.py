"""CUDA implementations of the private ops that return Gram matrices or their spectra."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from ._cuda import centred_gram_stage, count_stage, gram_stage, on_host, precision_of, rows_of, unscaling
from ._register import PrivateKernels, implement_private


def spectral_summary(A: Tensor, center: bool) -> Tensor:
    """Summary columns (B, columns) of each matrix."""
    if not _native.has_cuda_kernels():
        return on_host("_spectral_summary", A, center)
    found, _ = centred_gram_stage([A], "float64", center)
    counted = count_stage(found, rtol=1.0, spectrum=True)
    return torch.ops.bsgap._cuda_summaries(
        counted.eigenvalues, found.table, found.plan.sides, found.plan.batches, found.exponent
    )


def eigenvalues(A: Tensor, center: bool) -> tuple[Tensor, Tensor]:
    """Eigenvalues (B, k) and exponents (B,) as on a CPU, by torch's solver: without nvcc."""
    found, _ = centred_gram_stage([A], "float64", center)
    (row,) = rows_of(found)
    finite = torch.isfinite(row.grams.diagonal(dim1=-2, dim2=-1)).all(-1)
    exponent = found.exponent
    if exponent is None:
        exponent = torch.zeros(len(row.grams), dtype=torch.int32, device=A.device)
    lam = torch.linalg.eigvalsh(torch.where(finite[:, None, None], row.grams, 0.0))
    return lam, exponent.where(finite, torch.iinfo(torch.int32).min)


def feature_gram(A: Tensor, center: bool, float32_sums: bool = False) -> Tensor:
    """AᵀA (B, n, n) in float64, about the column means if centred; NaN for non-finite input."""
    found, _ = centred_gram_stage([A], precision_of(float32_sums), center, features_side=True)
    (row,) = rows_of(found)
    G = row.grams
    # One non-finite entry spoils its row and column only; the result says NaN everywhere, as on a CPU.
    G += torch.where(torch.isfinite(G.diagonal(dim1=-2, dim2=-1).sum(-1)), 0.0, torch.nan)[:, None, None]
    back = unscaling(found)
    if back is not None:
        G *= back[:, None, None]  # twice: its square may not be representable
        G *= back[:, None, None]
    return G


def shifted_gram(A: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Column sums (n,) and Gram matrix (n, n) of A - shift, A (m, n), in float64."""
    found = gram_stage([A], "float64", features_side=True, shift=shift)
    (row,) = rows_of(found)
    assert row.sums is not None
    sums, G = row.sums[0], row.grams[0]
    back = unscaling(found)
    return (sums, G) if back is None else (sums * back, G * back * back)


KERNELS: PrivateKernels = {
    "_spectral_summary": spectral_summary,
    "_eigenvalues": eigenvalues,
    "_feature_gram": feature_gram,
    "_shifted_gram": shifted_gram,
}
implement_private(KERNELS, "CUDA")
