"""The hook path as a call: one Gram launch a site as its activation appears, then one count for all.

Which implementation serves it is found by name at run time, the nearest to the tracker first:

1. `hook_path(activations, rtol)` of `bsgap_kernels.tracking` or `bsgap_kernels.ops`, where one is offered;
2. the engine of CUDA: `gram_stage` of each site, then `_cuda_counts` over all;
3. `RankTracker` on a model whose layers hand the activations through.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...dispatch import select_backend
from ...tracking import RankTracker

COLUMNS = (
    "first_item",
    "first_matrix",
    "count",
    "pointer",
    "stride_batch",
    "side",
    "outer",
    "inner",
    "stride_outer",
    "stride_inner",
    "stride_side",
    "splits",
    "first_gram",
    "first_partial",
    "layout",
    "first_result",
    "roundings",
    "m",
    "n",
    "reserved",
)
"""Of the table that `_cuda_counts` reads."""


def hook_path(activations: list[Tensor], rtol: float) -> Callable[[], Tensor]:
    """A call that counts #{σ > rtol·σ_max} of the channel unfolding of each (B, C, H, W)."""
    for build in (_offered, _engine, _tracker):
        call = build(activations, rtol)
        if call is not None:
            return call
    raise RuntimeError("no implementation of the hook path was found")


def _offered(activations: list[Tensor], rtol: float) -> Callable[[], Tensor] | None:
    for name in ("bsgap_kernels.tracking", "bsgap_kernels.ops"):
        build = getattr(importlib.import_module(name), "hook_path", None)
        if build is not None:
            call: Callable[[], Tensor] = build(activations, rtol)
            return call
    return None


def _engine(activations: list[Tensor], rtol: float) -> Callable[[], Tensor] | None:
    """A Gram launch a site through the engine of CUDA, then its counting op over all."""
    engine: Any = importlib.import_module("bsgap_kernels.ops._cuda")
    views = [activation.movedim(1, -1) for activation in activations]
    shapes = [(view.shape[:-1].numel(), view.shape[-1]) for view in views]
    # The table below says side = features.
    if not (views[0].is_cuda and engine._has_kernels() and all(m >= n for m, n in shapes)):
        return None
    order, values = count_table(shapes)
    sides = [shapes[i][1] for i in order]
    plans = [
        select_backend("near_rank", v.dtype, *shape, rtol=rtol, device="cuda")
        for v, shape in zip(views, shapes, strict=True)
    ]

    def call() -> Tensor:
        grams = [engine.gram_stage([v], plan.gram)[0].grams for v, plan in zip(views, plans, strict=True)]
        flat = torch.cat([grams[i].flatten() for i in order])
        table = engine.device_table(values, flat.device)
        counts: Tensor = torch.ops.bsgap._cuda_counts(
            flat, table, sides, [1] * len(sides), None, 0.0, rtol, None, None, False, False
        )[0]
        return counts[:, 0]

    return call


def count_table(shapes: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Order of the matrices (largest side first, stable) and the table's values for Gram matrices A^T A."""
    order = sorted(range(len(shapes)), key=lambda i: -shapes[i][1])
    values: list[int] = []
    first_gram = 0
    for row, i in enumerate(order):
        m, n = shapes[i]
        entry = dict.fromkeys(COLUMNS, 0) | {
            "first_matrix": row,
            "count": 1,
            "side": n,
            "outer": 1,
            "inner": m,
            "first_gram": first_gram,
            "first_result": i,
            "roundings": m,  # an upper bound: nothing is certified here
            "m": m,
            "n": n,
        }
        values += [entry[name] for name in COLUMNS]
        first_gram += n * n
    return order, values


class _Sites(nn.Module):
    """A model whose layers' outputs are given activations."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(number))

    def forward(self, activations: list[Tensor]) -> None:
        for layer, activation in zip(self.layers, activations, strict=True):
            layer(activation)


def _tracker(activations: list[Tensor], rtol: float) -> Callable[[], Tensor] | None:
    model = _Sites(len(activations))
    tracker = RankTracker(model, layers=["layers.*"], unfold="channel", rtol=rtol)

    def call() -> Tensor:
        model(activations)
        # The first of what a site keeps on the device is its count.
        return torch.stack([item.values[0] for item in tracker._pending["batch"].values()]).long()

    return call
