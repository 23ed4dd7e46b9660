"""Derivatives of the ops that have some: reverse and forward mode, also under torch.func's transforms.

The kernel of the Autograd key is an autograd function of one level: functorch has taken its own levels apart
before it gets here, and what is called below takes the next one apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from ..schema import LIBRARY

Gradient = Callable[..., Tensor]
"""(A, vector, **options): the gradient with respect to A of <vector, op(A)>, or the tangent of op(A) for the
tangent `vector` of A. Differentiable itself."""


def derivative(name: str, *, gradient: Gradient, tangent: Gradient) -> None:
    """Registers both derivatives of an op of one matrix A and keyword options."""
    op = getattr(torch.ops.bsgap, name).default

    class Differentiated(_SingleLevelFunction):
        @staticmethod
        def forward(A: Tensor, options: dict[str, Any]) -> Tensor:
            # apply() turns derivatives off; the levels below this one have theirs.
            with (
                torch.enable_grad(),
                forward_ad._set_fwd_grad_enabled(True),
                torch._C._AutoDispatchBelowAutograd(),
            ):
                result: Tensor = op(A, **options)
            return result

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, dict[str, Any]], output: Tensor) -> None:
            ctx.save_for_backward(inputs[0])
            ctx.save_for_forward(inputs[0])
            ctx.options = inputs[1]

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            (A,) = ctx.saved_tensors
            return gradient(A, grad, **ctx.options), None

        @staticmethod
        def jvp(ctx: Any, vector: Tensor, _: None) -> Tensor:
            (A,) = ctx.saved_tensors
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                return tangent(forward_ad.unpack_dual(A, level=0).primal, vector, **ctx.options)

    def kernel(A: Tensor, **options: Any) -> Any:
        with enable_single_level_autograd_function():
            return Differentiated.apply(A, options)  # type: ignore[attr-defined]

    LIBRARY.impl(name, kernel, "Autograd")
