"""Registration shared by the op files: one implementation per op and dispatch key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..schema import LIBRARY


def implement(name: str, cpu: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Binds the CPU implementation and the shape function of an op."""
    LIBRARY.impl(name, cpu, "CPU")
    torch.library.register_fake(f"bsgap::{name}", fake, lib=LIBRARY)


def nondifferentiable(name: str) -> None:
    """Outputs of the op never require grad: its Autograd kernel runs the op below autograd.

    A backward that raises would fail under tracing, and no kernel at all gives silent None gradients.
    """
    packet, _, overload = name.partition(".")

    def below_autograd(*args: Any, **kwargs: Any) -> Any:
        op = getattr(getattr(torch.ops.bsgap, packet), overload or "default")
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args, **kwargs)

    LIBRARY.impl(name, below_autograd, "Autograd")
