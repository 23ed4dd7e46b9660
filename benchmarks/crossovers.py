"""Where one way to count overtakes another on the CPU: the figures behind the constants in `dispatch.py`.

python benchmarks/crossovers.py     # about two minutes; writes benchmarks/results/crossovers-ISA.json

ISA is the instruction set in use, avx2 or avx512 (BSGAP_ISA takes it down). One set of constants serves both.

On one thread: a matrix alone and eight together in vector lanes against LDL^T; LDL^T at several thresholds
against `eigvalsh`. On all threads: the two certificates.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bsgap_kernels import _core
from bsgap_kernels.bench.cases import decaying
from bsgap_kernels.bench.machine import describe
from bsgap_kernels.dispatch import MAX_FACTORISATIONS, PROBED_MIN_SIDE, TRIDIAGONAL_SIDE

RESULT = Path(__file__).resolve().parent / "results" / f"crossovers-{_core.instruction_set()}.json"
LANE_SIDES = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 128)
EIGENVALUE_SIDES = (96, 128, 256, 512, 1024)
THRESHOLDS = (1, 2, 4, 8, 16)
PROBED_SHAPES = tuple((m, n) for m in (16384, 65536) for n in (192, 224, 256, 288, 320, 384))
RTOL = 1e-2


def median_us(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median microseconds of each, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append((time.perf_counter() - start) * 1e6)
    return {name: round(statistics.median(values), 2) for name, values in times.items()}


def grams(n: int, count: int) -> torch.Tensor:
    """Gram matrices (count, n, n) of matrices with decaying singular values."""
    A = decaying((count, 2 * n, n), torch.Generator().manual_seed(n)).double()
    return A.mT @ A


def lanes(n: int) -> dict[str, Any]:
    """One matrix and eight in lanes, eight by LDL^T one after the other."""
    G = grams(n, 8).numpy()
    shifts = RTOL * RTOL * _core.lane_spectra(G)["largest"]  # known, so that one call does what a count does
    row = median_us(
        {
            "one in lanes": lambda: _core.lane_spectra(G[:1], shifts[:1]),
            "eight in lanes": lambda: _core.lane_spectra(G, shifts),
            "eight by ldlt": lambda: [_core.point_counts(g, [RTOL]) for g in G],
        },
        15,
    )
    return {"side": n, **row}


def thresholds(n: int) -> dict[str, Any]:
    """LDL^T at a number of thresholds, and all eigenvalues."""
    G = grams(n, 1)[0]
    array = G.numpy()
    functions: dict[str, Callable[[], object]] = {
        f"ldlt at {t}": partial(_core.point_counts, array, list(np.geomspace(1e-3, 0.1, t)))
        for t in THRESHOLDS
    }
    return {"side": n, **median_us({**functions, "eigvalsh": lambda: torch.linalg.eigvalsh(G)}, 7)}


def certificates(m: int, n: int) -> dict[str, Any]:
    """Both modes of an interval, each forced."""
    A = torch.randn(m, n, generator=torch.Generator().manual_seed(0))

    def run(probed: bool) -> Callable[[], object]:
        return lambda: torch.ops.bsgap._intervals(A, 0.0, RTOL, False, probed, 0)

    return {"m": m, "side": n, **median_us({"probed": run(True), "rigorous": run(False)}, 9)}


def main() -> None:
    """Measures, prints and writes the result."""
    threads = torch.get_num_threads()
    result: dict[str, Any] = {"schema": 1, "unit": "microseconds", "rtol": RTOL}
    torch.set_num_threads(1)
    result["lanes"] = [lanes(n) for n in LANE_SIDES]
    result["thresholds"] = [thresholds(n) for n in EIGENVALUE_SIDES]
    torch.set_num_threads(threads)
    result["certificates"] = [certificates(m, n) for m, n in PROBED_SHAPES]
    for name in ("lanes", "thresholds", "certificates"):
        print(name, *result[name], sep="\n  ")
    result["constants"] = {
        "TRIDIAGONAL_SIDE": TRIDIAGONAL_SIDE,
        "MAX_FACTORISATIONS": MAX_FACTORISATIONS,
        "PROBED_MIN_SIDE": PROBED_MIN_SIDE,
    }
    RESULT.write_text(json.dumps({**result, **describe()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
