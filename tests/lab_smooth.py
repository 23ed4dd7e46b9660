"""A small network with an exact Hessian, and a batch of rows for it, for the tests of methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bsgap_kernels.lab.batch import Batch, Gradients
from bsgap_kernels.lab.distributed import ALONE

ROWS = 10


class Smooth(nn.Module):
    """A small network in float64 whose loss has all derivatives; with batch norm or dropout if asked for."""

    def __init__(self, *extra: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), *extra, nn.Linear(5, 3)).double()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x)
        return logits


def smooth(*extra: nn.Module) -> Smooth:
    torch.manual_seed(3)
    return Smooth(*extra)


def rows_of(step: int = 0, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11 + step)
    return torch.randn(rows, 6, dtype=torch.float64, generator=generator), torch.arange(rows) % 3


def batch_of(model: nn.Module, step: int = 0, parts: int = 1, rows: int = ROWS) -> Batch:
    images, labels = rows_of(step, rows)
    read: Callable[[slice], tuple[Tensor, Tensor]] = lambda part: (images[part], labels[part])  # noqa: E731
    return Batch(step, slice(0, rows), read, Gradients(model, ALONE), parts)


def loss_of(model: nn.Module, part: slice = slice(None), step: int = 0) -> Tensor:
    images, labels = rows_of(step)
    return nn.functional.cross_entropy(model(images[part]), labels[part])


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def exact_product(model: nn.Module, direction: list[Tensor]) -> Tensor:
    gradient = torch.autograd.grad(loss_of(model), list(model.parameters()), create_graph=True)
    return flat(torch.autograd.grad(gradient, list(model.parameters()), grad_outputs=direction))
