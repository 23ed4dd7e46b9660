"""Runs csrc/cuda/count_large.cuh on a CPU: builds tests/cuda_host/large.cpp and calls it for NumPy arrays."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which("g++")
COLUMNS = 20  # of the table; the places of those the counts read
FIRST_MATRIX, COUNT, SIDE, OUTER, INNER, FIRST_GRAM, FIRST_RESULT, ROUNDINGS = 1, 2, 5, 6, 7, 12, 15, 16

Matrix = NDArray[np.float64]


class Problem(ctypes.Structure):
    """CountProblem of csrc/cuda/count.cuh."""

    _fields_ = [  # noqa: RUF012
        ("grams", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("sides", ctypes.c_void_p),
        ("batches", ctypes.c_void_p),
        ("thresholds", ctypes.c_void_p),
        ("thresholds_shared", ctypes.c_bool),
        ("threshold_count", ctypes.c_int64),
        ("atol", ctypes.c_double),
        ("rtol", ctypes.c_double),
        ("exponent", ctypes.c_void_p),
        ("gram_error", ctypes.c_void_p),
        ("certify", ctypes.c_bool),
        ("spectrum", ctypes.c_bool),
        ("counts", ctypes.c_void_p),
        ("lower", ctypes.c_void_p),
        ("upper", ctypes.c_void_p),
        ("eigenvalues", ctypes.c_void_p),
    ]


@dataclasses.dataclass(frozen=True)
class Launch:
    name: str
    grid: tuple[int, int]
    threads: int
    shared: int


@dataclasses.dataclass(frozen=True)
class Result:
    counts: NDArray[np.int64]
    lower: NDArray[np.int64]
    upper: NDArray[np.int64]
    eigenvalues: list[Matrix]  # caller's order
    launches: list[Launch]
    workspace: int


def build(output: Path, source: Path, *options: str, csrc: Path = ROOT / "csrc") -> subprocess.CompletedProcess[str]:
    """Compiles against the host harness."""
    command = [str(COMPILER), str(source), "-std=c++20", "-pthread", f"-I{csrc}", f"-I{ROOT / 'tests/cuda_host'}"]
    warnings = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi"]
    return subprocess.run([*command, *warnings, *options, "-o", str(output)], capture_output=True, text=True, check=False)


@functools.cache
def library() -> ctypes.CDLL:
    output = Path(tempfile.mkdtemp(prefix="bsgap_cuda_large_")) / "large.so"
    done = build(output, ROOT / "tests" / "cuda_host" / "large.cpp", "-O2", "-shared", "-fPIC")
    assert done.returncode == 0, done.stderr
    lib = ctypes.CDLL(str(output))
    for name in ("bsgap_count_large", "bsgap_count_large_bytes", "bsgap_launches"):
        getattr(lib, name).restype = ctypes.c_int64
    lib.bsgap_launches.argtypes = [ctypes.c_char_p, ctypes.c_int64]
    return lib


def _launches() -> list[Launch]:
    text = ctypes.create_string_buffer(library().bsgap_launches(None, 0))
    library().bsgap_launches(text, len(text))
    found = []
    for line in text.value.decode().splitlines():
        *name, x, y, threads, shared = line.split()
        found.append(Launch(" ".join(name).strip("()"), (int(x), int(y)), int(threads), int(shared)))
    return found


def count(
    grams: Sequence[Matrix],
    *,
    atol: float = 0.0,
    rtol: float = 0.0,
    thresholds: Matrix | None = None,
    exponent: Sequence[int] | None = None,
    gram_error: Sequence[float] | None = (),
    depth: int = 1,
    roundings: int = 1,
    certify: bool = False,
    spectrum: bool = False,
) -> Result:
    """Counts for Gram matrices in the caller's order; gram_error=() says that they are exact."""
    order = sorted(range(len(grams)), key=lambda i: -grams[i].shape[0])
    table = np.zeros((len(grams), COLUMNS), np.int64)
    first_gram = 0
    for row, i in enumerate(order):
        k = grams[i].shape[0]
        table[row, [FIRST_MATRIX, COUNT, SIDE, OUTER, INNER]] = row, 1, k, 1, depth
        table[row, [FIRST_GRAM, FIRST_RESULT, ROUNDINGS]] = first_gram, i, roundings
        first_gram += k * k
    # A run of equal sides is one row where the caller's order allows.
    kept = [0]
    for row in range(1, len(order)):
        last = kept[-1]
        same = table[row, SIDE] == table[last, SIDE]
        if same and order[row] == order[last] + table[last, COUNT]:
            table[last, COUNT] += 1
        else:
            kept.append(row)
    table = np.ascontiguousarray(table[kept])
    flat = np.concatenate([np.ascontiguousarray(grams[i], np.float64).ravel() for i in order])
    sides, batches = table[:, SIDE].copy(), table[:, COUNT].copy()
    t = 1 if thresholds is None else thresholds.shape[1]
    shape = (len(grams), t)
    counts, lower, upper = (np.full(shape, -7, np.int64) for _ in range(3))
    eigenvalues = np.full(int(sum(sides * batches)), -7.0)
    pairs = None if thresholds is None else np.ascontiguousarray(thresholds, np.float64)
    exponents = None if exponent is None else np.asarray(exponent, np.int32)
    errors = None if gram_error is None else np.asarray(gram_error or np.zeros(len(grams)), np.float64)

    def at(array: NDArray[np.generic] | None) -> int | None:
        return None if array is None else array.ctypes.data

    problem = Problem(
        at(flat), at(table), len(table), at(sides), at(batches), at(pairs),
        pairs is None or pairs.shape[0] == 1, t, atol, rtol, at(exponents), at(errors),
        certify, spectrum, at(counts), at(lower), at(upper), at(eigenvalues),
    )  # fmt: skip
    workspace = library().bsgap_count_large(ctypes.byref(problem))
    spectra: list[Matrix] = [np.empty(0)] * len(grams)
    place = 0
    for i in order:
        spectra[i] = eigenvalues[place : place + grams[i].shape[0]]
        place += grams[i].shape[0]
    return Result(counts, lower, upper, spectra, _launches(), workspace)
