"""The tiles of every instruction set, whatever the processor: BSGAP_ISA, one process for each."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import spectra
import torch
from numpy.typing import NDArray
from tolerances import COUNT_MARGIN, sum_rtol
from torch import Tensor

import bsgap_kernels as bsgap
from bsgap_kernels import _core
from bsgap_kernels.dispatch import FLOAT32_GRAM_MIN_RTOL

TESTS = Path(__file__).parent
SETS = ("generic", "avx2", "avx512")
# Around the widths of tiles, panels, lanes, strips and shares; wide ones, slabs (2100 rows), blocks.
SHAPES = ((1, 1), (9, 8), (40, 17), (24, 70), (70, 64), (66, 65), (100, 97), (130, 300), (300, 200),
          (2100, 31), (270, 258), (530, 515))  # fmt: skip
PRECISIONS = ((torch.float32, 0.02), (torch.float32, 2e-3), (torch.float64, 1e-4))
Results = dict[str, NDArray[np.float64]]


def cases() -> Iterator[tuple[str, Tensor, float, int]]:
    """Name, matrix, rtol and count of matrices of prescribed spectra; 2e-3 takes a float64 Gram matrix."""
    for i, (m, n) in enumerate(SHAPES):
        for dtype, rtol in PRECISIONS:
            count = max(1, min(m, n) * 2 // 3)
            A = spectra.with_count(m, n, count, rtol, margin=COUNT_MARGIN, dtype=dtype, seed=i)
            yield f"{m}x{n} {dtype} {rtol}", A, rtol, count


def absorbing(m: int, n: int) -> Tensor:
    """Products that a sum absorbs, half a unit in its last place, in a chain of 16 and between eight chains.

    One chain of 128 loses 127 of them. Every number is exact in bfloat16.
    """
    row = torch.arange(m) % 128
    column = torch.where(row == 0, 1.0, torch.where(row < 16, 2.0**-12, 2.0**-14))
    return column[:, None] * torch.tensor([1.0, 2.0, 4.0]).repeat(n)[:n]


def absorbed_sums() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, rows (m, n) and float32 sums of them, by tiles, pairs of bfloat16, planes and six planes."""
    for n in (5, 16, 40, 600):
        A = absorbing(1000, n)
        yield f"{n} columns", A, torch.ops.bsgap._feature_gram(A, False, True)[0]
        yield f"{n} bfloat16", A, torch.ops.bsgap._feature_gram(A.bfloat16(), False, True)[0]
    for channels in (6, 20):  # a lane takes every 16th of the pixels
        lanes = absorbing(512, channels).repeat_interleave(16, 0)
        image = lanes.reshape(2, 256, 16, channels).movedim(-1, 1).contiguous().movedim(1, -1)
        gram = torch.zeros(channels, channels, dtype=torch.float64)
        totals = torch.zeros(3, dtype=torch.float64)
        torch.ops.bsgap._accumulate_gram_(gram, totals, None, image, 3, 4, True, False, True, False)
        yield f"{channels} planes", lanes, gram.tril() + gram.tril(-1).mT


def answer(path: str) -> None:
    """What one process has to say: run with BSGAP_ISA set."""
    torch.set_num_threads(1)
    found: dict[str, object] = {"instruction_set": _core.instruction_set()}
    for name, A, rtol, _ in cases():
        found[f"{name} gram"] = bsgap.gram(A).numpy()
        found[f"{name} centred"] = bsgap.gram(A + 1.0, center=True).numpy()
        found[f"{name} float32"] = _core.gram(A.numpy(), float32=True)["gram"]
        intervals = [bsgap.near_rank_interval(A, rtol=rtol, mode=mode) for mode in ("rigorous", "probed")]
        counts = [int(bsgap.near_rank(A, rtol=rtol)), *(int(end) for ends in intervals for end in ends)]
        found[f"{name} counts"] = np.array(counts)
        found[f"{name} strided"] = bsgap.gram(A.bfloat16().mT.contiguous().mT).numpy()
    found |= {name: sums.numpy() for name, _, sums in absorbed_sums()}
    np.savez(path, **found)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Results]:
    folder = tmp_path_factory.mktemp("isa")
    results = {}
    for isa in SETS:
        path = str(folder / f"{isa}.npz")
        environment = os.environ | {
            "BSGAP_ISA": isa,
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        }
        code = f"import test_instruction_sets; test_instruction_sets.answer({path!r})"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        with np.load(path) as found:
            results[isa] = dict(found)
    return results


@pytest.mark.parametrize("isa", SETS)
def test_the_wanted_set_is_used(isa: str, answers: dict[str, Results]) -> None:
    best = SETS.index(str(answers["avx512"]["instruction_set"]))  # what this processor has
    assert str(answers[isa]["instruction_set"]) == SETS[min(SETS.index(isa), best)]


@pytest.mark.parametrize("isa", SETS)
def test_every_set_agrees_with_the_oracles(isa: str, answers: dict[str, Results]) -> None:
    found = answers[isa]
    for name, A, _, count in cases():
        wide = A.double()
        kinds = {
            "gram": (wide, torch.float64),
            "centred": ((A + 1.0).double() - (A + 1.0).double().mean(0), torch.float64),
            "float32": (wide, A.dtype),
            "strided": (A.bfloat16().double(), torch.float64),
        }
        for kind, (X, accumulation) in kinds.items():
            # Twice the tolerance: the oracle's float64 sums round as well. Where X is 0, centring may not be.
            bound = (2 * sum_rtol(accumulation, len(X)) * (X.abs().mT @ X.abs() + 1e-15 * len(X))).numpy()
            assert (np.abs(found[f"{name} {kind}"] - (X.mT @ X).numpy()) <= bound).all(), (name, kind)
        point, lower, upper, probed_lower, probed_upper = found[f"{name} counts"].tolist()
        assert (point, lower, upper) == (count, count, count), name
        assert probed_lower <= count <= probed_upper, name


def test_the_sets_agree_with_each_other(answers: dict[str, Results]) -> None:
    # avx2 and avx512 do the same operations, so not a bit differs; generic has no fused multiply-add.
    for name, *_ in cases():
        for kind in ("gram", "centred", "float32", "strided"):
            assert np.array_equal(answers["avx2"][f"{name} {kind}"], answers["avx512"][f"{name} {kind}"])


def test_an_unknown_set_is_an_error_of_the_import() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import bsgap_kernels._core"],
        env=os.environ | {"BSGAP_ISA": "sse9", "PYTHONPATH": str(TESTS.parent)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "BSGAP_ISA must be generic, avx2 or avx512, got 'sse9'" in done.stderr


@pytest.mark.parametrize("isa", SETS)
def test_float32_sums_lose_no_more_than_their_chains(isa: str, answers: dict[str, Results]) -> None:
    bound = _core.FLOAT32_SUM_ROUNDINGS * 2.0**-24
    assert bound / (2 * FLOAT32_GRAM_MIN_RTOL**2) <= 0.01  # of tau, for entries that are not negative
    lost = {}
    for name, A, _ in absorbed_sums():
        exact = (A.double().mT @ A.double()).numpy()  # powers of two: without rounding
        lost[name] = float((np.abs(answers[isa][name] - exact) / exact).max())
    assert max(lost.values()) <= bound, lost
    assert min(lost.values()) >= 0.5 * bound, lost  # the matrices do what they were made for
