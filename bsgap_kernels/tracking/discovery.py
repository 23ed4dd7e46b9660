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

from bsgap_kernels.tracking.hooks import recomputing
from bsgap_kernels.tracking.sites import CONSUMERS

_DEPTH = 12
_NONLINEAR = re.compile(
    r"^(Relu|LeakyRelu|Prelu|Rrelu|Elu|Selu|Celu|Gelu|Silu|Mish|Sigmoid|LogSigmoid|Hardsigmoid|Tanh|Hardtanh|"
    r"Hardswish|Softplus|Softshrink|Hardshrink|Threshold|Glu|Clamp)"
)
_TRANSPARENT = re.compile(
    r"^(View|UnsafeView|Reshape|Alias|Permute|Transpose|T|Squeeze|Unsqueeze|Expand|Clone|Contiguous|ToCopy|"
    r"Slice|Select|Split|Chunk|Cat|Mul|Div|NativeDropout|FusedDropout|MaxPool|AvgPool|Adaptive|MkldnnMaxPool|"
    r"MkldnnAvgPool|Mean|ConstantPadNd|ReflectionPad|ReplicationPad|UpsampleN|UpsampleB)"
)


def nonlinear_source(activation: Tensor) -> Any | None:
    """The autograd node of the nonlinearity that the activation comes from, or None.

    None too where autograd has recorded nothing (no_grad, or no parameter before it).
    """
    level = [activation.grad_fn]
    for _ in range(_DEPTH):
        nodes = [node for node in level if node is not None]
        if not nodes:
            return None
        for node in nodes:
            if _NONLINEAR.match(node.name()):
                return node
        level = [
            parent for node in nodes if _TRANSPARENT.match(node.name()) for parent, _ in node.next_functions
        ]
    return None


class Discovery:
    """Looks at the inputs of a model's weight layers for one step.

    found: modules, by name, whose input comes from a functional nonlinearity, in the order met. An output
        that
    is read already (`known`) is no such source, and a source that two layers consume belongs to the first.
    """

    def __init__(self, model: nn.Module, on_found: Callable[[str, nn.Module, Tensor], None]) -> None:
        self.found: dict[str, nn.Module] = {}
        self.looked = False  # at one pass with a graph
        self._on_found = on_found
        # Nodes, kept alive for the pass so that no other takes their place in memory.
        self._sources: dict[int, Any] = {}
        self._handles = [
            module.register_forward_pre_hook(_Look(self, name))
            for name, module in model.named_modules()
            if isinstance(module, CONSUMERS)
        ]

    def begin(self) -> None:
        """A forward pass starts."""
        self._sources.clear()

    def known(self, output: Tensor) -> None:
        """The output of a nonlinearity module, read as such."""
        source = nonlinear_source(output)
        if source is not None:
            self._sources[id(source)] = source

    def look(self, name: str, module: nn.Module, activation: Tensor) -> None:
        """Decide about the input of one layer."""
        if torch.is_grad_enabled():
            self.looked = True
        source = nonlinear_source(activation)
        if source is None or id(source) in self._sources:
            return
        self._sources[id(source)] = source
        self.found.setdefault(name, module)
        self._on_found(name, module, activation)

    def close(self) -> None:
        """Take the hooks off, and let go of the graph."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._sources.clear()


class _Look:
    """Pre-hook of a weight layer; a copy of the model gets one that does nothing."""

    def __init__(self, discovery: Discovery | None, name: str) -> None:
        self.discovery = discovery
        self.name = name

    def __call__(self, module: nn.Module, args: Any) -> None:
        # Autograd's graph is not to be seen from compiled code.
        if self.discovery is None or torch.compiler.is_compiling():
            return
        if args and isinstance(args[0], Tensor) and not recomputing():
            self.discovery.look(self.name, module, args[0])

    def __reduce__(self) -> tuple[Any, ...]:
        return _Look, (None, self.name)


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
