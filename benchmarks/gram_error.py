"""Measures the error of Gram matrices summed in float32 and in float64, for the limits in `dispatch.py`.

python benchmarks/gram_error.py     # about three minutes; writes benchmarks/results/gram_error.json
python benchmarks/gram_error.py --device cuda --json FILE   # float32 sums of a GPU, few shapes, no search

Each row gives eta = ||G - exact||_2 / lambda_max of one random matrix, by the way G was formed:
  float32            float32 input, float32 sums
  float64            float32 input, float64 sums
  bfloat16, float16  the same matrix rounded to 16 bits, float32 sums (float16: on a GPU only)
On a CPU the exact matrix has a 64-bit significand, 2000 times the precision of float64 sums; on a GPU it is
float64, far more precise than float32 sums. There each row is written as soon as it is measured.

Then, on a CPU only, a search for the worst matrix. The displacement of a singular value is |Δλ| / 2λ, λ its
square, where λ is at least τ² at the limit of rtol. Rows of four kinds stand where chains and chunks of the
sums begin; each kind is a row of `theta`, which is moved at random as long as the displacement grows. At most
1 % is proven where no entry is negative.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import bsgap_kernels  # noqa: F401 - registers the ops
from bsgap_kernels.bench.machine import describe
from bsgap_kernels.dispatch import CUDA_FLOAT32_GRAM_MIN_RTOL, FLOAT32_GRAM_MIN_RTOL, float64_gram_min_rtol

RESULT = Path(__file__).resolve().parent / "results" / "gram_error.json"
CUDA_SHAPES = ((2048, 64), (1024, 256))  # one tile, and those of 128 of 16-bit input
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


def truncated(rng: np.random.Generator, m: int, n: int, lost_from: int) -> Array:
    """Ones every 256 rows, and products just below 2^-lost_from, which a sum of that many bits less loses."""
    row = np.arange(m) % 256
    column = np.where(row == 0, 1, 0.99 * 2.0 ** (-lost_from / 2)).astype(np.float32)
    return np.repeat(column[:, None], n, axis=1) * rng.choice(np.float32([1, 2, 4]), n)


def device_families() -> dict[str, Callable[[np.random.Generator, int, int], Array]]:
    """FAMILIES, and what tells how many bits below a float32 sum (2^-23) the tensor cores keep."""
    named: dict[str, Callable[[np.random.Generator, int, int], Array]] = {f.__name__: f for f in FAMILIES}
    return named | {f"products below 2^-{e}": partial(truncated, lost_from=e) for e in (24, 25, 26, 27)}


SUMS = ("float32", "bfloat16", "float64")
CUDA_SUMS = ("float32", "bfloat16", "float16")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def exact_gram(X: NDArray[Any]) -> NDArray[Any]:
    """XᵀX in the precision of X, some rows at a time, which then stay in cache."""
    result = np.zeros((X.shape[1], X.shape[1]), X.dtype)
    for first in range(0, X.shape[0], 256):
        rows = X[first : first + 256]
        result += np.ascontiguousarray(rows.T) @ rows
    return result


def measure(A: Array, sums: Sequence[str] = SUMS, device: str = "cpu") -> dict[str, float]:
    """Every accumulation of the smaller Gram matrix of A."""
    X = torch.from_numpy(A.T.copy() if A.shape[0] < A.shape[1] else A)
    row = {}
    for name in sums:
        read = X.to(DTYPES.get(name, torch.float32))
        wide = read.float().numpy().astype(np.longdouble if "float64" in sums else np.float64)
        exact = exact_gram(wide)
        top = np.linalg.eigvalsh(exact.astype(np.float64))[-1]
        computed = feature_gram(read.to(device), name != "float64")
        row[name] = float(np.linalg.norm((computed - exact).astype(np.float64), 2) / top)
    return row


def feature_gram(X: torch.Tensor, float32: bool) -> NDArray[np.float64]:
    """XᵀX by the kernels of X's device."""
    return torch.ops.bsgap._feature_gram(X, False, float32)[0].cpu().numpy()


def measure_device(
    device: str, path: Path | None, shapes: Sequence[tuple[int, int]] = CUDA_SHAPES
) -> dict[str, Any]:
    """The float32 sums of a GPU; band: share that a singular value at the limit can move by."""
    rng = np.random.default_rng(0)
    result: dict[str, Any] = {"schema": 2, "device": device, "rows": [], **describe()}
    if device == "cuda":
        result["gpu"] = torch.cuda.get_device_name()
    for m, n in shapes:
        for family, make in device_families().items():
            row = {"m": m, "n": n, "family": family, **measure(make(rng, m, n), CUDA_SUMS, device)}
            row["band"] = {name: row[name] / (2 * CUDA_FLOAT32_GRAM_MIN_RTOL**2) for name in CUDA_SUMS}
            result["rows"].append(row)
            print(f"{m}x{n} {family}: {', '.join(f'{s} {row[s]:.1e}' for s in CUDA_SUMS)}", flush=True)
            if path is not None:
                path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def limit_of(name: str, m: int, n: int) -> float:
    """The least rtol at which the dispatcher takes these sums."""
    return float64_gram_min_rtol(m, n) if name == "float64" else FLOAT32_GRAM_MIN_RTOL


