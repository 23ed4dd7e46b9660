"""Hooks of a tracker, in a form that torch.compile traces and that copies of a model do without.

In eager mode a hook calls the tracker. Under torch.compile it calls an op, whose implementation finds the
tracker by number and calls the same method when the compiled code runs: no state of the tracker is traced, so
nothing recompiles, and the op's mutated `token` keeps it from being dropped or moved.
"""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Protocol

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from bsgap_kernels.schema import LIBRARY
from bsgap_kernels.tracking.sites import activation_of


class Reader(Protocol):
    """What hooks report to."""

    def begin(self, mask: Tensor | None, training: bool, compiled: bool, /) -> None:
        """A forward pass of the model starts; training: it could be one of a training step."""

    def observe(self, module: int, output: Any, own_rows: bool = False, /) -> None:
        """A module's output, or first input, is there; own_rows: its layout over ranks is dealt with."""


_READERS: weakref.WeakValueDictionary[int, Reader] = weakref.WeakValueDictionary()


# Never given twice: code compiled for a tracker that is gone must not report to the next one.
_NUMBERS = itertools.count(1)


def enlist(reader: Reader) -> int:
    """A number by which ops find the reader, for as long as something else keeps it alive."""
    number = next(_NUMBERS)
    _READERS[number] = reader
    return number


def delist(number: int) -> None:
    """Ops of this number do nothing from now on."""
    _READERS.pop(number, None)


def _begin(token: Tensor, mask: Tensor | None, reader: int, training: bool) -> None:
    found = _READERS.get(reader)
    if found is not None:
        found.begin(mask, training, True)


def _observe(token: Tensor, activation: Tensor, reader: int, module: int) -> None:
    found = _READERS.get(abs(reader))
    if found is not None:
        found.observe(module, activation, reader < 0)


def _nothing(*_: Any) -> None:
    """Has no output."""


for _name, _kernel in (("_begin_pass_", _begin), ("_observe_", _observe)):
    for _key in ("CPU", "CUDA"):
        LIBRARY.impl(_name, _kernel, _key)
    LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"bsgap::{_name}", _nothing, lib=LIBRARY)


def inert(*_: Any, **__: Any) -> None:
    """What a hook becomes in a copied or pickled model: it does nothing."""


graph_task = torch._C._current_graph_task_id
"""Anything but -1 inside a backward pass."""


def recomputing() -> bool:
    """Whether this runs inside a backward pass: activation checkpointing repeats a forward that was read."""
    return bool(graph_task() != -1)


def exporting() -> bool:
    """Whether what is compiled will be run by itself, which makes it none of the tracker's passes."""
    # The flag itself: torch 2.11 takes is_exporting() for true in whatever it compiles.
    return torch.compiler._is_exporting_flag


def elsewhere() -> bool:
    """Whether this is a trace of the model to be run by itself, which is none of the tracker's passes."""
    return exporting() if torch.compiler.is_compiling() else torch._C._is_tracing()


class Hook:
    """A hook on one module. A copy of the module gets one that does nothing."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return inert

    def __reduce__(self) -> tuple[Any, ...]:
        # Takes any arguments and returns None as `inert` does, but loads where this package is missing.
        return getattr, (nullcontext(), "__exit__")


class ReaderHook(Hook):
    """A hook that reports to a reader, and is weak towards it."""

    def __init__(self, reader: Reader, number: int, token: Tensor) -> None:
        self.reader = weakref.ref(reader)
        self.number = number
        self.token = token


class OutputHook(ReaderHook):
    """Reads a module's output after its forward."""

    def __init__(self, reader: Reader, number: int, token: Tensor, module: int, name: str) -> None:
        super().__init__(reader, number, token)
        self.module = module
        self.name = name

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Called by torch after the module's forward."""
        if torch.compiler.is_dynamo_compiling():
            self.trace(output)
            return
        reader = self.reader()
        if reader is not None:
            reader.observe(self.module, output)

    def trace(self, output: Any) -> None:
        """Put the op into compiled code."""
        if not exporting():
            from torch.distributed.tensor import Shard

            activation: Any = activation_of(output, self.name)
            number = self.number
            if getattr(activation, "placements", None) is not None:
                # The op takes no DTensor: the sign says that ranks have shared one out.
                by_rows = [Shard(0)] * activation.device_mesh.ndim
                activation, number = activation.redistribute(placements=by_rows).to_local(), -number
            torch.ops.bsgap._observe_(self.token, activation.detach(), number, self.module)


