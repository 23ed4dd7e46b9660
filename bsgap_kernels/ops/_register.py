"""Registration shared by the op files: one implementation per op and dispatch key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..schema import LIBRARY
from . import _cpu, _cuda


class Engine(Protocol):
    """What a device brings: `_cpu.py` and `_cuda.py`, whose functions say what each returns."""

    def count_scalar(
        self, op: str, A: Tensor, atol: float | None, rtol: float | None, center: bool, /
    ) -> Tensor: ...
    def count_pairs(self, op: str, A: Tensor, pairs: Tensor, center: bool, /) -> Tensor: ...
    def count_grouped(
        self, op: str, As: Sequence[Tensor], atol: float | None, rtol: float | None, center: bool, /
    ) -> Tensor: ...
    def intervals(
        self,
        op: str,
        A: Tensor,
        atol: float | None,
        rtol: float | None,
        center: bool,
        mode: str,
        seed: int,
        /,
    ) -> tuple[Tensor, Tensor]: ...
    def summary(self, A: Tensor, center: bool, /) -> Tensor: ...
    def accumulate_gram(
        self,
        gram: Tensor,
        totals: Tensor,
        sums: Tensor | None,
        A: Tensor,
        first: int,
        last: int,
        features_side: bool,
        center: bool,
        float32_gram: bool,
        fresh: bool,
        /,
    ) -> None: ...
    def count_sums(
        self,
        grams: Sequence[Tensor],
        totals: Sequence[Tensor],
        atol: float,
        rtol: float,
        certify: bool,
        spectrum: bool,
        /,
    ) -> tuple[Tensor, list[Tensor]]: ...
    def feature_gram(self, A: Tensor, center: bool, /) -> Tensor: ...
    def shifted_gram(self, A: Tensor, shift: Tensor, /) -> tuple[Tensor, Tensor]: ...


ENGINES: dict[str, Engine] = {"CPU": _cpu, "CUDA": _cuda}
"""By dispatch key, looked up at every call: tests let the CPU run the engine of CUDA."""


# Below autograd, of an activation that requires a gradient.
LIBRARY.impl("_accumulate_gram_", torch.library.fallthrough_kernel, "Autograd")


def engine_of(device: torch.device) -> Engine:
    """The engine of a device, or NotImplementedError."""
    engine = ENGINES.get(device.type.upper())
    if engine is None:
        raise NotImplementedError(f"bsgap_kernels has no kernels for tensors on {device}")
    return engine


def implement(
    name: str, kernel: Callable[..., Any], fake: Callable[..., Any], *, differentiable: bool = True
) -> None:
    """Binds an op's implementation, `kernel(engine, *args)`, for every device, and its shape function.

    differentiable: false if outputs never require grad; autograd is then passed over and the kernel runs
    below it. A backward that raises would fail under tracing, one in Python costs a second entry a call.
    """
    for key in ENGINES:
        LIBRARY.impl(name, _with_engine(kernel, key, differentiable), key)
    if not differentiable:
        LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"bsgap::{name}", fake, lib=LIBRARY)


def _with_engine(kernel: Callable[..., Any], key: str, differentiable: bool) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return kernel(ENGINES[key], *args, **kwargs)

    def run_below_autograd(*args: Any, **kwargs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return kernel(ENGINES[key], *args, **kwargs)

    return run if differentiable else run_below_autograd
