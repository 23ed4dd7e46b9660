"""How a tensor's dimensions lie in memory, for the engines that read views in place."""

from __future__ import annotations

from torch import Tensor


def features_last(A: Tensor, first: int, last: int) -> Tensor:
    """A as (*, n), its dimensions [first, last) joined to features: a view where their strides allow."""
    return A.flatten(first, last - 1).movedim(first, -1)


def joined_dimensions(dimensions: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Dimensions (size, stride), outermost first, with those joined that one stride describes."""
    joined: list[tuple[int, int]] = []
    for size, stride in dimensions:
        if size == 1:
            continue
        if joined and joined[-1][1] == size * stride:
            joined[-1] = (joined[-1][0] * size, stride)
        else:
            joined.append((size, stride))
    return joined
