"""gram_accumulate_: adds a chunk of rows to a streaming Gram matrix about a shared shift."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks
from ._register import implement


def gram_accumulate_(state: Tensor, A: Tensor, shift: Tensor) -> Tensor:
    """Adds the rows of A to `state`, in place: state += [1, X]ᵀ [1, X] with X = A - shift.

    Shapes: A (m, n) as `gram`; state (n + 1, n + 1) float64, contiguous: state[0, 0] the number of rows,
    state[0, 1:] = state[1:, 0] the shifted sums, state[1:, 1:] the Gram matrix about `shift` (n,) float64.
    States about the same shift add up, over chunks, micro-batches and ranks; the centred Gram matrix is
    state[1:, 1:] - s sᵀ / m. A shift near the mean keeps its digits.
    Non-finite rows make the state non-finite. Returns state, which never requires grad because A does.
    Does not synchronise. Cost as `gram`. Raises TypeError / ValueError that name the argument.
    """
    _checks.raise_public(_problem(state, A, shift))
    torch.ops.bsgap.gram_accumulate_(state, A, shift)
    return state


def _problem(state: object, A: Tensor, shift: object) -> _checks.Problem | None:
    wrong = _checks.matrix(A)
    if wrong is not None:
        return wrong
    if A.dim() != 2:
        return ValueError, f"A must have 2 dimensions (m, n), got shape {tuple(A.shape)}"
    n = A.shape[1]
    for name, value, shape in (("state", state, (n + 1, n + 1)), ("shift", shift, (n,))):
        if not isinstance(value, Tensor):
            return TypeError, f"{name} must be a torch.Tensor, got {type(value).__name__}"
        if value.dtype != torch.float64:
            return TypeError, f"{name} must be float64, got {value.dtype}"
        if tuple(value.shape) != shape:
            return ValueError, f"{name} must have shape {shape}, got {tuple(value.shape)}"
        if not value.is_contiguous():
            return ValueError, f"{name} must be contiguous"
        if value.device != A.device:
            return ValueError, f"{name} must be on the device of A ({A.device}), got {value.device}"
    return None


def _kernel(state: Tensor, A: Tensor, shift: Tensor) -> None:
    _checks.raise_raw("gram_accumulate_", _problem(state, A, shift))
    if A.numel() == 0:
        state[0, 0] += A.shape[0]
        return
    sums, gram = torch.ops.bsgap._shifted_gram(
        A.detach(), shift
    )  # or the state would keep the graph of A alive
    state[0, 0] += A.shape[0]
    state[0, 1:] += sums
    state[1:, 0] += sums
    state[1:, 1:] += gram


def _fake(state: Tensor, A: Tensor, shift: Tensor) -> None:
    _checks.raise_raw("gram_accumulate_", _problem(state, A, shift))


implement("gram_accumulate_", _kernel, _fake)
