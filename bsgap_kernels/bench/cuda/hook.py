"""The hook path as a call: what the tracker does with the activations of a step, without its model."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...ops._register import engine_of
from ...tracking.sites import unfold_view


def hook_path(activations: list[Tensor], rtol: float) -> Callable[[], Tensor]:
    """A call that counts #{σ > rtol·σ_max} of the channel unfolding of each (B, C, H, W).

    On a GPU one Gram launch a site, as its activation appears, then one count and one summary of all.
    """
    engine = engine_of(activations[0].device)

    def call() -> Tensor:
        sites = [engine.site(unfold_view(x, "channel"), None, rtol, False, False) for x in activations]
        return engine.site_records(sites)[:, 0].long()

    return call