def signs(columns: int) -> NDArray[np.float64]:
    """Rows of a Hadamard matrix but for the first, to which all others are orthogonal."""
    H = np.ones((1, 1))
    while len(H) < columns:
        H = np.block([[H, H], [H, -H]])
    return H[1:]


def pattern(
    theta: NDArray[np.float64], m: int, outer: int, inner: int, non_negative: bool
) -> NDArray[np.float64]:
    """m rows: theta[0] every `outer`, theta[1] up to `inner` after it, theta[2] every other `inner`.

    The rest is theta[3], the last row theta[4]. For both signs theta[0] and theta[2] take those of `signs`.
    """
    place = np.arange(m)
    kind = np.where(place % inner == 0, 2, 3)
    kind = np.where(place % outer < inner, 1, kind)
    kind = np.where(place % outer == 0, 0, kind)
    kind[-1] = 4
    rows = theta[kind]
    if not non_negative:
        leads = np.flatnonzero((kind == 0) | (kind == 2))
        S = signs(theta.shape[1])
        rows[leads] *= S[np.arange(len(leads)) % len(S)]
    return rows


def displacement(theta: NDArray[np.float64], name: str, m: int, non_negative: bool) -> float:
    """The largest of `pattern` with these sums, of singular values at or above the limit."""
    outer, inner = (-(-m // 16), 256) if name == "float64" else (128, 16)
    X = torch.from_numpy(pattern(theta, m, outer, inner, non_negative))
    X = X if name == "float64" else X.bfloat16() if name == "bfloat16" else X.float()
    wide = X.double().numpy().astype(np.longdouble)
    exact = exact_gram(wide)
    computed = feature_gram(X, name != "float64")
    lam, V = np.linalg.eigh(exact.astype(np.float64))
    floor = limit_of(name, *X.shape) ** 2 * lam[-1]
    if name == "float64":  # to the first order: the solver's own error is of this size
        error = (computed - exact).astype(np.float64)
        moved = np.abs(np.einsum("ji,jk,ki->i", V, error, V))
    else:
        moved = np.abs(np.linalg.eigvalsh(computed) - lam)
    return float((moved / (2 * np.maximum(lam, floor))).max())


def first_theta(name: str, columns: int, non_negative: bool) -> NDArray[np.float64]:
    """Products of half a unit in the last place of what they are added to.

    For both signs the leading rows are orthogonal to the others, so that what is lost is a singular value.
    """
    small, chunk = (2.0**-26.5, 2.0**-30.5) if name == "float64" else (2.0**-12, 2.0**-14)
    lead = 1 + small if name == "float32" else 1.0
    levels = [lead, small, chunk, chunk, 0.0] if non_negative else [lead, small, lead, small, 0.0]
    return np.outer(levels, np.ones(columns))


def search(
    rng: np.random.Generator, name: str, m: int, columns: int, non_negative: bool, steps: int
) -> dict[str, Any]:
    """Random moves of theta from `first_theta`, kept where they do not lessen the displacement."""
    theta = first_theta(name, columns, non_negative)
    best = displacement(theta, name, m, non_negative)
    for _ in range(steps):
        moved = theta * np.exp2(
            rng.standard_normal(theta.shape) * rng.choice([0, 1e-4, 0.02, 0.5], theta.shape)
        )
        moved[4] += rng.choice([0, 1e-4, 1e-2]) * rng.standard_normal(columns)
        moved = np.abs(moved) if non_negative else moved * rng.choice([1, 1, 1, -1], theta.shape)
        found = displacement(moved, name, m, non_negative)
        if found >= best:
            theta, best = moved, found
    return {
        "sums": name,
        "m": m,
        "columns": columns,
        "non_negative": non_negative,
        "steps": steps,
        "displacement": best,
        "theta": [[float(x).hex() for x in row] for row in theta],
    }


SEARCHES = (("float32", 1025), ("bfloat16", 1025), ("float64", 65537))


def main() -> None:
    """Measures every shape and family, on a CPU searches, prints and writes the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help=f"default: {RESULT.name} beside the others, of a CPU")
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        measure_device("cuda", arguments.json)
        return
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for m, n in SHAPES:
        for family in FAMILIES:
            row = {"m": m, "n": n, "family": family.__name__, **measure(family(rng, m, n))}
            row["band"] = {name: row[name] / (2 * limit_of(name, m, n) ** 2) for name in SUMS}
            rows.append(row)
            figures = ", ".join(f"{name} {row[name]:.1e}" for name in SUMS)
            print(f"{m}x{n} {row['family']}: {figures}", flush=True)
    searches = []
    for name, m in SEARCHES:
        for columns in (2, 8) if name == "float64" else (2, 8, 64):
            for non_negative in (True, False):
                steps = (100 if columns == 64 else 400) // (4 if name == "float64" else 1)
                searches.append(search(rng, name, m, columns, non_negative, steps))
                signs = "non-negative" if non_negative else "both signs"
                print(f"{name} {m}x{columns} {signs}: {searches[-1]['displacement']:.2%}", flush=True)
    result = {
        "schema": 2,
        "rows": rows,
        "largest_eta": {name: max(row[name] for row in rows) for name in SUMS},
        "largest_band": {name: max(row["band"][name] for row in rows) for name in SUMS},
        "searches": searches,
        **describe(),
    }
    (arguments.json or RESULT).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
