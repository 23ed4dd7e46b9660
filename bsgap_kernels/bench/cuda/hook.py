"""The hook path as a call: one Gram launch a site as its activation appears, then one count for all."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...dispatch import device_kind, plan_of_sums


def hook_path(activations: list[Tensor], rtol: float) -> Callable[[], Tensor]:
    """A call that counts #{σ > rtol·σ_max} of each (B, C, H, W), unfolded by channel, without bounds."""
    device = activations[0].device
    sides = [activation.shape[1] for activation in activations]
    grams = [torch.zeros(side, side, dtype=torch.float64, device=device) for side in sides]
    totals = [torch.zeros(3, dtype=torch.float64, device=device) for _ in sides]
    plan = plan_of_sums("hook path", activations[0].dtype, rtol, device_kind(activations[0]))
    float32_sums = plan.gram == "float32"
    ops = torch.ops.bsgap

    def call() -> Tensor:
        torch._foreach_zero_(grams + totals)
        for activation, gram, total in zip(activations, grams, totals, strict=True):
            ops._accumulate_gram_(gram, total, None, activation, 1, 2, True, False, float32_sums, False)
        return ops._gram_counts(grams, totals, 0.0, [rtol], False)[:, 4].long()

    return call
