"""Hooks of a tracker, in a form that torch.compile traces and that copies of a model do without.

In eager mode a hook calls the tracker. Under torch.compile it calls an op, whose implementation finds the
tracker by number and calls the same method when the compiled code runs: no state of the tracker is traced, so
nothing recompiles, and the op's mutated `token` keeps it from being dropped or moved.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bsgap_kernels.schema import LIBRARY
from bsgap_kernels.tracking.sites import activation_of


class Reader(Protocol):
    """What hooks report to."""

    def begin(self, mask: Tensor | None, /) -> None:
        """A forward pass of the model starts."""

    def observe(self, module: int, activation: Tensor, /) -> None:
        """A module's activation is there."""


_READERS: weakref.WeakValueDictionary[int, Reader] = weakref.WeakValueDictionary()


def enlist(reader: Reader) -> int:
    """A number by which ops find the reader, for as long as something else keeps it alive."""
    number = max(_READERS, default=0) + 1
    _READERS[number] = reader
    return number


def _begin(token: Tensor, mask: Tensor | None, reader: int) -> None:
    found = _READERS.get(reader)
    if found is not None:
        found.begin(mask)


def _observe(token: Tensor, activation: Tensor, reader: int, module: int) -> None:
    found = _READERS.get(reader)
    if found is not None:
        found.observe(module, activation)


def _nothing(*_: Any) -> None:
    """Has no output."""


for _name, _kernel in (("_begin_pass_", _begin), ("_observe_", _observe)):
    for _key in ("CPU", "CUDA"):
        LIBRARY.impl(_name, _kernel, _key)
    LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"bsgap::{_name}", _nothing, lib=LIBRARY)


def inert(*_: Any, **__: Any) -> None:
    """What a hook becomes in a copied or pickled model: it does nothing."""


def _make_inert() -> Callable[..., None]:
    return inert


def recomputing() -> bool:
    """Whether this runs inside a backward pass: activation checkpointing repeats a forward that was read."""
    return bool(torch._C._current_graph_task_id() != -1)


class Hook:
    """A hook on one module. Weak towards its tracker; a copy of the module gets `inert` instead."""

    def __init__(self, reader: Reader, number: int, token: Tensor) -> None:
        self.reader = weakref.ref(reader)
        self.number = number
        self.token = token

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return inert

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _make_inert, ()


class OutputHook(Hook):
    """Reads a module's output after its forward."""

    def __init__(self, reader: Reader, number: int, token: Tensor, module: int, name: str) -> None:
        super().__init__(reader, number, token)
        self.module = module
        self.name = name

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Called by torch after the module's forward."""
        self.read(output)

    def read(self, output: Any) -> None:
        """Report the activation, unless the tracker is gone."""
        activation = local_rows(activation_of(output, self.name), self.name)
        if torch.compiler.is_compiling():
            torch.ops.bsgap._observe_(self.token, activation.detach(), self.number, self.module)
            return
        reader = self.reader()
        if reader is not None:
            reader.observe(self.module, activation)


class InputHook(OutputHook):
    """Reads a module's first input before its forward."""

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> None:
        """Called by torch before the module's forward."""
        if args:
            self.read(args[0])


class BeginHook(Hook):
    """Tells that a forward pass of the whole model starts, and its padding mask."""

    def __init__(self, reader: Reader, number: int, token: Tensor, mask: str | None) -> None:
        super().__init__(reader, number, token)
        self.mask = mask

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Called by torch before the model's forward."""
        mask = None if self.mask is None else kwargs.get(self.mask)
        if torch.compiler.is_compiling():
            torch.ops.bsgap._begin_pass_(self.token, mask, self.number)
            return
        reader = self.reader()
        if reader is not None:
            reader.begin(mask)


def local_rows(activation: Tensor, name: str) -> Tensor:
    """The rows of a DTensor that this rank has to count; other tensors as they are.

    A replicated one is counted by the first rank of its mesh dimension alone, one sharded by batch by each.

    Raises:
        ValueError: sharded by anything but the batch, or a partial sum: no rank has whole rows.
    """
    placements = getattr(activation, "placements", None)
    if placements is None:
        return activation
    counted = True
    mesh: Any = activation.device_mesh  # type: ignore[attr-defined]
    for dimension, placement in enumerate(placements):
        if placement.is_replicate():
            counted = counted and mesh.get_local_rank(dimension) == 0
        elif not (placement.is_shard() and placement.dim == 0):
            raise ValueError(
                f"{name}: got a DTensor placed as {placement!r}, expected batch-sharded (Shard(0)) or "
                f"replicated: "
                "no rank has whole rows"
            )
    local: Tensor = activation.to_local()  # type: ignore[attr-defined]
    return local if counted else local[:0]
