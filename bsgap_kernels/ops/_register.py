"""Registration of ops: public ones run the private ones of the tensor's device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

from ..schema import LIBRARY


def implement(
    name: str, kernel: Callable[..., Any], fake: Callable[..., Any], *, differentiable: bool = True
) -> None:
    """Register an op's implementation for CPU and CUDA, and its shape function.

    differentiable: false if outputs never require grad. By the fallthrough the op then records nothing, by
    the guard nor do ops inside it. A raising backward would break tracing, one in Python would enter the
    dispatcher twice a call.
    """
    run = kernel if differentiable else _below_autograd(kernel)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, key)
    if not differentiable:
        LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"bsgap::{name}", fake, lib=LIBRARY)


PrivateKernels = Mapping[str, Callable[..., Any]]
"""Implementations of private ops on one device, by the op's name."""


def implement_private(kernels: PrivateKernels, device: Literal["CPU", "CUDA"]) -> None:
    """Register them; the tests' virtual GPU registers those of CUDA for the CPU."""
    for name, kernel in kernels.items():
        LIBRARY.impl(name, kernel, device)


def _below_autograd(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return kernel(*args, **kwargs)

    return run
