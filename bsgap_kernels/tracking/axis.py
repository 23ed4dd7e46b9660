"""Which dimension of an activation holds its features: asked of the layer that made it, or that takes it.

The number of dimensions does not tell: Swin and ConvNeXt have channels last, (B, H, W, C), as any Linear has.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

_DEPTH = 16
_LAST = re.compile(r"^(Addmm|Mm|Bmm|Linear|Embedding|MkldnnRnn|CudnnRnn|MiopenRnn|ScaledDotProduct)")
_SECOND = re.compile(r"^(\w*BatchNorm|NativeGroupNorm|\w*InstanceNorm)")
# A view of the last dimension's own making: a Linear's result takes its shape by one.
_VIEW = re.compile(r"^(View|UnsafeView|Reshape|Unsqueeze|Squeeze|Expand|Slice|Select|Split|Unbind|Mean)")


def of_consumer(module: nn.Module) -> int | None:
    """The dimension of features of a layer's input, counted from the end; None where it does not say."""
    if isinstance(module, (nn.Linear, nn.Bilinear)):
        return -1
    spatial = re.fullmatch(r"(?:Lazy)?Conv(?:Transpose)?(\d)d", type(module).__name__)
    return -1 - int(spatial[1]) if spatial else None


def of_producer(activation: Tensor) -> int | None:
    """The dimension of features, counted from the end, by the graph of autograd; None where it says nothing.

    The graph leads back through elementwise operations, of sums along the first term, and permutations to the
    layer that made the activation: products with a weight and layer norms have features last, convolutions
    before their spatial dimensions, batch and group norms second.
    """
    node: Any = activation.grad_fn
    moves: list[Any] = []  # of dimensions, from the activation back to the layer
    viewed = False
    for _ in range(_DEPTH):
        if node is None:
            return None
        name = node.name()
        found: int | None = None
        if name.startswith("Convolution"):
            found = -1 - len(node._saved_stride)
        elif _LAST.match(name) or (
            name.startswith(("NativeLayerNorm", "FusedRmsNorm")) and _one_dimension(node)
        ):
            found = -1
        elif _SECOND.match(name):
            found = 1 - activation.ndim
        if found is not None:
            return None if viewed and found != -1 else _forwards(found, moves, activation.ndim)
        if name.startswith("Permute"):
            moves.append([_signed(d) for d in node._saved_dims])
        elif name.startswith("Transpose"):
            moves.append((_signed(node._saved_dim0), _signed(node._saved_dim1)))
        elif _VIEW.match(name):  # of one image, convolutions take off the batch that they have put on
            viewed = viewed or not (name.startswith("Squeeze") and getattr(node, "_saved_dim", None) == 0)
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        node = parents[0] if parents else None
    return None


def _one_dimension(node: Any) -> bool:
    shape = getattr(node, "_saved_normalized_shape", (0,))
    return len(shape) == 1


def _signed(dim: int) -> int:
    return dim - 2**64 if dim >= 2**63 else dim  # as autograd saves what is below 0


def _forwards(dim: int, moves: list[Any], ndim: int) -> int:
    """Where a dimension of the layer's result, counted from the end, is in the activation."""
    place = dim % ndim
    for move in reversed(moves):
        if isinstance(move, list):
            place = [d % ndim for d in move].index(place)
        else:
            first, second = (d % ndim for d in move)
            place = second if place == first else first if place == second else place
    return place - ndim
