"""The hook path as a call: one Gram launch a site as its activation appears, then one count for all."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...dispatch import FLOAT32_GRAM_MIN_RTOL
from ...ops._register import engine_of


def hook_path(activations: list[Tensor], rtol: float) -> Callable[[], Tensor]:
    """A call that counts #{σ > rtol·σ_max} of each (B, C, H, W), unfolded by channel, without bounds."""
    views = [activation.movedim(1, -1) for activation in activations]
    device = views[0].device
    engine = engine_of(device)
    grams = [torch.zeros(v.shape[-1], v.shape[-1], dtype=torch.float64, device=device) for v in views]
    totals = [torch.zeros(3, dtype=torch.float64, device=device) for _ in views]

    def call() -> Tensor:
        torch._foreach_zero_(grams + totals)
        for view, gram, total in zip(views, grams, totals, strict=True):
            engine.accumulate_gram(gram, total, None, view, True, False, rtol >= FLOAT32_GRAM_MIN_RTOL)
        return engine.count_sums(grams, totals, 0.0, rtol, False, False)[0][:, 0]

    return call
