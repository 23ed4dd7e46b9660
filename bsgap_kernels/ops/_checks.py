"""Checks of arguments, by dtype, shape and option only: never by value, so never a synchronisation.

Each check returns what is wrong as (kind, text), or None. Public wrappers raise the kind; raw ops raise
RuntimeError with the same text.
"""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

DTYPES = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))
COUNTED_DTYPES = DTYPES | {torch.complex128, torch.complex64}
Problem = tuple[type[Exception], str]


def counted_matrix(A: object) -> Problem | None:
    """A tensor (*, m, n) whose singular values can be counted: real or complex."""
    return matrix(A, dtypes=COUNTED_DTYPES)


def matrix(A: object, name: str = "A", dtypes: frozenset[torch.dtype] = DTYPES) -> Problem | None:
    """A floating tensor (*, m, n) of one of `dtypes`."""
    if not isinstance(A, Tensor):
        return TypeError, f"{name} must be a torch.Tensor, got {type(A).__name__}"
    if A.layout != torch.strided:
        return TypeError, f"{name} must be a dense (strided) tensor, got layout {A.layout}"
    if A.dtype not in dtypes:
        if A.dtype.is_complex:
            return (
                TypeError,
                f"{name}: complex input ({A.dtype}) is not supported, expected a real floating dtype",
            )
        return TypeError, f"{name} must be float64, float32, bfloat16 or float16, got {A.dtype}"
    if A.dim() < 2:
        return ValueError, f"{name} must have at least 2 dimensions (*, m, n), got shape {tuple(A.shape)}"
    return None


def tolerance(value: object, name: str, A: Tensor) -> Problem | None:
    """None, a non-negative number, or a real tensor that broadcasts with the batch of A.

    NumPy's scalars are numbers. A tensor of one number may be on the CPU, any other is on A's device.
    """
    if value is None or (type(value) is float and value >= 0):  # the common case, before abstract classes
        return None
    if isinstance(value, Tensor):
        if value.dtype.is_complex or value.dtype == torch.bool:
            return TypeError, f"{name} must be a real number, got a tensor of dtype {value.dtype}"
        if value.device != A.device and not (value.dim() == 0 and value.device.type == "cpu"):
            return ValueError, f"{name} must be on the device of A ({A.device}), got {value.device}"
        return broadcasts(value.shape, A.shape[:-2], name)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return TypeError, f"{name} must be a number, a tensor or None, got {type(value).__name__}"
    if not float(value) >= 0:
        return ValueError, f"{name} must be a non-negative number, got {value}"
    return None


def broadcasts(shape: torch.Size, batch: torch.Size, name: str) -> Problem | None:
    """`shape` must broadcast with the batch shape of A."""
    for have, want in zip(reversed(shape), reversed(batch), strict=False):
        if have != want and have != 1 and want != 1:
            text = (
                f"{name} of shape {tuple(shape)} does not broadcast with the batch shape {tuple(batch)} of A"
            )
            return ValueError, text
    return None


def centred(A: Tensor, center: object) -> Problem | None:
    """No complex matrix about its column means: those of its real form are others."""
    if center is True and A.dtype.is_complex:
        text = f"center=True of complex input ({A.dtype}) is not supported: subtract the column means first"
        return ValueError, text
    return None


def flag(value: object, name: str) -> Problem | None:
    """A bool, and nothing that merely behaves like one."""
    if not isinstance(value, bool):
        return TypeError, f"{name} must be True or False, got {value!r}"
    return None


def first(*problems: Problem | None) -> Problem | None:
    """The first thing that is wrong."""
    for problem in problems:
        if problem is not None:
            return problem
    return None


def raise_public(problem: Problem | None) -> None:
    """For the public wrappers."""
    if problem is not None:
        raise problem[0](problem[1])


def raise_raw(op: str, problem: Problem | None) -> None:
    """For the raw ops."""
    if problem is not None:
        raise RuntimeError(f"bsgap::{op}: {problem[1]}")


def refuse(op: str, unknown: dict[str, Any]) -> None:
    """Keyword arguments of torch.linalg.matrix_rank that are refused by name, and anything else."""
    reasons = {
        "hermitian": "hermitian input is not supported: pass the matrix itself, singular values are the same",
        "out": "out= is not supported: use the returned tensor",
        "tol": "tol is not supported: use atol (absolute) or rtol (relative)",
    }
    for name in unknown:
        if name in reasons:
            raise TypeError(f"{op}: {reasons[name]}")
        raise TypeError(f"{op}() got an unexpected keyword argument '{name}'")
