"""Reads activations out of a running model and adds them up by site."""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from bsgap_kernels.strides import features_last
from bsgap_kernels.tracking import axis, padding
from bsgap_kernels.tracking.clock import StepClock
from bsgap_kernels.tracking.discovery import Discovery, run_example
from bsgap_kernels.tracking.hooks import (
    BeginHook,
    Hook,
    InputHook,
    OutputHook,
    delist,
    elsewhere,
    enlist,
    graph_task,
    place_of_mask,
)
from bsgap_kernels.tracking.joining import in_join
from bsgap_kernels.tracking.options import device_of, float32_serves
from bsgap_kernels.tracking.reading import SiteHead
from bsgap_kernels.tracking.records import Question
from bsgap_kernels.tracking.sharding import Layout, Layouts, local_of
from bsgap_kernels.tracking.sites import (
    CONSUMERS,
    Layers,
    activation_of,
    compiled_regions,
    feature_range,
    has_values,
    listing,
    matrix_of,
    no_site,
    resolve_unfold,
    select_modules,
)
from bsgap_kernels.tracking.sums import ROWS, Sums
from bsgap_kernels.triton.memory import kept

TRAINING = "batch"
"""The view of passes in training mode."""

_SKETCH_SEED = 20221012


@dataclass(eq=False)
class Site:
    """One place where activations are read, and what was read there since its step began."""

    head: SiteHead
    sums: Sums
    reads: int = 0
    seconds: float = 0.0
    shape: torch.Size | None = None  # of activations that are read as they stand, if once looked at
    device: torch.device | None = None  # of those
    float32_sums: bool = False  # what is asked allows float32 sums on that device
    features_dim: int | None = None  # counted from the end; None: as the unfolding has it
    first: int = 0  # features are dimensions [first, last)
    last: int = 0
    layout: Layout | None = None  # over ranks, of an activation that several share
    captured: bool = False  # read in a CUDA graph: its replays call no hook
    stream: torch.cuda.Stream | None = None  # that its sums were last touched on

    def join(self) -> None:
        """Let the current stream wait for what another has left to do with the sums.

        A forward pass may run on a stream of its own: without this, the count could come before the Gram
        matrix, and the next pass before the sums are back at zero.
        """
        current = current_stream(self.sums.gram.device)
        if current is None:
            return
        if self.stream is not None and self.stream != current:
            current.wait_stream(self.stream)
        self.stream = current


@dataclass(frozen=True)
class ReadOptions:
    """How activations become sums."""

    unfold: str
    features_dim: int | None
    mask_true: padding.MaskTrue
    question: Question
    adds_up: bool  # several passes or ranks make a step: only AᵀA will do
    sample_rows: int
    max_features: int
    sketch: int | None


