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
    r"^((Sin|Cos|Tan|Sinh|Asinh|Atan|Erf|Exp|Expm1|Log1P|Abs)Backward|Relu|LeakyRelu|Prelu|Rrelu|Elu|Selu|Celu|Gelu|Silu|Mish|Sigmoid|LogSigmoid|Hardsigmoid|Tanh|Hardtanh|"
    r"Hardswish|Softplus|Softshrink|Hardshrink|Threshold|Glu|Clamp|Pow|Maximum|Minimum)"
)
# What mixes units or rows: what comes before it is another activation.
_MIXING = re.compile(
    r"^(Addmm|Mm|Mv|Bmm|Baddbmm|Dot|Linear|Convolution|Mkldnn|Cudnn|Native|Embedding|ScaledDot|Softmax|LogSoftmax|Mean|"
    r"Sum|Prod|Norm|LinalgVectorNorm|Std|Var|Max|Amax|Amin|Aminmax|Logsumexp|Cumsum|Index|Gather|AccumulateGrad)"
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
                continue
            name, before = node.name(), [parent for parent, _ in node.next_functions]
            if name.startswith("Div"):
                parents += before[:1]  # a divisor is a norm
            elif _TRANSPARENT.match(name) or (name.startswith("Add") and None in before):  # of a constant
                parents += before
        level = parents
    return sources


def unknown_source(activation: Tensor) -> str | None:
    """The name of the autograd function of the user's that the activation comes from, or None."""
    node: Any = activation.grad_fn
    while node is not None and _TRANSPARENT.match(node.name()):
        node = next((parent for parent, _ in node.next_functions if parent is not None), None)
    function: Any = getattr(node, "_forward_cls", None)
    return None if function is None or function.__module__.startswith("torch.") else function.__name__


def _elementwise(node: Any) -> set[Any]:
    """The node, and those before it of which it is a function element by element."""
    found: set[Any] = set()
    level = [node]
    for _ in range(6):
        new = [x for x in level if x is not None and x not in found]
        found.update(new)
        level = [p for x in new if not _MIXING.match(x.name()) for p, _ in x.next_functions]
    return {x for x in found if not hasattr(x, "variable")}


def _is_nonlinear(node: Any) -> bool:
    """Whether a node of autograd is a nonlinearity of an activation, not of a parameter."""
    name = node.name()
    parents = [parent for parent, _ in node.next_functions]
    if name.startswith("Where"):  # between two functions of an activation; else a mask
        return len(parents) == 2 and None not in parents
    if name.startswith(("Div", "Mul")):  # softsign, x / (|x| + 1); x * x; x / sqrt(1 + x²)
        both = len(parents) == 2 and None not in parents
        return both and bool(_elementwise(parents[0]) & _elementwise(parents[1]))
    if not _NONLINEAR.match(name):
        return False
    return not all(isinstance(getattr(parent, "variable", None), nn.Parameter) for parent in parents)


class Discovery:
    """Looks at the inputs of a model's weight layers for one step.

    found: modules, by name, whose input comes from a functional nonlinearity, in the order met. An output
        that is read already (`known`) is no such source, and a source that two layers consume belongs to the
        first.
    unknown: by the same names, functions of the user's that an input comes from; they are not read.
    """

    def __init__(self, model: nn.Module, on_look: Callable[[str, Tensor, bool], None]) -> None:
        self.found: dict[str, nn.Module] = {}
        self.unknown: dict[str, str] = {}
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
        elif (function := unknown_source(activation)) is not None:
            self.unknown.setdefault(name, function)
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
