"""Every public op under torch.library's checks and torch.compile: fakes, autograd keys, no graph breaks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_ops import random
from torch import Tensor

import bsgap_kernels as bsgap
from bsgap_kernels import schema


def raw(name: str) -> Any:
    packet, _, overload = name.partition(",")[0].partition(".")
    return getattr(getattr(torch.ops.bsgap, packet), overload or "default")


CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "gram": ((random(2, 9, 5),), {"center": True}),
    "covariance": ((random(9, 5),), {"correction": 0}),
    "covariance.weighted": (
        (random(2, 4, 3),),
        {"fweights": torch.arange(4), "aweights": random(2, 4).abs()},
    ),
    "near_rank": ((random(2, 9, 5),), {"rtol": 0.1}),
    "near_rank.tensor": ((random(2, 9, 5),), {"atol": torch.tensor([0.1, 2.0])}),
    "near_rank.out": ((random(2, 9, 5), 0.5), {"out": torch.empty(2, dtype=torch.int64)}),
    "near_rank.tensor_out": (
        (random(2, 9, 5), torch.tensor([0.1, 2.0], dtype=torch.float64)),
        {"out": torch.empty(2, dtype=torch.int64)},
    ),
    "near_rank, hermitian": ((random(2, 5, 5), None, True), {"rtol": 0.1}),
    "near_rank.tensor, hermitian": (
        (random(2, 5, 5),),
        {"atol": torch.tensor([0.1, 2.0]), "hermitian": True},
    ),
    "near_rank_interval, hermitian": ((random(2, 5, 5),), {"hermitian": True}),
    "near_rank, complex": ((random(2, 5, 3) + 1j * random(2, 5, 3, seed=1),), {"rtol": 0.1}),
    "near_rank_ratio": ((random(2, 9, 5),), {"rtol": 0.1}),
    "near_rank_ratio.tensor": ((random(9, 5),), {"rtol": torch.tensor(0.1)}),
    "near_rank_interval": ((random(90, 80),), {"rtol": 0.1, "mode": "probed", "seed": 3}),
    "singular_value_counts": ((random(2, 9, 5), torch.tensor([0.1, 0.5])), {"relative": False}),
    "spectral_summary": ((random(3, 20, 15),), {}),
    "near_rank_grouped": (([random(9, 5), random(3, 30)],), {"rtol": 0.1}),
    "gram_accumulate_": (
        (torch.zeros(6, 6, dtype=torch.float64), random(9, 5), torch.zeros(5, dtype=torch.float64)),
        {},
    ),
}


def test_every_op_has_a_call_here() -> None:
    assert {name.partition(",")[0].split(".")[0] for name in CALLS} == set(schema.OP_NAMES)


def with_grad(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype == torch.float32:
        return value.clone().requires_grad_()
    return value


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str) -> None:
    args, kwargs = CALLS[name]
    torch.library.opcheck(raw(name), args, kwargs)
    if name not in ("gram_accumulate_", "near_rank_grouped"):  # a state, a list: no leaves of a graph
        torch.library.opcheck(raw(name), tuple(with_grad(a) for a in args), kwargs)


@pytest.mark.parametrize("name", CALLS)
def test_compiles_without_graph_breaks(name: str) -> None:
    args, kwargs = CALLS[name]
    op: Callable[..., Any] = raw(name)

    def step(*xs: Any) -> Any:
        result = op(*xs, **kwargs)
        return xs[0] + 0 if result is None else result

    def fresh() -> tuple[Any, ...]:
        return tuple(x.clone() if isinstance(x, Tensor) else x for x in args)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*fresh()), step(*fresh()), equal_nan=True)


def test_the_public_wrappers_compile_too() -> None:
    def step(x: Tensor) -> tuple[Tensor, ...]:
        lower, upper = bsgap.near_rank_interval(x, rtol=0.1)
        return (
            bsgap.near_rank(x, rtol=0.1),
            lower,
            upper,
            bsgap.spectral_summary(x.relu()),
            bsgap.singular_value_counts(x, torch.tensor([0.1])),
            bsgap.near_rank_grouped([x, x.T], rtol=0.1),
        )

    A = random(30, 12)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(A), step(A), equal_nan=True)
