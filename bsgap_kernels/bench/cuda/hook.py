"""The hook path as a call: one Gram launch a site as its activation appears, then one count for all.

Which implementation serves it is found by name at run time, the nearest to the tracker first:

1. `hook_path(activations, rtol)` of `bsgap_kernels.tracking` or `bsgap_kernels.ops`, where one is offered;
2. the private ops: `gram` of each site, then `_cuda_counts` over all (channels_last sites only);
3. `RankTracker` on a model whose layers hand the activations through.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ... import ops
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
    for build in (_offered, _private_ops, _tracker):
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


def _private_ops(activations: list[Tensor], rtol: float) -> Callable[[], Tensor] | None:
    private = torch.ops.bsgap
    if not (hasattr(private, "_cuda_table") and hasattr(private, "_cuda_counts")):
        return None
    matrices = [a.movedim(1, -1) for a in activations]
    if not (matrices[0].is_cuda and all(matrix.is_contiguous() for matrix in matrices)):
        return None
    flat = [matrix.flatten(0, -2) for matrix in matrices]
    order, values = count_table([(A.shape[0], A.shape[1]) for A in flat])
    sides = [flat[i].shape[1] for i in order]

    def call() -> Tensor:
        grams = torch.cat([ops.gram(flat[i]).flatten() for i in order])
        table = private._cuda_table(values, grams.device)
        counts: Tensor = private._cuda_counts(
            grams, table, sides, [1] * len(sides), None, 0.0, rtol, None, None, False, False
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
