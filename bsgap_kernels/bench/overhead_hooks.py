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
    """The hooks that one way of tracking has on the modules of a model, beside those that were there before.

    `off` and `on` move them out of the modules and back in microseconds, so that several ways of tracking one
    model can take turns step by step without being built anew; while on, a way may add hooks and remove its
    own. Attributes that `attach` leaves on modules go with `forget`. One set at a time is on.
    """

    def __init__(self, model: nn.Module, attach: Callable[[], object]) -> None:
        self._modules = dict(model.named_modules())
        self._before = {
            (name, table): set(getattr(module, table))
            for name, module in self._modules.items()
            for table in _TABLES
        }
        self._attributes = {name: set(vars(module)) for name, module in self._modules.items()}
        self._aside: list[tuple[str, str, int, Any]] = []
        attach()

    def _present(self) -> list[tuple[str, str, int, Any]]:
        """Module, table, key and value of every hook of ours that is on."""
        return [
            (name, table, key, hook)
            for (name, table), before in self._before.items()
            for key, hook in getattr(self._modules[name], table).items()
            if key not in before
        ]

    def on(self) -> None:
        """Put the hooks back on their modules."""
        for name, table, key, hook in self._aside:
            getattr(self._modules[name], table)[key] = hook
        self._aside = []

    def off(self) -> None:
        """Take the hooks off their modules and lay them aside."""
        found = self._present()
        for name, table, key, _ in found:
            del getattr(self._modules[name], table)[key]
        self._aside += found

    def forget(self) -> None:
        """Take the hooks off for good, and from the modules what attributes `attach` left there."""
        self.off()
        self._aside = []
        for name, module in self._modules.items():
            for attribute in set(vars(module)) - self._attributes[name]:
                delattr(module, attribute)

    @contextmanager
    def timed(self, clock: HookClock) -> Iterator[None]:
        """The hooks on, each timed by `clock`, inside the block."""
        self.on()
        plain = {}
        for name, table, key, hook in self._present():
            if table in _CALLED:
                getattr(self._modules[name], table)[key] = clock.wrap(name, hook)
                plain[name, table, key] = hook
        try:
            yield
        finally:
            self.off()
            self._aside = [(n, t, k, plain.get((n, t, k), hook)) for n, t, k, hook in self._aside]


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
