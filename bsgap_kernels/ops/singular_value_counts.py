"""singular_value_counts: how many singular values exceed each of several thresholds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks
from ._register import implement
from .near_rank import count_pairs


def singular_value_counts(
    A: Tensor, thresholds: Tensor, *, relative: bool = True, center: bool = False, **refused: Any
) -> Tensor:
    """#{σ > t·σ_max} for every threshold t, or #{σ > t} with relative=False.

    Shapes: A (*, m, n) as `near_rank`; thresholds (t,) or (*, t), any real dtype, on A's device;
    result (*, t), int64. One Gram matrix and one σ_max serve all thresholds; the float64 Gram resolves
    thresholds from 2e-7 (a few rows) to 7e-6 (a million; on a GPU 4e-5) of σ_max on (`float64_gram_min_rtol`
    in dispatch.py). A smaller one takes float64 singular values on a CPU; on a GPU nothing is read back, and
    such a count may be wrong without notice. Right outside a 1 % band, as `near_rank`.
    Whatever A holds, also σ_max = 0, and however many thresholds there are: a NaN threshold gives -1, a
    negative one (-inf too) min(m, n), 1 and more with `relative` and inf give 0. Non-finite input gives -1,
    an empty matrix 0.
    Never requires grad. Cost: a Gram matrix, then one LDLᵀ a threshold (on a CPU up to 8
    beyond side 64, on a GPU up to 4 beyond side 128; more take all eigenvalues).
    Raises TypeError / ValueError that name the argument.
    """
    _checks.refuse("singular_value_counts", refused)
    _checks.raise_public(
        _problem(A, thresholds, center)
        or _checks.flag(relative, "relative")
        or _checks.flag(center, "center")
    )
    return torch.ops.bsgap.singular_value_counts(A, thresholds, relative=relative, center=center)


def _problem(A: Tensor, thresholds: object, center: object) -> _checks.Problem | None:
    wrong = _checks.counted_matrix(A) or _checks.centred(A, center)
    if wrong is not None:
        return wrong
    if not isinstance(thresholds, Tensor):
        return TypeError, f"thresholds must be a torch.Tensor, got {type(thresholds).__name__}"
    if thresholds.dtype.is_complex or thresholds.dtype == torch.bool:
        return TypeError, f"thresholds must be real numbers, got {thresholds.dtype}"
    if thresholds.dim() < 1:
        return ValueError, "thresholds must have at least 1 dimension (t,) or (*, t), got a scalar"
    if thresholds.device != A.device:
        return ValueError, f"thresholds must be on the device of A ({A.device}), got {thresholds.device}"
    if thresholds.dim() == 1:
        return None
    if thresholds.shape[:-1] != A.shape[:-2]:
        text = f"thresholds must have shape (t,) or {(*A.shape[:-2], 't')}, got {tuple(thresholds.shape)}"
        return ValueError, text
    return None


def _kernel(A: Tensor, thresholds: Tensor, *, relative: bool = True, center: bool = False) -> Tensor:
    _checks.raise_raw("singular_value_counts", _problem(A, thresholds, center))
    if A.numel() == 0 or thresholds.shape[-1] == 0:
        return A.new_zeros((*A.shape[:-2], thresholds.shape[-1]), dtype=torch.int64)
    values = thresholds.double()
    zeros = torch.zeros_like(values)
    # A negative threshold lies below every singular value on its own, not beside an absolute 0.
    other = torch.where(values < 0, values, zeros)
    pairs = torch.stack((other, values) if relative else (values, other), -1)
    return count_pairs("singular_value_counts", A, pairs, center)


def _fake(A: Tensor, thresholds: Tensor, *, relative: bool = True, center: bool = False) -> Tensor:
    _checks.raise_raw("singular_value_counts", _problem(A, thresholds, center))
    return A.new_empty((*A.shape[:-2], thresholds.shape[-1]), dtype=torch.int64)


implement("singular_value_counts", _kernel, _fake, differentiable=False)
