"""What the adapters' tests compare with: float64 counts of activations kept in the same step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

Counts = dict[int, dict[str, int]]


class Kept:
    """A sink that keeps the near-rank of every step and site, and whether it was closed."""

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self.closed = False

    def write(self, rows: Sequence[Any]) -> None:
        self.rows += rows

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def counts(self) -> Counts:
        counts: Counts = {}
        for row in self.rows:
            if row.metric == "batch.near_rank":
                assert row.site not in counts.setdefault(row.step, {}), f"{row} was written twice"
                counts[row.step][row.site] = int(row.value)
        return counts


def near_rank(parts: Sequence[Tensor], rtol: float) -> int:
    """Of all rows together. The test is void if a singular value is within 1 % of the threshold."""
    sigma = torch.linalg.svdvals(torch.cat(list(parts)).double())
    margin = float((sigma / (rtol * sigma[0]) - 1).abs().min())
    assert margin > 0.01, f"a singular value is within {margin:.2%} of the threshold; choose another seed"
    return int((sigma > rtol * sigma[0]).sum())


def hooks(model: nn.Module) -> int:
    """How many forward hooks the model's modules have."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
