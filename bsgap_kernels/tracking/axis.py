"""The dimension of an activation that holds its features: that of the layer before it, or behind it.

The number of dimensions does not tell: Swin and ConvNeXt have channels last, (B, H, W, C), as any Linear has.
Dimensions are counted from the end, so that they hold with and without a batch.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

_DEPTH = 16
_LAST = re.compile(r"^(Addmm|Addmv|Mm|Mv|Bmm|Linear|Embedding|MkldnnRnn|CudnnRnn|MiopenRnn|ScaledDotProduct)")
_SECOND = re.compile(r"^(\w*BatchNorm|NativeGroupNorm|\w*InstanceNorm)")
_RESHAPES = re.compile(r"^(View|UnsafeView|Reshape)")
# After these a dimension counted from the end is another, or gone.
_CHANGES_DIMENSIONS = re.compile(r"^(Unsqueeze|Squeeze|Select|Unbind|Stack|Mean|Sum)")

_CONVOLUTION = re.compile(r"(?:Lazy)?Conv(?:Transpose)?(\d)d")
_BATCH_NORM = re.compile(r"(?:Lazy|Sync)?BatchNorm(\d)d")
_FEATURES_LAST = re.compile(r"LayerNorm|RMSNorm|Embedding|MultiheadAttention|^(?:RNN|LSTM|GRU)$")


def of_consumer(module: nn.Module) -> int | None:
    """The dimension of features of a layer's input; None where it does not say."""
    if isinstance(module, (nn.Linear, nn.Bilinear)):
        return -1
    spatial = _CONVOLUTION.fullmatch(type(module).__name__)
    return -1 - int(spatial[1]) if spatial else None


def of_producer(activation: Tensor) -> int | None:
    """The dimension of features by the graph of autograd; None where it says nothing, or nothing sure.

    The graph leads back through elementwise operations, of sums along the first term, and permutations to the
    layer that made the activation: products with a weight and layer norms have features last, convolutions
    before their spatial dimensions, batch and group norms second. A reshape leaves the last dimension alone
    at most.
    """
    node: Any = activation.grad_fn
    moves: list[Any] = []  # of dimensions, from the activation back to the layer
    reshaped = False
    for _ in range(_DEPTH):
        if node is None:
            return None
        name = node.name()
        found = _of_node(node, name, activation.ndim)
        if found is not None:
            return None if reshaped and found != -1 else _forwards(found, moves, activation.ndim)
        if name.startswith(("Permute", "Transpose")):
            if reshaped:
                return None
            moves.append(_move_of(node, name))
        elif _CHANGES_DIMENSIONS.match(name) and not _takes_batch_off(node, name):
            return None
        reshaped = reshaped or bool(_RESHAPES.match(name))
        node = next((parent for parent, _ in node.next_functions if parent is not None), None)
    return None


def _of_node(node: Any, name: str, ndim: int) -> int | None:
    if name.startswith("Convolution"):
        return -1 - len(node._saved_stride)
    if name.startswith(("NativeLayerNorm", "FusedRmsNorm")):
        return -1 if len(getattr(node, "_saved_normalized_shape", ())) == 1 else None
    if _LAST.match(name):
        return -1
    return 1 - ndim if _SECOND.match(name) else None


def _move_of(node: Any, name: str) -> list[int] | tuple[int, int]:
    if name.startswith("Permute"):
        return [_signed(d) for d in node._saved_dims]
    return _signed(node._saved_dim0), _signed(node._saved_dim1)


def _takes_batch_off(node: Any, name: str) -> bool:
    # Convolutions put a batch on one image, and take it off again.
    return name.startswith("Squeeze") and getattr(node, "_saved_dim", None) == 0


def _signed(dim: int) -> int:
    return dim - 2**64 if dim >= 2**63 else dim  # as autograd saves a negative one


def _forwards(dim: int, moves: list[Any], ndim: int) -> int:
    """The place in the activation of a dimension of the layer's result."""
    place = dim % ndim
    for move in reversed(moves):
        if isinstance(move, list):
            place = [d % ndim for d in move].index(place)
        else:
            first, second = (d % ndim for d in move)
            place = second if place == first else first if place == second else place
    return place - ndim


class Layers:
    """Kinds of layers of a model, which decide where an activation has no graph of autograd."""

    def __init__(self, model: nn.Module) -> None:
        names = [type(module).__name__ for module in model.modules()]
        spatial = [kind.fullmatch(name) for kind in (_CONVOLUTION, _BATCH_NORM) for name in names]
        self._second = {2 + int(found[1]) for found in spatial if found}  # dimensions of a batch
        self._last = any(_FEATURES_LAST.search(name) for name in names)
        self._linear = any(isinstance(module, (nn.Linear, nn.Bilinear)) for module in model.modules())

    def place(self, ndim: int) -> int | None:
        """Return the dimension of features of `ndim`-dimensional activations; None where layers disagree."""
        batch, single = ndim in self._second, ndim + 1 in self._second
        if self._last:
            return None if batch else -1
        if batch and single:
            return None
        if batch or single:
            return 1 - ndim if batch else -ndim
        return -1 if self._linear else None


def undecided(site: str, shape: tuple[int, ...]) -> str:
    """The message where nothing says which dimension of an activation holds its features."""
    return (
        f"{site}: nothing says which dimension of an activation {shape} holds its features: no graph of "
        "autograd leads to a layer, and the model's layers disagree or are unknown; give features_dim=, such "
        "as 1 or -1"
    )
