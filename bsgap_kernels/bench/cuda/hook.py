"""The hook path as a call: one Gram launch a site as its activation appears, then one count for all."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...dispatch import FLOAT32_GRAM_MIN_RTOL
from ...ops._register import engine_of


def hook_path(activations: list[Tensor], rtol: float) -> Callable[[], Tensor]:
    """A call that counts #{σ > rtol·σ_max} of each (B, C, H, W), unfolded by channel, without bounds."""
    device = activations[0].device
    engine = engine_of(device)
    sides = [activation.shape[1] for activation in activations]
    grams = [torch.zeros(side, side, dtype=torch.float64, device=device) for side in sides]
    totals = [torch.zeros(3, dtype=torch.float64, device=device) for _ in sides]
    float32_gram = rtol >= FLOAT32_GRAM_MIN_RTOL

    def call() -> Tensor:
        torch._foreach_zero_(grams + totals)
        for activation, gram, total in zip(activations, grams, totals, strict=True):
            engine.accumulate_gram(gram, total, None, activation, 1, 2, True, False, float32_gram, False)
        return engine.count_sums(grams, totals, 0.0, rtol, False, False)[0][:, 0].long()

    return call
