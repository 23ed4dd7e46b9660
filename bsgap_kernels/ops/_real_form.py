"""Complex matrices as the real ones that our kernels read.

B = [[Re A, -Im A], [Im A, Re A]] has every singular value of A twice: counts of B are twice those of A.
"""

from __future__ import annotations

import torch
from torch import Tensor


def real_form(A: Tensor, rows: int = -2) -> Tensor:
    """B of a complex A, a real A itself. rows: the dimension of A that grows with the rows of B."""
    if not A.is_complex():
        return A
    real, imag = A.real, A.imag
    return torch.cat((torch.cat((real, -imag), -1), torch.cat((imag, real), -1)), rows)


def halved(counts: Tensor, A: Tensor) -> Tensor:
    """Counts of A from those of real_form(A); -1 stays. Rounding makes one odd where σ lies in its band."""
    return counts.div(2, rounding_mode="floor") if A.is_complex() else counts


def halved_interval(lower: Tensor, upper: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of A's count c from lower <= 2c <= upper: the least and the largest integer between the halves.

    One odd number as both ends contradicts that, as ends in the wrong order would: then nothing is known.
    """
    if not A.is_complex():
        return lower, upper
    low = (lower + (lower > 0)).div(2, rounding_mode="floor")
    high = halved(upper, A)
    contradiction = low > high
    return low.masked_fill(contradiction, 0), high.masked_fill(contradiction, min(A.shape[-2:]))
