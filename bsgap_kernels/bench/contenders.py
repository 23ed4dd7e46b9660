"""What is timed: our ops, and what a user could write with torch or NumPy. All count σ > rtol·σ_max."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..dispatch import select_backend
from .cases import Case
from .tracker_step import tracker_step

Result = Tensor | tuple[Tensor, Tensor]
"""Counts, or the lower and upper ends of intervals; one entry a matrix."""

NEAR_RANK = "near_rank"
INTERVAL = "near_rank_interval"
PROBED = "near_rank_interval probed"
TRACKER = "RankTracker"
MATRIX_RANK = "torch.linalg.matrix_rank"
SVDVALS = "torch.linalg.svdvals"
LARGEST_SIDE = 2048
"""torch.cov (always features x features) and NumPy's eigvalsh are past this far from the best peer."""
GEMM_ERROR = {torch.float32: 1e-6, torch.float64: 1.2e-14}
"""Assumed ‖ΔG‖₂/λ_max of a Gram matrix formed by a BLAS, whose chains of additions have an unknown length."""
RIGHT_BAND = 0.01
"""Right by construction: rounding moves a singular value near τ by no more than this share of it."""


def finest_rtol(dtype: torch.dtype) -> float:
    """Smallest rtol at which a BLAS's Gram matrix counts right by construction.

    An error of η·λ_max moves σ near τ = rtol·σ_max by η/(2·rtol²) of itself (Weyl): float32 serves from
    rtol 7.1e-3 on, float64 from 7.7e-7.
    """
    return math.sqrt(GEMM_ERROR[dtype] / (2 * RIGHT_BAND))


@dataclass(frozen=True)
class Contender:
    """One way to count. `grouped` serves a list of matrices in one call, else they are taken in turn."""

    name: str
    ours: bool
    run: Callable[[Tensor, float], Result]
    grouped: Callable[[list[Tensor], float], Result] | None = None
    centred: bool = False
    """Counts the centred matrix, and is checked against that."""
    finest_rtol: float = 0.0
    """Below it counts are not right by construction: right on one matrix, wrong on another."""
    suits: Callable[[Case, float], bool] = lambda case, rtol: True
    """Return whether to time it on a case at an rtol."""
    once: Callable[[Case], bool] = lambda case: False
    """Return whether to time it at the first rtol of a run only, since its work is the same at any."""

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


def numpy_gram64(A: Tensor, rtol: float) -> Tensor:
    """As numpy_gram in float64."""
    return numpy_gram(A.double(), rtol)


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


def _tracked(A: Tensor, rtol: float) -> Tensor:
    return tracker_step([A], rtol)


def _is_probed(case: Case, rtol: float) -> bool:
    """Return whether mode `probed` probes any matrix of the case; otherwise it is the rigorous call."""
    plans = (
        select_backend(INTERVAL, case.dtype, *shape[-2:], rtol=rtol, mode="probed") for shape in case.shapes
    )
    return any(plan.certificate == "probed" for plan in plans)


def _are_single(case: Case, rtol: float) -> bool:
    return all(len(shape) == 2 for shape in case.shapes)


def small_covariance(case: Case, rtol: float) -> bool:
    """Return whether to time torch.cov on a case."""
    return all(shape[-1] <= LARGEST_SIDE for shape in case.shapes)


def _small(case: Case, rtol: float) -> bool:
    return all(min(shape[-2:]) <= LARGEST_SIDE for shape in case.shapes)


def _past_float32(case: Case, rtol: float) -> bool:
    """Return whether rtol is too fine for float32 Gram matrices; elsewhere float64 ones are always slower."""
    return rtol < finest_rtol(torch.float32)


def _peer(name: str, run: Callable[[Tensor, float], Tensor], dtype: torch.dtype, **options: Any) -> Contender:
    return Contender(name, False, run, finest_rtol=finest_rtol(dtype), **options)


CONTENDERS = (
    Contender(NEAR_RANK, True, near_rank, lambda As, rtol: ops.near_rank_grouped(As, rtol=rtol)),
    Contender(INTERVAL, True, interval_rigorous),
    Contender(PROBED, True, interval_probed, suits=_is_probed),
    Contender(TRACKER, True, _tracked, tracker_step, suits=_are_single, once=lambda case: True),
    Contender(MATRIX_RANK, False, matrix_rank, once=lambda case: case.slow),
    _peer("torch Gram + eigvalsh", torch_gram, torch.float32),
    _peer("torch.cov + eigvalsh", torch_covariance, torch.float32, centred=True, suits=small_covariance),
    _peer("NumPy Gram + eigvalsh", numpy_gram, torch.float32, suits=_small),
    _peer("NumPy Gram + torch eigvalsh", numpy_gram_torch_eigenvalues, torch.float32),
    _peer("torch float64 Gram + eigvalsh", torch_gram64, torch.float64, suits=_past_float32),
    _peer(
        "NumPy float64 Gram + eigvalsh",
        numpy_gram64,
        torch.float64,
        suits=lambda case, rtol: _past_float32(case, rtol) and _small(case, rtol),
    ),
    _peer(
        "NumPy float64 Gram + torch eigvalsh",
        numpy_gram64_torch_eigenvalues,
        torch.float64,
        suits=_past_float32,
    ),
)


def taking_part(
    contenders: Sequence[Contender], case: Case, rtols: Sequence[float]
) -> dict[float, list[Contender]]:
    """Who is timed on a case at each threshold of a run."""
    return {
        rtol: [c for c in contenders if c.suits(case, rtol) and (rtol == rtols[0] or not c.once(case))]
        for rtol in rtols
    }


@dataclass(frozen=True)
class Phase:
    """A part of our ops, timed as the difference of two calls (`upto` minus `less`)."""

    op: str
    name: str
    upto: Callable[[Tensor, float], object]
    less: Callable[[Tensor, float], object] | None = None


GRAM_PHASE = "Gram matrix"


def _gram(A: Tensor, float32: bool) -> object:
    # No thresholds: the Gram matrix is formed and nothing is counted.
    return torch.ops.bsgap._counts(A, torch.empty(1, 0, 2, dtype=torch.float64), 0.0, 0.0, False, float32)


def _gram_of_near_rank(A: Tensor, rtol: float) -> object:
    return _gram(A, select_backend(NEAR_RANK, A.dtype, *A.shape[-2:], rtol=rtol).gram == "float32")


def _gram64(A: Tensor, rtol: float) -> object:
    return _gram(A, False)


PHASES = (
    Phase(NEAR_RANK, GRAM_PHASE, _gram_of_near_rank),
    Phase(NEAR_RANK, "count", near_rank, _gram_of_near_rank),
    Phase(INTERVAL, GRAM_PHASE, _gram64),
    Phase(INTERVAL, "certified count", interval_rigorous, _gram64),
)
