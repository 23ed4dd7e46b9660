"""Finds functional nonlinearities (F.relu, x.tanh()) at the input of the layer that consumes them.

A weight layer's input is a unit's output after the nonlinearity if the graph of autograd leads from it back
to a nonlinearity through nothing but reshaping, pooling, dropout, concatenation and products.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bsgap_kernels.tracking.hooks import Hook, elsewhere, first_input, recomputing
from bsgap_kernels.tracking.sites import CONSUMERS

_DEPTH = 12
_NONLINEAR = re.compile(
    r"^(Relu|LeakyRelu|Prelu|Rrelu|Elu|Selu|Celu|Gelu|Silu|Mish|Sigmoid|LogSigmoid|Hardsigmoid|Tanh|Hardtanh|"
    r"Hardswish|Softplus|Softshrink|Hardshrink|Threshold|Glu|Clamp|Pow|Maximum|Minimum)"
)
_TRANSPARENT = re.compile(
    r"^(_ToTorchTensor|_FromTorchTensor|Redistribute|View|UnsafeView|Reshape|Alias|Permute|Transpose|TBackward|Squeeze|Unsqueeze|Expand|Clone|Contiguous|ToCopy|"
    r"Slice|Select|Split|Chunk|Cat|Mul|Div|Sub|NativeDropout|FusedDropout|MaxPool|AvgPool|Adaptive|MkldnnMaxPool|"
    r"MkldnnAvgPool|Mean|ConstantPadNd|ReflectionPad|ReplicationPad|UpsampleN|UpsampleB)"
)


def nonlinear_sources(activation: Tensor) -> list[Any]:
    """The autograd nodes of the nonlinearities that the activation comes from: several after a concatenation.

    None where autograd has recorded nothing (no_grad, or no parameter before it).
    """
    sources: list[Any] = []
    level: list[Any] = [activation.grad_fn]
    met: set[Any] = {None}
    for _ in range(_DEPTH):
        if not level:
            break
        parents: list[Any] = []
        for node in level:
            if node in met:
                continue
            met.add(node)
            if _is_nonlinear(node):
                sources.append(node)
            elif _TRANSPARENT.match(node.name()):
                parents += [parent for parent, _ in node.next_functions]
        level = parents
    return sources


def _is_nonlinear(node: Any) -> bool:
    """Whether a node of autograd is a nonlinearity of an activation, not of a parameter."""
    name = node.name()
    parents = [parent for parent, _ in node.next_functions]
    if name.startswith("Where"):  # between two functions of an activation; else a mask
        return len(parents) == 2 and None not in parents
    if name.startswith("Div") and len(parents) == 2 and parents[1] is not None:  # softsign, x / (|x| + 1)
        inner = [p.name() for p, _ in parents[1].next_functions if p is not None]
        return parents[1].name().startswith("Add") and any(x.startswith("Abs") for x in inner)
    if not _NONLINEAR.match(name):
        return False
    return not all(isinstance(getattr(parent, "variable", None), nn.Parameter) for parent in parents)


class Discovery:
    """Looks at the inputs of a model's weight layers for one step.

    found: modules, by name, whose input comes from a functional nonlinearity, in the order met. An output
        that is read already (`known`) is no such source, and a source that two layers consume belongs to the
        first.
    """

    def __init__(self, model: nn.Module, on_look: Callable[[str, Tensor, bool], None]) -> None:
        self.found: dict[str, nn.Module] = {}
        self.looked = False  # at one pass with a graph
        self._on_look = on_look
        # Nodes, kept alive for the pass so that no other takes their place in memory.
        self._sources: dict[int, Any] = {}
        self._handles = [
            module.register_forward_pre_hook(_Look(self, name), with_kwargs=True)
            for name, module in model.named_modules()
            if isinstance(module, CONSUMERS)
        ]

    def begin(self) -> None:
        """A forward pass starts."""
        self._sources.clear()

    def known(self, output: Tensor) -> None:
        """The output of a nonlinearity module, read as such."""
        self._add(nonlinear_sources(output))

    def look(self, name: str, module: nn.Module, activation: Tensor) -> None:
        """Decide about the input of one layer."""
        if torch.is_grad_enabled():
            self.looked = True
        new = self._add(nonlinear_sources(activation))
        if new:
            self.found.setdefault(name, module)
        self._on_look(name, activation, new)

    def _add(self, sources: list[Any]) -> bool:
        """Whether one of them is new."""
        new = [source for source in sources if id(source) not in self._sources]
        self._sources.update((id(source), source) for source in new)
        return bool(new)

    def close(self) -> None:
        """Take the hooks off, and let go of the graph."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._sources.clear()


class _Look(Hook):
    """Pre-hook of a weight layer."""

    def __init__(self, discovery: Discovery, name: str) -> None:
        self.discovery = discovery
        self.name = name

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        # Autograd's graph is not to be seen from compiled code.
        if torch.compiler.is_compiling() or elsewhere():
            return
        activation = first_input(args, kwargs)
        if isinstance(activation, Tensor) and not recomputing():
            self.discovery.look(self.name, module, activation)


def run_example(model: nn.Module, example: Any) -> None:
    """One forward pass with a graph; modes and random state of the model stay as they are."""
    modes = {module: module.training for module in model.modules()}
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    model.eval()
    try:
        with torch.random.fork_rng(devices=list(devices)), torch.enable_grad():
            if isinstance(example, Mapping):
                model(**example)
            else:
                model(*(example if isinstance(example, (tuple, list)) else (example,)))
    finally:
        for module, training in modes.items():
            module.training = training
