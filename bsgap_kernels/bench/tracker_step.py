"""A step of the tracker as a call: matrices pass through modules that it watches, and it counts them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from ..tracking import RankTracker


class _Layers(nn.Module):
    """Hands each matrix through a module of its own, whose output is what the tracker reads."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(number))

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [layer(A) for layer, A in zip(self.layers, inputs, strict=True)]


@lru_cache(maxsize=1)
def _tracked(shapes: tuple[torch.Size, ...], rtol: float) -> tuple[_Layers, RankTracker]:
    """One tracker serves all steps on the same shapes, as in training."""
    model = _Layers(len(shapes))
    return model, RankTracker(model, layers=["layers.*"], unfold="flatten", rtol=rtol, verbose=False)


def tracker_step(inputs: Sequence[Tensor], rtol: float) -> Tensor:
    """Near-rank of matrices (m, n), by the tracker's hooks and the end of its step with default options."""
    model, tracker = _tracked(tuple(A.shape for A in inputs), rtol)
    with torch.enable_grad():  # passes without gradients are not read
        model(inputs)
    return torch.tensor([record.near_rank for record in tracker.collect().values()])
