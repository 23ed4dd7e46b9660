"""Types of the NumPy bindings (csrc/bindings/core.cpp); tests/test_core_stub.py keeps them in step."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FLOAT32_SUM_ROUNDINGS: int
PROBED_MIN_SIDE: int
PROBED_MIN_RTOL: float
TRIDIAGONAL_SIDE: int

def near_rank_interval(
    A: NDArray[Any],
    *,
    atol: float = 0.0,
    rtol: float = 1e-2,
    center: bool = False,
    mode: str = "rigorous",
    seed: int = 0,
) -> tuple[int, int]: ...
def gram(
    A: NDArray[Any], *, center: bool = False, observations: bool = False, float32: bool = False
) -> dict[str, Any]: ...
def certified_count(
    G: ArrayLike,
    *,
    atol: float = 0.0,
    rtol: float = 0.0,
    gram_error: float = 0.0,
    without: Sequence[str] = ...,
    start: Sequence[float] | None = None,
) -> dict[str, Any]: ...
def point_counts(G: ArrayLike, rtols: Sequence[float]) -> NDArray[np.int64]: ...
def inertia(G: ArrayLike, shift: float) -> dict[str, Any]: ...
def lane_spectra(G: ArrayLike, x: ArrayLike | None = None) -> dict[str, NDArray[np.float64]]: ...
def sturm_count_above(diagonal: ArrayLike, off_diagonal: ArrayLike, x: float) -> int: ...
def tridiagonal_eigenvalue(diagonal: ArrayLike, off_diagonal: ArrayLike, rank: int) -> float: ...
def probe_vectors(n: int, seed: int) -> NDArray[np.float64]: ...
def probe_bound(G: ArrayLike, omega: ArrayLike, y: ArrayLike, product_error: float = 0.0) -> float: ...
def fma_rate(dtype: str, seconds: float) -> float: ...
def read_rate(buffer: NDArray[Any], seconds: float) -> float: ...
def instruction_set() -> str: ...
