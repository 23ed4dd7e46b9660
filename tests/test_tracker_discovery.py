"""Functional nonlinearities found before the layer that takes their output, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tracker_models import RTOL

import bsgap_kernels as bsgap

FOUND: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
    "squared relu": lambda x: F.relu(x) ** 2,
    "square": lambda x: x.pow(2),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "maximum": lambda x: torch.maximum(x, torch.zeros(())),
    "minimum": lambda x: torch.minimum(x, x * 2),
    "swish by hand": lambda x: x * torch.sigmoid(x),
    "scaled": lambda x: 2 * F.relu(x) - 1,
    "sine": torch.sin,
    "product with itself": lambda x: x * x,
    "GELU by hand": lambda x: 0.5 * x * (1 + torch.erf(x / 1.414)),
    "tanh GELU by hand": lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.045 * x**3))),
    "x / sqrt(1 + x²)": lambda x: x / torch.sqrt(1 + x * x),
    "log(1 + |x|)": lambda x: torch.log1p(x.abs()),
}
LEFT: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda x: x,
    "a mask": lambda x: torch.where(x.detach() > 0, x, torch.zeros(())),
    "scaling": lambda x: x / 3,
    "normalize": F.normalize,
    "standardisation by hand": lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5),
    "product of two layers' parts": lambda x: torch.cat([x[:, :2].softmax(-1), x[:, 2:]], -1),
    "a norm": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)),
}


class Net(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor], by_name: bool = False) -> None:
        super().__init__()
        self.first, self.act = nn.Linear(6, 6), nn.Tanh()
        self.second, self.third = nn.Linear(6, 5), nn.Linear(5, 4)
        self.function, self.by_name = function, by_name

    def forward(self, x: Tensor) -> Tensor:
        x = self.function(self.second(self.act(self.first(x))))
        return self.third(input=x) if self.by_name else self.third(x)


def read(model: nn.Module, steps: int = 2) -> dict[str, int]:
    """Near-rank by site, of the last step: sites of the first are those of all."""
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    sites = []
    with bsgap.RankTracker(model, rtol=RTOL, verbose=False) as tracker:
        for _ in range(steps):
            model(x).sum().backward()
            sites.append({name: record.near_rank for name, record in tracker.collect().items()})
    assert sites[0].keys() == sites[-1].keys()
    return sites[-1]


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("name", FOUND)
def test_what_is_found(name: str, by_name: bool) -> None:
    torch.manual_seed(0)
    model = Net(FOUND[name], by_name)
    found = read(model)
    assert list(found) == ["act#0", "third:input#0"]
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    A = model.function(model.second(model.act(model.first(x)))).detach().double()
    assert found["third:input#0"] == int(torch.linalg.matrix_rank(A, rtol=RTOL))


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left(name: str) -> None:
    assert list(read(Net(LEFT[name]))) == ["act#0"]


def test_a_function_of_a_parameter_is_no_activation() -> None:
    class Scaled(Net):
        def __init__(self) -> None:
            super().__init__(lambda x: x)
            self.raw = nn.Parameter(torch.zeros(5))
            self.function = lambda x: x * F.softplus(self.raw)

    assert list(read(Scaled())) == ["act#0"]


class Squash(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.tanh()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient


def test_a_function_of_the_users_own_is_named() -> None:
    with pytest.warns(UserWarning, match="Squash before third: may or may not be a nonlinearity"):
        assert list(read(Net(Squash.apply))) == ["act#0"]


def test_a_layer_called_several_times_keeps_its_sites() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = F.relu(self.inner(x))
            return self.out(x)

    assert list(read(Loop(), steps=3)) == ["inner:input#1", "inner:input#2", "out:input#0"]


@pytest.mark.parametrize("function", [nn.Softplus(), None])
def test_a_parametrisation_is_no_activation(function: nn.Module | None) -> None:
    class Positive(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return F.softplus(weight)

    model = Net(F.relu)
    nn.utils.parametrize.register_parametrization(model.third, "weight", function or Positive())
    assert list(read(model)) == ["act#0", "third:input#0"]
