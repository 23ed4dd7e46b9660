"""The plan of a call: chosen from dtype, shape and tolerance alone, printed as it runs, few dispatches."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest
import torch
from test_ops import random
from torch import Tensor

import bsgap_kernels as bsgap
from bsgap_kernels import dispatch
from bsgap_kernels.dispatch import TRIDIAGONAL_SIDE, select_backend


@pytest.mark.parametrize(
    ("dtype", "rtol", "side", "gram", "count"),
    [
        (torch.float32, 1e-2, 200, "float32", "kernels"),
        (torch.bfloat16, 1e-2, 64, "float32", "kernels"),
        (torch.float32, 1e-4, 200, "float64", "kernels"),
        (torch.float64, 1e-2, 200, "float64", "kernels"),
        (torch.float64, 2e-6, 20, "float64", "kernels"),
        (torch.float32, 1e-7, 20, None, "svdvals"),
        (torch.float64, None, 20, "float64", "kernels"),
    ],
)
def test_the_plan_is_a_pure_function(
    dtype: torch.dtype, rtol: float | None, side: int, gram: str | None, count: str
) -> None:
    plan = select_backend("near_rank", dtype, 1000, side, rtol=rtol)
    assert (plan.gram, plan.count) == (gram, count)
    assert plan == select_backend("near_rank", dtype, side, 1000, rtol=rtol)


PLANNED = [
    (torch.float32, 23, {"rtol": 1e-2}, [("float32", "kernels", "bsgap::_near_rank")]),
    (torch.float32, 23, {"rtol": 1e-4}, [("float64", "kernels", "bsgap::_near_rank")]),
    (torch.float64, 23, {"rtol": 1e-2}, [("float64", "kernels", "bsgap::_near_rank")]),
    (torch.float32, 23, {"atol": 1e-2}, [("float64", "kernels", "bsgap::_counts")]),
    (torch.float64, 23, {"rtol": 1e-9}, [(None, "svdvals", "aten::linalg_svdvals")]),
    (
        torch.float64,
        23,
        {"atol": 1e-9},
        [("float64", "kernels", "bsgap::_counts"), (None, "svdvals", "aten::linalg_svdvals")],
    ),
    (
        torch.float32,
        TRIDIAGONAL_SIDE + 1,
        {"thresholds": 9},
        [("float64", "eigvalsh", "bsgap::_eigenvalues")],
    ),
    (torch.float32, 23, {"rtol": 1e-2, "op": "grouped"}, [("float32", "kernels", "bsgap::_grouped_counts")]),
    (torch.float64, 23, {"rtol": 1e-9, "op": "grouped"}, [(None, "svdvals", "aten::linalg_svdvals")]),
    (
        torch.float64,
        23,
        {"atol": 1e-9, "op": "grouped"},
        [("float64", "kernels", "bsgap::_grouped_counts"), (None, "svdvals", "aten::linalg_svdvals")],
    ),
    (torch.float32, 23, {"rtol": 1e-2, "op": "interval"}, [("float64", "kernels", "bsgap::_intervals")]),
    (torch.float32, TRIDIAGONAL_SIDE + 1, {"thresholds": 8}, [("float64", "kernels", "bsgap::_counts")]),
    (torch.float32, TRIDIAGONAL_SIDE, {"thresholds": 9}, [("float64", "kernels", "bsgap::_counts")]),
]


@pytest.mark.parametrize(("dtype", "n", "arguments", "ran"), PLANNED)
def test_what_is_printed_is_what_runs(
    dtype: torch.dtype,
    n: int,
    arguments: dict[str, Any],
    ran: list[tuple[str | None, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("BSGAP_PRINT_CONFIG", "1")
    select_backend.cache_clear()
    float32: list[bool] = []
    module = importlib.import_module("bsgap_kernels.ops.near_rank")  # of the name is the function, too
    op = module._NEAR_RANK
    monkeypatch.setattr(module, "_NEAR_RANK", lambda *args: float32.append(args[-1]) or op(*args))
    A = random(161, n, dtype=dtype)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        if "thresholds" in arguments:
            bsgap.singular_value_counts(A, torch.linspace(0.1, 0.9, arguments["thresholds"]))
        elif arguments.get("op") == "grouped":
            bsgap.near_rank_grouped([A], **{k: v for k, v in arguments.items() if k != "op"})
        elif arguments.get("op") == "interval":
            bsgap.near_rank_interval(A, rtol=arguments["rtol"])
        else:
            bsgap.near_rank(A, **arguments)
    select_backend.cache_clear()
    printed = re.findall(r"gram=(\S+), count=(\S+),", capsys.readouterr().err)
    assert printed == [(repr(gram), repr(count)) for gram, count, _ in ran]
    expensive = {name for *_, calls in PLANNED for *_, name in calls}
    names = [event.name for event in sorted(profile.events(), key=lambda e: e.time_range.start)]
    assert [name for name in names if name in expensive] == [name for _, _, name in ran]
    if float32:
        assert float32 == [ran[0][0] == "float32"]


def test_a_capture_is_refused_before_anything_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    # On the CPU, told that it is a GPU whose stream is being captured: a copy from the host would break it.
    A = random(30, 20, dtype=torch.float64)

    def copied(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("a copy from the host")

    monkeypatch.setattr(dispatch, "device_kind", lambda A: "cuda")
    monkeypatch.setattr(importlib.import_module("bsgap_kernels.ops._solvers"), "is_capturing", lambda _: True)
    monkeypatch.setattr(torch, "tensor", copied)
    monkeypatch.setattr(torch.Tensor, "to", copied)
    for call in (
        lambda: bsgap.near_rank(A, rtol=1e-9),
        lambda: bsgap.near_rank(A),
        lambda: bsgap.near_rank_grouped([A, A[:5]], rtol=1e-9),
        lambda: bsgap.near_rank_grouped([A, A[:5]]),
    ):
        with pytest.raises(RuntimeError, match="not possible while a CUDA graph is captured"):
            call()


def test_a_near_rank_is_two_dispatches() -> None:
    # Of a small matrix nearly all time is dispatch: one more op is a third of what the count itself takes.
    A = random(2, 2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        counts = torch.ops.bsgap.near_rank(A, rtol=1e-2)
    ops = [event.name for event in profile.events() if "::" in event.name]
    assert ops == ["bsgap::near_rank", "bsgap::_near_rank"]
    assert (counts.shape, counts.stride()) == ((), ())
