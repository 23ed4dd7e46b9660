"""Launches of a Triton kernel: the first through Triton, later ones of what that compiled."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import torch


class Launch:
    """A kernel with its grid and compile-time constants, launched again and again on one device.

    Triton finds out at each call which compiled kernel serves the arguments, which takes longer than all else
    that a call does on the host. Here the first call's serves all: no argument is specialised on its value,
    and pointers that are on their alignment come from torch's allocator.
    """

    def __init__(
        self,
        kernel: Any,
        items: int,
        types: dict[str, str],
        constants: dict[str, Any],
        options: dict[str, Any],
        device: torch.device,
    ) -> None:
        self._kernel, self._items, self._types = kernel, items, types
        self._constants, self._options, self._device = constants, options, device
        self._run: Any = None  # the compiled kernel's launcher
        self._adopts = True

    @property
    def is_kept(self) -> bool:
        """Whether `at` may be called."""
        return self._run is not None

    def __call__(self, *arguments: Any) -> None:
        """Launch on the device's current stream. arguments: tensors and integers, in the kernel's order."""
        if self._run is not None:
            self.at(*[x if x.__class__ is int else x.data_ptr() for x in arguments])
            return
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            compiled = self._kernel[(self._items,)](*arguments, **self._constants, **self._options)
        if self._adopts:
            self._adopts = False
            self._adopt(compiled)

    def at(self, *arguments: int) -> None:
        """The same with addresses instead of tensors, of what was compiled at an earlier launch."""
        index, driver = self._device.index or 0, self._driver
        if driver.get_current_device() != index:
            with torch.cuda.device(self._device):
                self.at(*arguments)
            return
        enter, leave = self._knobs.launch_enter_hook, self._knobs.launch_exit_hook
        stream = driver.get_current_stream(index)
        described = None
        if enter is not None:  # a profiler's
            described = self._compiled.launch_metadata((self._items, 1, 1), stream, *arguments, *self._last)
        self._run(
            self._items, 1, 1, stream, self._function, self._packed, described, enter, leave,
            *arguments, *self._last,
        )  # fmt: skip

    def _adopt(self, compiled: Any) -> None:
        """Keep what Triton compiled, if it has the form that Triton 3.6 to 3.9 give it."""
        import triton

        if triton.knobs.runtime.interpret:
            return
        try:
            types = {name: compiled.src.signature[name] for name in self._types}
            if types != self._types:
                raise AttributeError(f"compiled for {types}, expected {self._types}")
            self._knobs = triton.knobs.runtime
            self._driver = triton.runtime.driver.active
            self._driver.get_current_stream(self._driver.get_current_device())
            self._last = tuple(self._constants.values())
            self._compiled, self._function = compiled, compiled.function
            self._packed, self._run = compiled.packed_metadata, compiled.run
        except (AttributeError, KeyError, TypeError) as error:
            warnings.warn(
                f"bsgap: Triton {triton.__version__} keeps compiled kernels in another form ({error}); each "
                "launch goes through Triton's dispatcher, at a cost of tens of microseconds",
                stacklevel=4,
            )
