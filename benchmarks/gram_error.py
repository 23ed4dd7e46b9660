"""How far the two Gram accumulations are from exact: the figures behind the limits in `dispatch.py`.

python benchmarks/gram_error.py     # about a minute; writes benchmarks/results/gram_error.json

eta = ||G - exact||_2 / lambda_max for float32 input, the exact Gram matrix in extended precision (64-bit
significand, so its own error is some 2000 times below that of a float64 sum).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsgap_kernels import _core
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


FAMILIES: tuple[Callable[[np.random.Generator, int, int], Array], ...] = (gaussian, relu, graded)


def measure(A: Array) -> dict[str, float]:
    """Both accumulations of the smaller Gram matrix of A."""
    observations = A.shape[0] < A.shape[1]
    X = (A.T if observations else A).astype(np.longdouble)
    exact = X.T @ X
    top = np.linalg.eigvalsh(exact.astype(np.float64))[-1]
    row = {}
    for name, float32 in (("float32", True), ("float64", False)):
        computed = _core.gram(A, observations=observations, float32=float32)["gram"]
        row[name] = float(np.linalg.norm((computed - exact).astype(np.float64), 2) / top)
    return row


def main() -> None:
    """Measures every shape and family, prints and writes the result."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for m, n in SHAPES:
        for family in FAMILIES:
            rows.append({"m": m, "n": n, "family": family.__name__, **measure(family(rng, m, n))})
            print(
                "{m}x{n} {family}: float32 {float32:.1e}, float64 {float64:.1e}".format(**rows[-1]),
                flush=True,
            )
    worst = {name: max(row[name] for row in rows) for name in ("float32", "float64")}
    limits = {"float32": FLOAT32_GRAM_MIN_RTOL, "float64": FLOAT64_GRAM_MIN_RTOL}
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
