"""What is timed: our ops, and what a user could write with torch or NumPy. All count σ > rtol·σ_max."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..dispatch import select_backend

Result = Tensor | tuple[Tensor, Tensor]
"""Counts, or the lower and upper ends of intervals; one entry a matrix."""

NEAR_RANK = "near_rank"
INTERVAL = "near_rank_interval"
PROBED = "near_rank_interval probed"
RECORD = "record of the tracker"
MATRIX_RANK = "torch.linalg.matrix_rank"
SVDVALS = "torch.linalg.svdvals"
MAX_COVARIANCE_SIDE = 4096
"""torch.cov is always features x features: past this a wide input pays more for it than for any peer."""


@dataclass(frozen=True)
class Contender:
    """One way to count. `grouped` serves a list of matrices in one call, else they are taken in turn."""

    name: str
    ours: bool
    run: Callable[[Tensor, float], Result]
    grouped: Callable[[list[Tensor], float], Result] | None = None
    centred: bool = False
    """Counts the centred matrix, and is checked against that."""

    def __call__(self, inputs: list[Tensor], rtol: float) -> Result:
        """Counts of all matrices of a case's input."""
        if len(inputs) == 1:
            return self.run(inputs[0], rtol)
        if self.grouped is not None:
            return self.grouped(inputs, rtol)
        results = [self.run(A, rtol) for A in inputs]
        if isinstance(results[0], tuple):
            return torch.stack([r[0] for r in results]), torch.stack([r[1] for r in results])
        return torch.stack([r for r in results if isinstance(r, Tensor)])

    def suits(self, shapes: Sequence[tuple[int, ...]]) -> bool:
        """Whether it is timed on such shapes."""
        return not self.centred or all(shape[-1] <= MAX_COVARIANCE_SIDE for shape in shapes)


def count_squares(eigenvalues: Tensor, rtol: float) -> Tensor:
    """Counts from eigenvalues σ² in ascending order."""
    return torch.sum(eigenvalues > rtol * rtol * eigenvalues[..., -1:], -1)


def matrix_rank(A: Tensor, rtol: float) -> Tensor:
    """torch's own count."""
    counts: Tensor = torch.linalg.matrix_rank(A, rtol=rtol)
    return counts


def singular_values(A: Tensor, rtol: float) -> Tensor:
    """Counts the singular values, in A's dtype."""
    sigma = torch.linalg.svdvals(A)
    return torch.sum(sigma > rtol * sigma[..., :1], -1)


def torch_gram(A: Tensor, rtol: float) -> Tensor:
    """The smaller Gram matrix in float32, and its eigenvalues."""
    gram = A.mT @ A if A.shape[-1] <= A.shape[-2] else A @ A.mT
    return count_squares(torch.linalg.eigvalsh(gram), rtol)


def torch_covariance(A: Tensor, rtol: float) -> Tensor:
    """Eigenvalues of torch.cov, which takes one matrix at a time."""
    if A.dim() == 2:
        return count_squares(torch.linalg.eigvalsh(torch.cov(A.T)), rtol)
    covariances = torch.stack([torch.cov(X.T) for X in A.flatten(0, -3)])
    return count_squares(torch.linalg.eigvalsh(covariances), rtol).view(A.shape[:-2])


def torch_gram64(A: Tensor, rtol: float) -> Tensor:
    """As torch_gram in float64: right for the thresholds that float32 sums cannot resolve."""
    return torch_gram(A.double(), rtol)


def _numpy_gram(A: Tensor) -> Any:
    a = A.numpy()
    t = a.swapaxes(-1, -2)
    return np.matmul(t, a) if a.shape[-1] <= a.shape[-2] else np.matmul(a, t)


def numpy_gram(A: Tensor, rtol: float) -> Tensor:
    """NumPy's Gram matrix (for one matrix a syrk, half of the work) and NumPy's eigenvalues."""
    return count_squares(torch.from_numpy(np.atleast_1d(np.linalg.eigvalsh(_numpy_gram(A)))), rtol)