class InputHook(OutputHook):
    """Reads a module's first input before its forward."""

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> None:
        """Called by torch before the module's forward; output: its keyword arguments."""
        activation = first_input(args, output)
        if activation is not None:
            super().__call__(module, args, activation)


def first_input(args: Any, kwargs: dict[str, Any]) -> Any:
    """The first argument of a layer, by place or, where there is none, by name; None of a call without."""
    return args[0] if args else next(iter(kwargs.values()), None)


class BeginHook(ReaderHook):
    """Tells that a forward pass of the whole model starts, and its padding mask."""

    def __init__(
        self, reader: Reader, number: int, token: Tensor, mask: str | None, place: int | None
    ) -> None:
        super().__init__(reader, number, token)
        self.mask = mask
        self.place = place

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Called by torch before the model's forward."""
        compiling = torch.compiler.is_compiling()
        if compiling and exporting():
            return
        mask = None if self.mask is None else self._mask(args, kwargs)
        training = module.training and (
            torch.is_grad_enabled()
            or (_wants_gradients(args, kwargs) and (compiling or _inside_checkpoint()))
        )
        if compiling:
            torch.ops.bsgap._begin_pass_(self.token, mask, self.number, training)
            return
        if "_is_replica" in module.__dict__:
            raise RuntimeError(
                "RankTracker: the model runs as a replica of DataParallel, whose threads share hooks; "
                "expected DistributedDataParallel, or one device"
            )
        reader = self.reader()
        if reader is not None:
            reader.begin(mask, training, False)

    def _mask(self, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
        mask = kwargs.get(str(self.mask))
        if mask is None and self.place is not None and self.place < len(args):
            mask = args[self.place]
        if mask is None:
            return None
        if isinstance(mask, Tensor) and mask.ndim > 2 and mask.shape[1:-1].numel() == 1:
            mask = mask.reshape(mask.shape[0], mask.shape[-1])  # (B, 1, 1, T), added to scores
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            got = (
                f"a tensor of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            )
            raise ValueError(
                f"mask: {self.mask} is {got}, expected a tensor (B, T), true where a token counts"
            )
        return mask


def _wants_gradients(args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether inputs want gradients although none are recorded: the first pass of a checkpointed model."""
    inputs = [*args, *kwargs.values()]
    return (
        any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        and not torch.is_inference_mode_enabled()
    )


def _inside_checkpoint() -> bool:
    """Whether a reentrant activation checkpoint makes this pass, which records no graph at first."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
            return True
        frame = frame.f_back
    return False


def place_of_mask(model: nn.Module, mask: str) -> int | None:
    """Where a mask that is given without its name stands among the arguments of the model's forward.

    Raises:
        ValueError: forward has no such argument.
    """
    parameters = inspect.signature(model.forward).parameters
    if mask in parameters:
        kind = parameters[mask].kind
        return list(parameters).index(mask) if kind is inspect.Parameter.POSITIONAL_OR_KEYWORD else None
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return None
    raise ValueError(
        f"mask: got {mask!r}, expected the name of an argument of the model's forward, which has "
        f"{', '.join(parameters) or 'none'}"
    )


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
                "replicated: no rank has whole rows"
            )
    local: Tensor = activation.to_local()  # type: ignore[attr-defined]
    return local if counted else local[:0]
