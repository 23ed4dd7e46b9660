"""The hook path as a call: one Gram launch a site as its activation appears, then one count for all."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...ops._register import engine_of


def hook_path(activations: list[Tensor], rtol: float) -> Callable[[], Tensor]:
    """A call that counts #{σ > rtol·σ_max} of the channel unfolding of each (B, C, H, W), without its bounds.

    The spectral summary that the tracker records is part of it.
    """
    views = [activation.movedim(1, -1) for activation in activations]

    engine = engine_of(views[0].device)

    def call() -> Tensor:
        sites = [engine.site(view, None, rtol, False, False) for view in views]
        return engine.site_records(sites)[:, 0].to(torch.int64)

    return call