class SiteReader:
    """Hooks on a model, and the sums of every site. `recording` and `view` say what to do with a pass."""

    def __init__(
        self,
        model: nn.Module,
        layers: Layers | None,
        options: ReadOptions,
        mask: str | None,
        example: Any,
        clock: StepClock | None,
        layouts: Layouts,
    ) -> None:
        self.options = options
        self._layouts = layouts
        self._clock = clock
        self.recording = True
        self.view: str | None = None
        self.in_join = False  # the last pass was one of a rank that others need not follow
        self.passes = 0  # that were, or but for a pause would have been, read
        self._model = model
        self._sites: defaultdict[str, dict[tuple[int, int], Site]] = defaultdict(dict)
        self._calls: dict[int, int] = {}
        self._mask: Tensor | None = None
        self._masks = mask is not None
        self._mask_side = None if mask is None else padding.side_of(model, mask)
        self._sequence_first = self._masks and padding.is_sequence_first(model)
        self._masked = False  # some site had rows for the mask
        self._training = True  # the pass under way could be one of a training step
        self._compiled = False  # a pass came from compiled code
        self._layers = axis.Layers(model)
        self._checked = False  # every site was looked for in compiled code
        self._observed: set[int] = set()
        self._names: list[str] = []
        self._of_consumer: dict[int, int | None] = {}  # dimension of features of inputs
        self._not_activations: set[tuple[int, int]] = set()  # inputs that came from no nonlinearity
        self.not_read: dict[str, str] = {}  # layer, and the function unknown here that its input comes from
        modules = select_modules(model, layers)
        if not modules and not any(isinstance(module, CONSUMERS) for module in model.modules()):
            raise ValueError(
                "layers: the model has no nonlinearity to read by default; give patterns, it has "
                f"{listing([name or type(model).__name__ for name, _ in model.named_modules()])}"
            )
        place = None if mask is None else place_of_mask(model, mask)
        self._token = torch.zeros(1, device=self.device)
        # Else compiled code could not be captured in a CUDA graph because of it. This is what
        # torch._dynamo.mark_static_address does; calling that would import the compiler, which takes seconds.
        self._token._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]
        self._number = enlist(self)
        begin = BeginHook(self, self._number, self._token, mask, place)
        self._handles: list[Any] = []
        self._hooks: list[tuple[Callable[[Any], Any], Hook]] = []
        self._hook(partial(model.register_forward_pre_hook, with_kwargs=True), begin)
        self._selected = list(modules)
        for name, module in modules.items():
            self._attach(name, module, of_input=False)
        self._discovery: Discovery | None = None
        if layers is not None:
            return
        self._discovery = Discovery(model, self._looked)
        if example is not None:
            self.recording = False
            try:
                run_example(model, example)
            except BaseException:
                self.close()
                raise
            self.recording = True
            self._observed.clear()
            self.end_discovery()

    @property
    def unsearched(self) -> bool:
        """Whether functional nonlinearities may hide in compiled code, where none is looked for."""
        return self._discovery is not None and (self._compiled or bool(compiled_regions(self._model)))

    def _attach(self, name: str, module: nn.Module, *, of_input: bool) -> None:
        number = self._number_of(f"{name}:input" if of_input else name)
        if of_input:
            self._of_consumer[number] = axis.of_consumer(module)
        kind = InputHook if of_input else OutputHook
        hook = kind(self, self._number, self._token, number, self._names[number])
        before = partial(module.register_forward_pre_hook, with_kwargs=True)
        self._hook(before if of_input else module.register_forward_hook, hook)

    def _hook(self, register: Callable[[Any], Any], hook: Hook) -> None:
        self._hooks.append((register, hook))
        self._handles.append(register(hook))

    def attach(self) -> None:
        """Put every hook on the model again."""
        if not self._handles:
            self._handles = [register(hook) for register, hook in self._hooks]

    def detach(self) -> None:
        """Take every hook off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _number_of(self, name: str) -> int:
        if name not in self._names:
            self._names.append(name)
        return self._names.index(name)

    def _looked(self, name: str, activation: Tensor, found: bool) -> None:
        number = self._number_of(f"{name}:input")
        self._of_consumer[number] = axis.of_consumer(self._model.get_submodule(name))
        if found:
            self.observe(number, activation)
        else:  # so that a call is named as its hook will name it, and this one is not read by it
            call = self._calls.get(number, 0)
            self._calls[number] = call + 1
            if torch.is_grad_enabled():
                self._not_activations.add((number, call))

    @property
    def device(self) -> torch.device:
        """Where the model is at present."""
        return device_of(self._model)

    @property
    def settled(self) -> bool:
        """Whether `end_step` has nothing left to do."""
        return self._checked and self._discovery is None and bool(self._observed)

    def end_step(self) -> None:
        """Settle, after the first step with a pass, which sites there are.

        Functional nonlinearities met so far have hooks from now on; no other input is looked at again.

        Raises:
            RuntimeError: there are none, or compiled code has no hooks of some.
        """
        if self.passes and not self._checked:
            self._checked = True
            self._check_compiled()
        self.end_discovery()
        if self.passes and not self._observed and (self._discovery is None or self._compiled):
            raise RuntimeError(no_site(self._discovery is not None))

    def _check_compiled(self) -> None:
        """A module inside compiled code that is older than its hook is never heard of."""
        for region in compiled_regions(self._model):
            inside = [
                number
                for number, name in enumerate(self._selected)
                if not region or name == region or name.startswith(f"{region}.")
            ]
            if inside and not self._observed.intersection(inside):
                names = listing([self._selected[i] for i in inside])
                raise RuntimeError(
                    f"RankTracker: no activation came from {names}, inside the compiled module "
                    f"{region or type(self._model).__name__}: hooks added after the first call of a "
                    "compiled module do not fire. Attach the tracker before that call, or call "
                    "torch.compiler.reset() after attaching it; leave out by layers= what is not called"
                )

    def end_discovery(self) -> None:
        """End the search for functional nonlinearities, if a pass with a graph was seen."""
        if self._discovery is None or not self._discovery.looked:
            return
        self._discovery.close()
        for name, module in self._discovery.found.items():
            self._attach(name, module, of_input=True)
        self.not_read = self._discovery.unknown
        self._discovery = None
        if self.not_read:
            pairs = ", ".join(f"{function} before {layer}" for layer, function in self.not_read.items())
            warnings.warn(
                f"bsgap_kernels: {pairs}: may or may not be a nonlinearity, and is not read; layers= reads "
                "the modules that it names",
                stacklevel=5,
            )

    def close(self) -> None:
        """Take every hook off the model for good."""
        delist(self._number)
        self.detach()
        self._hooks.clear()
        if self._discovery is not None:
            self._discovery.close()

    # -- hooks

    def begin(self, mask: Tensor | None, training: bool, compiled: bool) -> None:
        """A forward pass of the model starts."""
        if graph_task() != -1 or torch._C._is_tracing():
            return
        self._calls.clear()
        self._mask = None if mask is None else padding.valid_tokens(mask, self.options.mask_true)
        self._training = training
        self._compiled = self._compiled or compiled
        if self._discovery is not None:
            self._discovery.begin()
        if training or self.view is not None:
            self.passes += 1
        if self.options.adds_up:
            self.in_join = in_join()

    def observe(self, module: int, output: Any, own_rows: bool = False) -> None:
        """Add a module's output, or input, to its site.

        own_rows: it is what this rank has to count, whatever the layout over ranks was.

        Written so that a plain activation, of a shape met before, takes few calls: after a training step each
        costs more than its work.
        """
        plain = type(output) is Tensor and output.ndim > 0
        if graph_task() != -1 or torch._C._is_tracing() or (not plain and elsewhere()):
            return
        # Counted while paused too, so that a site keeps its name.
        call = self._calls.get(module, 0)
        self._calls[module] = call + 1
        self._observed.add(module)
        listening = self.recording and (self.view is not None or (self._training and self._model.training))
        if (not listening and self._discovery is None) or (module, call) in self._not_activations:
            return
        activation = output
        if not plain:
            activation = activation_of(output, self._names[module])
        if self._discovery is not None:
            self._discovery.known(activation)
        if not listening or not has_values(activation, self._names[module]):
            return
        # A part of the model that is called by itself begins no pass.
        self.passes = self.passes or 1
        clock = self._clock
        started = time.perf_counter()
        beginning = None if clock is None else clock.begin()
        sites = self._sites[self.view or TRAINING]
        site = sites.get((module, call))
        if site is None:
            site = sites[module, call] = self._new_site(module, call, activation, own_rows)
        elif site.layout is not None or not plain:
            site.layout = None if own_rows else self._layout(module, call, activation, site.features_dim)
        if activation.shape != site.shape or not plain or activation.device != site.device or site.reads > 0:
            with torch.no_grad():
                activation = self._fitting(site, activation.detach())
        site.sums.add(
            activation,
            site.first,
            site.last,
            float32_sums=site.float32_sums,
            center=self.options.question.center,
            fresh=site.reads == 0 and site.shape is not None,
        )
        site.reads += 1
        if clock is not None and beginning is not None:
            clock.end(beginning)
        site.seconds += time.perf_counter() - started

    def _matrix(self, activation: Tensor, features_dim: int | None) -> tuple[Tensor, int, int]:
        if self.options.sample_rows > 1:
            activation = activation[:: self.options.sample_rows]
        return matrix_of(activation, self.options.unfold, features_dim)

    def _features_dim(self, module: int, call: int, activation: Tensor) -> int | None:
        given = self.options.features_dim
        if given is not None and not -activation.ndim <= given < activation.ndim:
            raise ValueError(
                f"{self._names[module]}: features_dim is {given}, and an activation has {activation.ndim} "
                "dimensions"
            )
        if given is not None or self.options.unfold in ("flatten", "token"):
            return given
        found = self._of_consumer.get(module)
        found = axis.of_producer(activation) if found is None else found
        if found is None:  # a view may have been read with a graph
            seen = (
                sites[module, call].features_dim for sites in self._sites.values() if (module, call) in sites
            )
            found = next(seen, None)
        if found is None and activation.ndim > 2:
            found = self._layers.place(activation.ndim)
            if found is None:
                raise ValueError(axis.undecided(f"{self._names[module]}#{call}", tuple(activation.shape)))
        return found

    def _zeros(self, m: int, n: int, device: torch.device) -> Sums:
        question = self.options.question
        rows = m if m < n and not (self.options.adds_up or self._masks) else None
        return Sums.zeros(n, device, rows=rows, sums=question.sums, magnitudes=question.magnitudes)

    def _layout(self, module: int, call: int, activation: Tensor, features_dim: int | None) -> Layout | None:
        features = feature_range(activation.ndim, self.options.unfold, features_dim)
        only_rows = 0 if self.options.unfold == "pool" else None
        name = f"{self._names[module]}#{call}"
        return self._layouts.of((module, call), activation, name, features, only_rows)

    def _rows(
        self, activation: Tensor, features_dim: int | None, layout: Layout | None
    ) -> tuple[Tensor, int, int]:
        """The matrix of an activation, as `matrix_of` has it: of it the rows that this rank has to read."""
        matrix, first, last = self._matrix(local_of(activation), features_dim)
        if layout is not None:
            matrix = layout.whole(matrix, first, last, pooled=matrix.ndim < activation.ndim)
        return matrix, first, last

    def _new_site(self, module: int, call: int, activation: Tensor, own_rows: bool) -> Site:
        options, name = self.options, f"{self._names[module]}#{call}"
        features_dim = self._features_dim(module, call, activation)
        if own_rows:
            features = feature_range(activation.ndim, options.unfold, features_dim)
            self._layouts.check_own_rows(name, features, self._masks)
        layout = None if own_rows else self._layout(module, call, activation, features_dim)
        with torch.no_grad():
            m, n = _shape(*self._rows(activation.detach(), features_dim, layout))
        notes = [f"rows 1/{options.sample_rows}"] if options.sample_rows > 1 else []
        if (options.adds_up or self._masks) and n > options.max_features:
            if options.sketch is None:
                raise ValueError(
                    f"{name}: {n} features are more than max_features = {options.max_features}, and where "
                    f"passes or ranks add up an n × n Gram matrix of {8 * n * n / 2**20:.0f} MiB would be "
                    "held; unfold by channel, raise max_features, or name sketch="
                )
            notes.append(f"sketch {options.sketch} of {n}")
            n = options.sketch
        sums = self._zeros(m, n, activation.device)
        unfold = resolve_unfold(activation.ndim, options.unfold)
        head = SiteHead(name, n, ", ".join(notes), unfold, str(activation.dtype).removeprefix("torch."))
        return Site(head, sums, features_dim=features_dim, layout=layout)

    def _fitting(self, site: Site, activation: Tensor) -> Tensor:
        """What of an activation the sums of its site are to be given, once it is known that it fits them."""
        name, sums, sketched = site.head.name, site.sums, "sketch" in site.head.note
        layout = site.layout
        matrix, first, last = self._rows(activation, site.features_dim, layout)
        m, n = _shape(matrix, first, last)
        if not sketched and n != sums.n:
            raise ValueError(
                f"{name}: an activation with {n} features came after one with {sums.n}; sites of "
                "varying size need unfold='channel' or 'pool'"
            )
        if sums.gram.device != matrix.device:
            if site.reads > 0:
                raise RuntimeError(
                    f"{name}: an activation on {matrix.device} came after one on {sums.gram.device} in "
                    "one step; move the model between steps, after step()"
                )
            site.sums = sums = self._zeros(m, sums.n, matrix.device)
        if not sums.features_side and (site.reads > 0 or m != sums.side):
            if site.reads > 0:
                raise RuntimeError(
                    f"{name}: read a second time in one step with fewer rows ({m}) than features ({n}), "
                    "which does not add up; end each step by step(), or say micro_batches= where a step has "
                    "several passes"
                )
            site.sums = sums = self._zeros(m, n, matrix.device)
        if matrix.device != site.device:
            site.device, site.float32_sums = matrix.device, float32_serves(self.options.question, matrix)
        site.first, site.last = first, last
        site.join()
        on_device = matrix.is_cuda or site.stream is not None
        as_it_stands = matrix is activation and not (self._masks or sketched or on_device or layout)
        site.shape = matrix.shape if as_it_stands else None
        if as_it_stands:
            return matrix
        if matrix.is_cuda:
            site.captured = site.captured or torch.cuda.is_current_stream_capturing()
        elif site.reads == 0:
            torch._foreach_zero_(sums.tensors())
        shape = local_of(activation).shape
        rows = shape[:first] + shape[last:]  # before sampling, and before ranks share them out
        if self._mask is not None or sketched:
            matrix = features_last(matrix, first, last)
            site.first, site.last = matrix.ndim - 1, matrix.ndim
        valid = None
        if self._mask is not None:
            fitted = partial(padding.fitted, sequence_first=self._sequence_first, site=name)
            if self._mask_side is None or padding.is_on_side(name, self._mask_side, rows, self._mask):
                valid = fitted(self._mask, rows)
                if valid is None and layout is not None:
                    valid = layout.valid(self._mask, rows, fitted)
        if valid is not None:
            valid = valid[:: self.options.sample_rows]
            if layout is not None:
                valid = layout.part(valid)
            # Rows of zeros add nothing to a Gram matrix; they only must not count as rows.
            self._masked = True
            matrix = torch.where(valid[..., None], matrix, 0)
            sums.totals[ROWS] += valid.sum() - m
        if sketched:
            with torch.autocast(matrix.device.type, enabled=False):
                matrix = matrix.flatten(0, -2) @ _projection(n, sums.n, matrix.dtype, matrix.device)
            site.first, site.last = 1, 2
        return matrix

    # -- what was read

    def take(self, view: str) -> list[Site]:
        """Sites read since `release`, in forward order."""
        sites = [site for site in self._sites[view].values() if site.reads > 0 or site.captured]
        if sites and self._mask is not None and not self._masked:
            self._masked = True
            warnings.warn(
                f"bsgap_kernels: no site has rows {tuple(self._mask.shape)} as the padding mask has, so "
                f"padding counts as rows; the sites are {listing([site.head.name for site in sites])}",
                stacklevel=4,
            )
        for site in sites:
            if site.stream is not None:
                site.join()
        return sites

    def forget(self, view: str) -> None:
        """Drop what sites have read since `release`."""
        read = [site for site in self._sites[view].values() if site.reads > 0]
        if read:
            self.release(read)

    def release(self, sites: list[Site]) -> None:
        """Forget what sites have added up: the next step begins.

        On a CPU the first read of the next step does so. On a GPU that may be the replay of a graph, which
        adds to what it finds.
        """
        stale = [tensor for site in sites if site.sums.gram.is_cuda for tensor in site.sums.tensors()]
        if stale:
            torch._foreach_zero_(stale)
        for site in sites:
            site.reads, site.seconds = 0, 0.0
        self._calls.clear()
        self._mask = None
        self._training = True

    def names(self) -> list[str]:
        """Sites met so far, in forward order."""
        return list(
            dict.fromkeys(site.head.name for sites in self._sites.values() for site in sites.values())
        )

    @property
    def nbytes(self) -> int:
        """Bytes held by all sums."""
        return sum(site.sums.nbytes for sites in self._sites.values() for site in sites.values())


def current_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The device's current stream; None off a GPU, and under capture, where the graph keeps the order."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.current_stream(device)


def _shape(matrix: Tensor, first: int, last: int) -> tuple[int, int]:
    """Rows and features of an activation whose dimensions [first, last) are features."""
    shape = matrix.shape
    return (shape[:first] + shape[last:]).numel(), shape[first:last].numel()


@lru_cache(maxsize=64)
def _projection(n: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A Gaussian sketch of n features, the same on every rank."""
    generator = torch.Generator().manual_seed(_SKETCH_SEED + n)
    P = torch.randn(n, size, generator=generator, device="cpu") / size**0.5
    return kept(device, lambda: P.to(device, dtype))
