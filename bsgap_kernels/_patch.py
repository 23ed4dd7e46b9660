"""near_rank in the place of torch.linalg.matrix_rank, for the length of a `with` block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from .ops.near_rank import Tolerance, as_tensor


def matrix_rank(
    input: Tensor,
    tol: Tolerance = None,
    hermitian: bool = False,
    *,
    atol: Tolerance = None,
    rtol: Tolerance = None,
    out: Tensor | None = None,
) -> Tensor:
    """torch.linalg.matrix_rank with its own arguments and kinds of errors, counted by near_rank."""
    op = torch.ops.bsgap.near_rank
    of_tensors = any(isinstance(value, Tensor) for value in (tol, atol, rtol))
    if of_tensors:
        tol, atol, rtol = (as_tensor(value, input) for value in (tol, atol, rtol))
    if out is not None:
        run = op.tensor_out if of_tensors else op.out
        return run(input, tol, hermitian, atol=atol, rtol=rtol, out=out)
    run = op.tensor if of_tensors else op.default
    return run(input, tol, hermitian, atol=atol, rtol=rtol)


@contextlib.contextmanager
def patch() -> Iterator[None]:
    """Let torch.linalg.matrix_rank be near_rank inside a `with` block, in the whole process.

    Blocks nest, and what was there before comes back whatever ends a block. Not reached: the function where
    other code holds it already, code compiled before, and torch.ops.aten.linalg_matrix_rank. Differs from
    torch: a matrix that is not finite counts -1, a negative tolerance is refused, 16-bit input is counted.
    """
    before = torch.linalg.matrix_rank
    torch.linalg.matrix_rank = matrix_rank
    try:
        yield
    finally:
        torch.linalg.matrix_rank = before
