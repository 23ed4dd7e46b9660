"""Bad arguments: an error that names the argument, what came and what is expected; never a crash."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import bsgap_kernels as bsgap
from bsgap_kernels import _core

A = torch.eye(4)
MATRIX_OPS: list[Callable[..., Any]] = [
    bsgap.near_rank,
    bsgap.near_rank_ratio,
    bsgap.near_rank_interval,
    bsgap.gram,
    bsgap.covariance,
    bsgap.spectral_summary,
    lambda x: bsgap.singular_value_counts(x, torch.tensor([0.1])),
    lambda x: bsgap.near_rank_grouped([x]),
]
TOLERANCE_OPS: list[Callable[..., Any]] = [bsgap.near_rank, bsgap.near_rank_ratio, bsgap.near_rank_interval]


@pytest.mark.parametrize("op", MATRIX_OPS)
def test_matrices(op: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"at least 2 dimensions .* got shape \(3,\)"):
        op(torch.ones(3))
    with pytest.raises(TypeError, match=r"got torch.int64"):
        op(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="got layout torch.sparse_coo"):
        op(torch.eye(3).to_sparse())
    with pytest.raises(TypeError, match=r"must be a torch.Tensor, got ndarray"):
        op(np.eye(3))


@pytest.mark.parametrize("op", [bsgap.gram, bsgap.covariance, bsgap.spectral_summary])
def test_complex_matrices_are_only_counted(op: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"complex input \(torch.complex64\) is not supported"):
        op(torch.ones(3, 3, dtype=torch.complex64))


@pytest.mark.parametrize(
    "op",
    [
        *TOLERANCE_OPS,
        lambda x, **o: bsgap.singular_value_counts(x, torch.tensor([0.1]), **o),
        lambda x, **o: bsgap.near_rank_grouped([x], **o),
    ],
)
def test_complex_matrices_are_not_centred(op: Callable[..., Any]) -> None:
    with pytest.raises(
        ValueError, match=r"center=True of complex input \(torch.complex64\) is not supported"
    ):
        op(torch.ones(3, 3, dtype=torch.complex64), center=True)
    with pytest.raises(RuntimeError, match="center=True of complex input"):
        torch.ops.bsgap.near_rank(torch.ones(3, 3, dtype=torch.complex64), center=True)


@pytest.mark.parametrize("op", TOLERANCE_OPS)
@pytest.mark.parametrize("name", ["atol", "rtol"])
def test_tolerances(op: Callable[..., Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a non-negative number, got -0.1"):
        op(A, **{name: -0.1})
    with pytest.raises(ValueError, match=f"{name} must be a non-negative number, got nan"):
        op(A, **{name: float("nan")})
    with pytest.raises(TypeError, match=f"{name} must be a number, a tensor or None, got str"):
        op(A, **{name: "1e-2"})
    with pytest.raises(TypeError, match="center must be True or False, got 1"):
        op(A, center=1)


@pytest.mark.parametrize("op", TOLERANCE_OPS)
def test_keywords_of_matrix_rank_are_refused_by_name(op: Callable[..., Any]) -> None:
    refused = {"hermitian": True, "out": torch.empty(()), "tol": 0.1}
    takes = {bsgap.near_rank: set(refused), bsgap.near_rank_interval: {"hermitian"}}.get(op, set())
    for name in set(refused) - takes:
        with pytest.raises(TypeError, match=name):
            op(A, **{name: refused[name]})
    with pytest.raises(TypeError, match="unexpected keyword argument 'rtoll'"):
        op(A, rtoll=0.1)


@pytest.mark.parametrize("op", [bsgap.near_rank, bsgap.near_rank_interval])
def test_hermitian(op: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"takes square matrices \(\*, n, n\), got shape \(2, 4\)"):
        op(A[:2], hermitian=True)
    with pytest.raises(ValueError, match="hermitian=True takes no center=True"):
        op(A, hermitian=True, center=True)
    with pytest.raises(TypeError, match="hermitian must be True or False, got 1"):
        op(A, hermitian=1)
    with pytest.raises(RuntimeError, match="takes square matrices"):
        torch.ops.bsgap.near_rank(A[:2], hermitian=True)


def test_tol_and_out() -> None:
    for more in ({"atol": 0.1}, {"rtol": 0.1}, {"rtol": torch.tensor(0.1)}):
        with pytest.raises(TypeError, match="tol is another name of atol with rtol = 0: pass it alone"):
            bsgap.near_rank(A, 0.1, **more)
    with pytest.raises(ValueError, match="tol must be a non-negative number, got -0.1"):
        bsgap.near_rank(A, -0.1)
    with pytest.raises(ValueError, match=r"tol of shape \(3,\) does not broadcast"):
        bsgap.near_rank(A.expand(2, 4, 4), torch.ones(3))
    with pytest.raises(RuntimeError, match="tol is another name of atol"):
        torch.ops.bsgap.near_rank(A, 0.1, rtol=0.1)
    for op, kind in ((bsgap.near_rank, TypeError), (torch.ops.bsgap.near_rank, RuntimeError)):
        with pytest.raises(kind, match="but got result with dtype Bool"):
            op(A, out=torch.empty((), dtype=torch.bool))
    with pytest.raises(TypeError, match="out must be a torch.Tensor or None, got int"):
        bsgap.near_rank(A, out=3)
    with pytest.raises(ValueError, match="to be on the same device, A is on cpu, out on meta"):
        bsgap.near_rank(A, out=torch.empty((), device="meta"))


def test_options() -> None:
    with pytest.raises(ValueError, match="mode must be one of 'rigorous', 'probed', got 'exact'"):
        bsgap.near_rank_interval(A, mode="exact")
    with pytest.raises(TypeError, match=r"seed must be an int, got 0.5"):
        bsgap.near_rank_interval(A, seed=0.5)
    with pytest.raises(ValueError, match="seed must lie in"):
        bsgap.near_rank_interval(A, seed=-1)
    with pytest.raises(TypeError, match="rtol must be a number or None for near_rank_interval, got a tensor"):
        bsgap.near_rank_interval(A, rtol=torch.tensor(0.1))
    with pytest.raises(ValueError, match=r"correction must lie in 0 ... m - 1 \(m = 4 observations\), got 4"):
        bsgap.covariance(A, correction=4)
    with pytest.raises(TypeError, match="thresholds must be a torch.Tensor, got list"):
        bsgap.singular_value_counts(A, [0.1])
    with pytest.raises(ValueError, match="thresholds must have at least 1 dimension"):
        bsgap.singular_value_counts(A, torch.tensor(0.1))
    with pytest.raises(ValueError, match=r"thresholds must have shape \(t,\) or \(2, 't'\), got \(3, 1\)"):
        bsgap.singular_value_counts(A.expand(2, 4, 4), torch.ones(3, 1))
    with pytest.raises(TypeError, match="As must be a list of tensors, got Tensor"):
        bsgap.near_rank_grouped(A)
    with pytest.raises(ValueError, match=r"at least 2 dimensions .* got shape \(4,\)"):
        bsgap.near_rank_grouped([A, A[0]])


def test_accumulator_state() -> None:
    state, shift = torch.zeros(5, 5, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"state must have shape \(5, 5\), got \(4, 4\)"):
        bsgap.gram_accumulate_(state[:4, :4].contiguous(), A, shift)
    with pytest.raises(TypeError, match="shift must be float64, got torch.float32"):
        bsgap.gram_accumulate_(state, A, shift.float())
    with pytest.raises(ValueError, match="state must be contiguous"):
        bsgap.gram_accumulate_(torch.zeros(5, 10, dtype=torch.float64)[:, ::2], A, shift)
    assert (state == 0).all()  # nothing was added by a refused call


def test_raw_ops_say_the_same_as_runtime_errors() -> None:
    with pytest.raises(RuntimeError, match="A must have at least 2 dimensions"):
        torch.ops.bsgap.near_rank(torch.ones(3))
    with pytest.raises(RuntimeError, match="rtol must be a non-negative number, got -1.0"):
        torch.ops.bsgap.near_rank(A, rtol=-1.0)
    with pytest.raises(RuntimeError, match="mode must be one of"):
        torch.ops.bsgap.near_rank_interval(A, mode="x")


def test_an_rtol_that_counts_nothing_warns() -> None:
    with pytest.warns(UserWarning, match=r"rtol is 1.5: no singular value exceeds"):
        assert bsgap.near_rank(A, rtol=1.5).item() == 0


def test_core_names_its_arguments() -> None:
    with pytest.raises(ValueError, match="A must have 2 dimensions, got 1"):
        _core.near_rank_interval(np.ones(3))
    with pytest.raises(TypeError, match="A must be float64, float32 or float16, got int64"):
        _core.near_rank_interval(np.ones((3, 3), dtype=np.int64))
    with pytest.raises(ValueError, match="rtol must be a non-negative number"):
        _core.near_rank_interval(np.eye(3), rtol=-1.0)
    with pytest.raises(ValueError, match="mode must be 'rigorous' or 'probed', got 'x'"):
        _core.near_rank_interval(np.eye(3), mode="x")
    with pytest.raises(ValueError, match="native byte order"):
        _core.near_rank_interval(np.eye(3).astype(">f8"))
    with pytest.raises(ValueError, match="unknown error term 'x'"):
        _core.certified_count(np.eye(3), without=["x"])
    assert _core.near_rank_interval(np.eye(5, dtype=np.float16)[::-1, ::2]) == (3, 3)
    assert _core.near_rank_interval(np.empty((0, 3))) == (0, 0)
    assert _core.near_rank_interval(np.full((2, 2), np.nan)) == (-1, -1)