def numpy_gram_torch_eigenvalues(A: Tensor, rtol: float) -> Tensor:
    """NumPy's Gram matrix and torch's eigenvalues: often the best of both."""
    return count_squares(torch.linalg.eigvalsh(torch.from_numpy(_numpy_gram(A))), rtol)


def numpy_gram64_torch_eigenvalues(A: Tensor, rtol: float) -> Tensor:
    """NumPy's Gram matrix in float64 and torch's eigenvalues."""
    return numpy_gram_torch_eigenvalues(A.double(), rtol)


def near_rank(A: Tensor, rtol: float) -> Tensor:
    """Our count."""
    return ops.near_rank(A, rtol=rtol)


def interval_rigorous(A: Tensor, rtol: float) -> Result:
    """Our proven bounds, deterministic."""
    lower, upper = ops.near_rank_interval(A, rtol=rtol)
    return lower, upper


def interval_probed(A: Tensor, rtol: float) -> Result:
    """Our proven bounds, with a failure probability of 1e-9."""
    lower, upper = ops.near_rank_interval(A, rtol=rtol, mode="probed")
    return lower, upper


def record(A: Tensor, rtol: float) -> Tensor:
    """All that the tracker logs of a matrix: count, bounds and summary."""
    counts: Tensor = torch.ops.bsgap._spectral_record(A, rtol=rtol)[0]
    return counts


CONTENDERS = (
    Contender(NEAR_RANK, True, near_rank, lambda As, rtol: ops.near_rank_grouped(As, rtol=rtol)),
    Contender(INTERVAL, True, interval_rigorous),
    Contender(PROBED, True, interval_probed),
    Contender(RECORD, True, record),
    Contender(MATRIX_RANK, False, matrix_rank),
    Contender(SVDVALS, False, singular_values),
    Contender("torch Gram + eigvalsh", False, torch_gram),
    Contender("torch.cov + eigvalsh", False, torch_covariance, centred=True),
    Contender("NumPy Gram + eigvalsh", False, numpy_gram),
    Contender("NumPy Gram + torch eigvalsh", False, numpy_gram_torch_eigenvalues),
    Contender("torch float64 Gram + eigvalsh", False, torch_gram64),
    Contender("NumPy float64 Gram + torch eigvalsh", False, numpy_gram64_torch_eigenvalues),
)


@dataclass(frozen=True)
class Phase:
    """A part of our ops, timed as the difference of two calls (`upto` minus `less`)."""

    op: str
    name: str
    upto: Callable[[Tensor, float], object]
    less: Callable[[Tensor, float], object] | None = None


GRAM_PHASE = "Gram matrix"


def _gram_of_near_rank(A: Tensor, rtol: float) -> object:
    float32 = select_backend(NEAR_RANK, A.dtype, *A.shape[-2:], rtol=rtol).gram == "float32"
    # No thresholds: the Gram matrix is formed and nothing is counted.
    return torch.ops.bsgap._counts(A, torch.empty(1, 0, 2, dtype=torch.float64), 0.0, 0.0, False, float32)


def _gram64(A: Tensor, rtol: float) -> object:
    return torch.ops.bsgap._small_gram(A, 0.0, rtol, False, False)


def _certified(A: Tensor, rtol: float) -> object:
    return torch.ops.bsgap._small_gram(A, 0.0, rtol, False, True)


PHASES = (
    Phase(NEAR_RANK, GRAM_PHASE, _gram_of_near_rank),
    Phase(NEAR_RANK, "count", near_rank, _gram_of_near_rank),
    Phase(INTERVAL, GRAM_PHASE, _gram64),
    Phase(INTERVAL, "certified count", _certified, _gram64),
    Phase(RECORD, GRAM_PHASE, _gram64),
    Phase(RECORD, "certified count", _certified, _gram64),
    Phase(RECORD, "eigenvalues and summary", record, _certified),
)
