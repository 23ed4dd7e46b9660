"""Inputs of the CPU engine's tests: matrices by how they are made, and the ways they may lie in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import spectra
import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """A matrix by how it is made, so that a failure prints what makes it again."""

    m: int
    n: int
    dtype: torch.dtype = torch.float32
    kind: str = "graded"
    seed: int = 0

    def matrix(self) -> Tensor:
        """(m, n), contiguous."""
        generator = torch.Generator().manual_seed(self.seed)
        A = torch.randn(self.m, self.n, generator=generator, dtype=torch.float64)
        if self.kind == "graded":
            A *= spectra.geometric(self.n, 1e-3)
        elif self.kind == "low rank":
            A[:, self.n // 2 + 1 :] = A[:, :1]
        elif self.kind == "offset":
            A += 30.0
        return A.to(self.dtype)


def _within_nan(A: Tensor) -> Tensor:
    """A in the middle of NaN, which any read beside it brings into the result."""
    *batch, m, n = A.shape
    around = A.new_full((*batch, m + 2, n + 5), torch.nan)
    around[..., 1 : m + 1, 3 : n + 3] = A
    return around[..., 1 : m + 1, 3 : n + 3]


def _stepped(A: Tensor) -> Tensor:
    """A in every second row and every third column, NaN between them."""
    *batch, m, n = A.shape
    around = A.new_full((*batch, 2 * m + 1, 3 * n + 2), torch.nan)
    around[..., 1::2, 2::3] = A
    return around[..., 1::2, 2::3]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "transposed": lambda A: A.mT.contiguous().mT,
    "within NaN": _within_nan,
    "stepped": _stepped,
    "transposed, stepped": lambda A: _stepped(A.mT).mT,
    "last first": lambda A: A.movedim(-1, 0).contiguous().movedim(0, -1),
}


def convolutions(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Activations (*, n) of four and three dimensions, features last."""
    x = torch.randn(6, 10, 5, 7, generator=torch.Generator().manual_seed(3)).to(dtype)
    last = x.contiguous(memory_format=torch.channels_last)
    return {
        "NCHW": x.movedim(1, -1),
        "channels_last": last.movedim(1, -1),
        "some images": x[1::2].movedim(1, -1),
        "some channels": x[:, 2:9:3].movedim(1, -1),
        "a crop of channels_last": last[:, :, :, :4].movedim(1, -1),
        "one row of pixels": x[:, :, :1].movedim(1, -1),
        "tokens": x.flatten(2).mT,
    }
