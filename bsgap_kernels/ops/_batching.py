"""torch.func.vmap of the public ops: one call with one dimension more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._functorch.vmap import unwrap_batched, wrap_batched

from ..schema import LIBRARY

Rule = Callable[..., Any]
"""(batch size, op, dims, *tensors, **options): the result of op with the batch in front.

dims: where each tensor has the dimension that is mapped over, None where it has none.
"""


def batched(name: str, rule: Rule) -> None:
    """Registers the batching rule of an op, to which tensors given by keyword come as (tensor, dim)."""
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.bsgap, packet), overload or "default")

    def kernel(*args: Any, **options: Any) -> Any:
        interpreter = retrieve_current_functorch_interpreter()
        level = interpreter.level()
        (args, options), (dims, option_dims) = unwrap_batched((args, options), level)
        for key, value in options.items():
            if isinstance(value, Tensor):
                options[key] = (value, option_dims[key])
        lower = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)
        with torch._C._ExcludeDispatchKeyGuard(lower):
            result = rule(interpreter.batch_size(), op, dims, *args, **options)  # type: ignore[attr-defined]
        return None if result is None else wrap_batched(result, 0, level)

    LIBRARY.impl(name, kernel, "FuncTorchBatched")


def in_front(x: Tensor, dim: int | None) -> Tensor:
    """x with the mapped dimension first, of size 1 where it has none."""
    return x.unsqueeze(0) if dim is None else x.movedim(dim, 0)


def _matrix(size: int, op: Any, dims: tuple[int, ...], A: Tensor, *args: Any, **options: Any) -> Any:
    return op(in_front(A, dims[0]), *args, **options)


def _tensor_tolerances(
    size: int,
    op: Any,
    dims: tuple[int | None, ...],
    A: Tensor,
    tol: Tensor | None = None,
    hermitian: bool = False,
    **options: Any,
) -> Tensor:
    if isinstance(tol, Tensor):
        options["tol"] = (tol, dims[1])
    if hermitian:
        options["hermitian"] = True
    return _broadcast(size, op, in_front(A, dims[0]), 0, options)


def _weights(size: int, op: Any, dims: tuple[int | None], A: Tensor, **options: Any) -> Tensor:
    return _broadcast(size, op, in_front(A, dims[0]), 1, options)


def _broadcast(size: int, op: Any, A: Tensor, own: int, options: dict[str, Any]) -> Tensor:
    """op of A and of tensors among the options, which have `own` dimensions behind those of the batch.

    Batches broadcast from their end: ones are put between their dimensions and the new first one.
    """
    given = {key: in_front(*value) for key, value in options.items() if isinstance(value, tuple)}
    most = max(A.dim() - 3, *(value.dim() - 1 - own for value in given.values()))

    def padded(x: Tensor, behind: int) -> Tensor:
        return x.reshape(x.shape[0], *(1,) * (most + 1 + behind - x.dim()), *x.shape[1:])

    result: Tensor = op(padded(A, 2), **options | {key: padded(value, own) for key, value in given.items()})
    return result.expand(size, *result.shape[1:])


def _thresholds(
    size: int, op: Any, dims: tuple[int | None, int | None], A: Tensor, thresholds: Tensor, **options: Any
) -> Tensor:
    A, thresholds = in_front(A, dims[0]), in_front(thresholds, dims[1])
    A = A.expand(size, *A.shape[1:])
    own = thresholds.reshape(
        thresholds.shape[0], *(1,) * (A.dim() - 1 - thresholds.dim()), *thresholds.shape[1:]
    )
    counts: Tensor = op(A, own.expand(*A.shape[:-2], own.shape[-1]), **options)
    return counts


def _grouped(
    size: int, op: Any, dims: tuple[Sequence[int | None]], As: Sequence[Tensor], **options: Any
) -> Tensor:
    slices = [in_front(A, dim).unbind(0) for A, dim in zip(As, dims[0], strict=True)]
    counts = iter(op([A for own in slices for A in own], **options).split([len(own) for own in slices]))
    return torch.stack([own.expand(size) for own in counts], 1)


def _accumulate(size: int, op: Any, dims: tuple[int | None, ...], state: Tensor, *others: Tensor) -> None:
    if dims[0] is None:
        raise RuntimeError("bsgap::gram_accumulate_: vmap over A or shift needs a state of its own for each")
    state = state.movedim(dims[0], 0)
    A, shift = (in_front(x, dim) for x, dim in zip(others, dims[1:], strict=True))
    for own in zip(state, A.expand(size, *A.shape[1:]), shift.expand(size, *shift.shape[1:]), strict=True):
        op(*own)


for _name in ("gram", "covariance", "near_rank", "near_rank_ratio", "near_rank_interval", "spectral_summary"):
    batched(_name, _matrix)
for _name in ("near_rank.tensor", "near_rank_ratio.tensor"):
    batched(_name, _tensor_tolerances)
batched("covariance.weighted", _weights)
batched("singular_value_counts", _thresholds)
batched("near_rank_grouped", _grouped)
batched("gram_accumulate_", _accumulate)
