"""Taking the hooks of one way of tracking off a model and putting them back, and timing each of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_TABLES = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)
_CALLED = ("_forward_pre_hooks", "_forward_hooks")
"""Tables whose values are called during the forward pass; others hold flags or run in the backward pass."""


class HookSet:
    """The hooks that `attach` put on the modules of a model.

    Made once; then `on` and `off` move them in and out of the modules in microseconds, so that several ways
    of tracking one model can take turns step by step without being built anew. Attributes that `attach` left
    on modules go with `forget`.
    """

    def __init__(self, model: nn.Module, attach: Callable[[], object]) -> None:
        self._modules = dict(model.named_modules())
        tables = {
            (name, table): set(getattr(module, table))
            for name, module in self._modules.items()
            for table in _TABLES
        }
        attributes = {name: set(vars(module)) for name, module in self._modules.items()}
        attach()
        self._added = [
            (name, table, key, hook)
            for (name, table), before in tables.items()
            for key, hook in getattr(self._modules[name], table).items()
            if key not in before
        ]
        self._attributes = {name: set(vars(m)) - attributes[name] for name, m in self._modules.items()}

    def on(self) -> None:
        """Put the hooks on their modules."""
        for name, table, key, hook in self._added:
            getattr(self._modules[name], table)[key] = hook

    def off(self) -> None:
        """Take the hooks off their modules."""
        for name, table, key, _ in self._added:
            getattr(self._modules[name], table).pop(key, None)

    def forget(self) -> None:
        """Take the hooks off, and from the modules what attributes `attach` left there."""
        self.off()
        for name, added in self._attributes.items():
            for attribute in added & set(vars(self._modules[name])):
                delattr(self._modules[name], attribute)

    @contextmanager
    def timed(self, clock: HookClock) -> Iterator[None]:
        """The hooks on, each timed by `clock`, inside the block."""
        self.on()
        for name, table, key, hook in self._added:
            if table in _CALLED:
                getattr(self._modules[name], table)[key] = clock.wrap(name, hook)
        try:
            yield
        finally:
            self.off()


class HookClock:
    """Time inside each hook of a step, by the name of its module and the number of the call.

    On a GPU the time between two events on the current stream: what the hook's kernels take, and what the
    device waits for the host if the hook makes it wait.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    def wrap(self, name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        """`hook`, timed under the name of its module."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = self.now()
            try:
                return hook(*args, **kwargs)
            finally:
                self._spans.append((name, begin, self.now()))

        return timed

    def now(self) -> Any:
        """A point in time: of the host, or of the device's stream."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, name: str, begin: Any) -> None:
        """Record what went on since `begin` under `name`."""
        self._spans.append((name, begin, self.now()))

    def read(self) -> dict[str, float]:
        """Milliseconds by `module#call` since the last reading; waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        calls: dict[str, int] = {}
        for name, begin, end in self._spans:
            call = calls[name] = calls.get(name, -1) + 1
            spent = begin.elapsed_time(end) if self._cuda else 1e3 * (end - begin)
            found[f"{name}#{call}"] = spent
        self._spans.clear()
        return found
