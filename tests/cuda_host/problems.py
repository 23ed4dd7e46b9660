"""Grouped launches from Gram matrices: the table and the flat buffer that the count kernels take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bsgap_kernels.triton.table import COLUMNS


@dataclass
class Group:
    """Gram matrices (count, k, k), and what their table row says of how they came about."""

    grams: Tensor
    m: int = 0
    roundings: int = 0

    @property
    def side(self) -> int:
        return self.grams.shape[-1]


@dataclass
class Problem:
    """Arguments of ``count_grams``, for groups in the caller's order."""

    grams: Tensor
    table: Tensor
    sides: list[int]
    batches: list[int]
    order: list[int]
    """Caller's indices of the groups, in table order."""
    starts: list[int] = field(default_factory=list)
    """Index of each group's first matrix, in the caller's order."""

    def eigenvalues_of(self, flat: Tensor) -> list[Tensor]:
        """The flat eigenvalues cut into (count, k), in the caller's order of groups."""
        sizes = [s * b for s, b in zip(self.sides, self.batches, strict=True)]
        parts = [
            part.view(b, s) for part, b, s in zip(flat.split(sizes), self.batches, self.sides, strict=True)
        ]
        result: list[Tensor] = [flat] * len(parts)
        for part, index in zip(parts, self.order, strict=True):
            result[index] = part
        return result


def problem(groups: Sequence[Group]) -> Problem:
    """Table rows sorted by side, descending and stable; results in the order of ``groups``."""
    starts, total = [], 0
    for group in groups:
        starts.append(total)
        total += group.grams.shape[0]
    order = sorted(range(len(groups)), key=lambda i: -groups[i].side)
    rows, first_matrix, first_gram = [], 0, 0
    for index in order:
        group = groups[index]
        count, k = group.grams.shape[0], group.side
        row = dict.fromkeys(COLUMNS, 0)
        row |= {"first_matrix": first_matrix, "count": count, "side": k, "first_gram": first_gram}
        row |= {"first_result": starts[index], "roundings": group.roundings, "m": group.m or k, "n": k}
        row |= {"outer": 1, "inner": group.m or k}
        rows.append([row[c] for c in COLUMNS])
        first_matrix += count
        first_gram += count * k * k
    return Problem(
        grams=torch.cat([groups[i].grams.reshape(-1) for i in order]).to(torch.float64).contiguous(),
        table=torch.tensor(rows, dtype=torch.int64),
        sides=[groups[i].side for i in order],
        batches=[groups[i].grams.shape[0] for i in order],
        order=order,
        starts=starts,
    )
