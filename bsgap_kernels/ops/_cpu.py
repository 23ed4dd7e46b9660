"""Private ops of the CPU that need a solver of torch; all others are C++ (csrc/cpu)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._register import PrivateKernels, implement_private


def eigenvalues(A: Tensor, center: bool) -> tuple[Tensor, Tensor]:
    """Eigenvalues (B, k), ascending, of the smaller Gram matrix of 2^exponent A, and the exponents (B,)."""
    gram, exponent = torch.ops.bsgap._small_gram(A, center)
    return torch.linalg.eigvalsh(gram), exponent


def spectral_summary(A: Tensor, center: bool) -> Tensor:
    """Summary columns (B, columns) of each matrix."""
    return torch.ops.bsgap._summarize(*eigenvalues(A, center), *A.shape[-2:])


def gram_eigenvalues(grams: Sequence[Tensor]) -> Tensor:
    """Eigenvalues, ascending, of each Gram matrix back to back; NaN where one is not finite."""
    return torch.cat([_of_one(gram) for gram in grams])


def _of_one(gram: Tensor) -> Tensor:
    if not bool(gram.diagonal().sum().isfinite()):  # a solver would raise
        return gram.new_full((gram.shape[0],), torch.nan)
    return torch.linalg.eigvalsh(gram)


KERNELS: PrivateKernels = {
    "_eigenvalues": eigenvalues,
    "_spectral_summary": spectral_summary,
    "_gram_eigenvalues": gram_eigenvalues,
}
implement_private(KERNELS, "CPU")
