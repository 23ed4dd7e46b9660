"""The Hermitian matrix that torch reads of a square one: singular values are its |eigenvalues|."""

from __future__ import annotations

from torch import Tensor

from . import _checks


def problem(A: Tensor, center: object, hermitian: object) -> _checks.Problem | None:
    """Square matrices, not centred."""
    wrong = _checks.flag(hermitian, "hermitian")
    if wrong is not None or hermitian is False:
        return wrong
    if A.shape[-2] != A.shape[-1]:
        return ValueError, f"hermitian=True takes square matrices (*, n, n), got shape {tuple(A.shape)}"
    if center is True:
        return ValueError, "hermitian=True takes no center=True: what is left is not Hermitian"
    return None


def of_lower_triangle(A: Tensor) -> Tensor:
    """The Hermitian matrices with the lower triangles of A and the real parts of its diagonals, a copy."""
    below, diagonal = A.tril(-1), A.diagonal(dim1=-2, dim2=-1)
    whole: Tensor = below + below.mH
    whole.diagonal(dim1=-2, dim2=-1).copy_(diagonal.real if A.is_complex() else diagonal)
    return whole
