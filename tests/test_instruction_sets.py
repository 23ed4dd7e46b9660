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
