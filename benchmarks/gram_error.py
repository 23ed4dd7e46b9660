"""How far the Gram accumulations of the CPU are from exact: the figures behind the limits in `dispatch.py`.

python benchmarks/gram_error.py     # about two minutes; writes benchmarks/results/gram_error.json

eta = ||G - exact||_2 / lambda_max of float32 input (`float32`: float32 sums, `float64`: float64 sums) and of
its rounding to bfloat16 (`bfloat16`: float32 sums). The exact Gram matrix is in extended precision: a 64-bit
significand, so its own error is some 2000 times below that of a float64 sum.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import bsgap_kernels  # noqa: F401 - registers the ops
from bsgap_kernels.bench.machine import describe
from bsgap_kernels.dispatch import FLOAT32_GRAM_MIN_RTOL, FLOAT64_GRAM_MIN_RTOL

RESULT = Path(__file__).resolve().parent / "results" / "gram_error.json"
SHAPES = ((256, 32), (65536, 16), (65536, 64), (8192, 256), (1024, 512), (600, 600), (64, 4096))
Array = NDArray[np.float32]


def gaussian(rng: np.random.Generator, m: int, n: int) -> Array:
    """Independent standard normal entries."""
    return rng.standard_normal((m, n), dtype=np.float32)


def relu(rng: np.random.Generator, m: int, n: int) -> Array:
    """Half zeros and a large common direction, as after a nonlinearity."""
    return np.maximum(gaussian(rng, m, n), 0)


def graded(rng: np.random.Generator, m: int, n: int) -> Array:
    """Columns from 1 down to 1e-4 of the first."""
    return gaussian(rng, m, n) * np.geomspace(1, 1e-4, n, dtype=np.float32)


def saturated(rng: np.random.Generator, m: int, n: int) -> Array:
    """Half of the units constant: the same rounding at every row, in the same direction."""
    A = relu(rng, m, n)
    A[:, : n // 2] = rng.uniform(0.1, 1, n // 2)
    return A


def dominated(rng: np.random.Generator, m: int, n: int) -> Array:
    """One constant unit far above the others."""
    A = gaussian(rng, m, n) * np.float32(0.01)
    A[:, 0] = 0.1
    return A


def absorbed(rng: np.random.Generator, m: int, n: int) -> Array:
    """Products of half a unit in the last place of the sums they are added to, in chains and between them."""
    row = np.arange(m) % 128
    column = np.where(row == 0, 1, np.where(row < 16, 2.0**-12, 2.0**-14)).astype(np.float32)
    return np.repeat(column[:, None], n, axis=1) * rng.choice(np.float32([1, 2, 4]), n)


FAMILIES: tuple[Callable[[np.random.Generator, int, int], Array], ...] = (
    gaussian,
    relu,
    graded,
    saturated,
    dominated,
    absorbed,
)


SUMS = ("float32", "bfloat16", "float64")


def measure(A: Array) -> dict[str, float]:
    """Every accumulation of the smaller Gram matrix of A."""
    X = torch.from_numpy(A.T.copy() if A.shape[0] < A.shape[1] else A)
    row = {}
    for name in SUMS:
        read = X.bfloat16() if name == "bfloat16" else X
        wide = read.float().numpy().astype(np.longdouble)
        exact = wide.T @ wide
        top = np.linalg.eigvalsh(exact.astype(np.float64))[-1]
        computed = torch.ops.bsgap._feature_gram(read, False, name != "float64")[0].numpy()
        row[name] = float(np.linalg.norm((computed - exact).astype(np.float64), 2) / top)
    return row


def main() -> None:
    """Measures every shape and family, prints and writes the result."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for m, n in SHAPES:
        for family in FAMILIES:
            rows.append({"m": m, "n": n, "family": family.__name__, **measure(family(rng, m, n))})
            row = rows[-1]
            print(
                f"{m}x{n} {row['family']}: " + ", ".join(f"{name} {row[name]:.1e}" for name in SUMS),
                flush=True,
            )
    worst = {name: max(row[name] for row in rows) for name in SUMS}
    limits = dict.fromkeys(SUMS, FLOAT32_GRAM_MIN_RTOL) | {"float64": FLOAT64_GRAM_MIN_RTOL}
    band = {name: worst[name] / (2 * limits[name] ** 2) for name in worst}
    print(f"largest eta {worst}; band d at the limits of dispatch.py {band}")
    result = {
        "schema": 1,
        "rows": rows,
        "largest_eta": worst,
        "rtol_limits": limits,
        "band": band,
        **describe(),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
