"""Sharpness φ_ε of a minimum (Keskar et al., arXiv 1609.04836): how far the loss rises in a small box."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bsgap_kernels.lab.optional import require

Vector = NDArray[np.float64]
ObjectiveLike = Callable[[Vector], tuple[float, Vector]]

EPSILONS = (1e-3, 5e-4)
SUBSPACE = 100
ITERATIONS = 10

# Rows of A that are float64 at a time: 50 MB at 100 columns.
_BLOCK = 1 << 16


@dataclass(frozen=True)
class Sharpness:
    """One φ with what it must be read beside: the box, the loss at its centre, and how the search went.

    Attributes:
        space: full or subspace.
        dimension: of z: that of x, or the number of A's columns.
        epsilon: ε of the box.
        phi: φ in percent; None where the loss is not finite at x or at a point of the box that was tried.
        loss: f(x).
        max_loss: f(x + Az) at the point found; None with phi.
        at_bound: share of the components of z that lie on the box's border; None with phi. Near 0 the search
            ended before the box did.
        iterations: L-BFGS-B iterations made; fewer than asked for where no step was left to make.
        evaluations: values with gradient that took, f(x) and the line searches' included.
        seed: of a random A, else None.
        message: SciPy's, or why there is no φ.
        seconds: wall time.
    """

    space: str
    dimension: int
    epsilon: float
    phi: float | None
    loss: float
    max_loss: float | None
    at_bound: float | None
    iterations: int
    evaluations: int
    seed: int | None
    message: str
    seconds: float


class Subspace:
    """The columns of A, an n × k matrix that z is multiplied by.

    A is kept in float32 (400 bytes a parameter at k = 100: 341 MB for ResNet-56's 853,018); products with it
    are float64, on blocks of rows.

    Args:
        matrix: A, (n, k), any float dtype.
        seed: what a random A was drawn from.
    """

    def __init__(self, matrix: NDArray[np.floating], seed: int | None = None) -> None:
        if matrix.ndim != 2 or 0 in matrix.shape:
            raise ValueError(f"matrix: got shape {matrix.shape}, expected (n, k)")
        self.matrix = np.ascontiguousarray(matrix, dtype=np.float32)
        self.seed = seed
        self.dimension = matrix.shape[1]

    @classmethod
    def random(cls, n: int, k: int = SUBSPACE, seed: int = 0) -> Subspace:
        """An n × k matrix of standard normal entries; the paper says random, the distribution is ours."""
        if k < 1:
            raise ValueError(f"subspace: got {k}, expected at least 1 column")
        return cls(np.random.default_rng(seed).standard_normal((n, k), dtype=np.float32), seed)

    def apply(self, z: Vector) -> Vector:
        """Az, of length n."""
        return np.concatenate([block @ z for block in self._blocks()])

    def transpose(self, g: Vector) -> Vector:
        """Aᵀg, of length k."""
        total: Vector = np.zeros(self.dimension)
        for start, block in zip(range(0, len(g), _BLOCK), self._blocks(), strict=True):
            total += block.T @ g[start : start + _BLOCK]
        return total

    def pseudo_inverse(self, x: Vector) -> Vector:
        """A⁺x in float64, of length k.

        A tall random A by the normal equations, O(n k²): with n ≥ 10 k its condition number is about 2 at
        most, squared 4. Any other by LAPACK's least squares of minimum norm, on a float64 copy.
        """
        n, k = self.matrix.shape
        if n < 10 * k or self.seed is None:
            solution = np.linalg.lstsq(self.matrix.astype(np.float64), x, rcond=None)[0]
            return np.asarray(solution, dtype=np.float64)
        gram: Vector = np.zeros((k, k))
        for block in self._blocks():
            gram += block.T @ block
        return np.asarray(np.linalg.solve(gram, self.transpose(x)), dtype=np.float64)

    def _blocks(self) -> Iterator[Vector]:
        for start in range(0, len(self.matrix), _BLOCK):
            yield self.matrix[start : start + _BLOCK].astype(np.float64)


class _NotFiniteError(Exception):
    """The loss left the numbers within the box."""


def sharpness(
    objective: ObjectiveLike,
    x: Vector,
    epsilon: float,
    *,
    subspace: int | Subspace | None = None,
    iterations: int = ITERATIONS,
    seed: int = 0,
) -> Sharpness:
    """φ_ε at x: the rise of the loss to the highest point that L-BFGS-B finds in a box around x.

        φ = 100 · (max_z f(x + Az) − f(x)) / (1 + f(x)),   |z_i| ≤ ε (|(A⁺x)_i| + 1)

    A is the identity (`subspace` None), or an n × k matrix: a random one of that many columns, drawn from
    `seed`, or the one given. The maximum is that of SciPy's result after `iterations` iterations from z = 0,
    as in the paper, so φ is a lower bound of the true one: where the gradient at x is tiny, ten iterations
    may not reach the border (`at_bound`), and where it is 0 the search has nowhere to go and φ is 0. SciPy's
    ftol and gtol are 0: with its defaults the search can end where it begins, and φ is 0 far more often.
    φ is comparable only at the same ε and similar f(x).

    Cost: `evaluations` values with gradient: one or two an iteration as a rule, 20 at most (SciPy's line
    search). SciPy keeps about 30 float64 numbers for each component of z.

    Args:
        objective: f and its gradient at a vector, as `Objective` gives them.
        x: the minimum, float64 (n,).
        epsilon: size of the box, above 0.
        subspace: None, a number of columns, or A.
        iterations: L-BFGS-B iterations.
        seed: of a random A.

    Raises:
        ValueError: epsilon, iterations or the shape of A does not fit.

    Source: Keskar et al., arXiv 1609.04836: the formula, 10 iterations, ε 1e-3 and 5e-4, k = 100.
    """
    optimize = require("scipy.optimize")
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"epsilon: got {epsilon}, expected a finite number above 0")
    if iterations < 1:
        raise ValueError(f"iterations: got {iterations}, expected at least 1")
    started = time.perf_counter()
    space = Subspace.random(len(x), subspace, seed) if isinstance(subspace, int) else subspace
    if space is not None and len(space.matrix) != len(x):
        raise ValueError(f"subspace: got {len(space.matrix)} rows, expected {len(x)}, one a parameter")
    loss, gradient = objective(x)
    evaluations = 1

    def result(
        phi: float | None, highest: float | None, at_bound: float | None, steps: int, message: str
    ) -> Sharpness:
        return Sharpness(
            space="full" if space is None else "subspace",
            dimension=len(x) if space is None else space.dimension,
            epsilon=epsilon,
            phi=phi,
            loss=loss,
            max_loss=highest,
            at_bound=at_bound,
            iterations=steps,
            evaluations=evaluations,
            seed=None if space is None else space.seed,
            message=message,
            seconds=time.perf_counter() - started,
        )

    if not (math.isfinite(loss) and np.isfinite(gradient).all()):
        return result(None, None, None, 0, "no φ: the loss or its gradient at x is not finite")
    bound = box(x, epsilon, space)

    def negated(z: Vector) -> tuple[float, Vector]:
        nonlocal evaluations
        if not z.any():  # SciPy's first point, known already
            value, slope = loss, gradient
        else:
            value, slope = objective(x + (z if space is None else space.apply(z)))
            evaluations += 1
        if not (math.isfinite(value) and np.isfinite(slope).all()):
            raise _NotFiniteError
        return -value, -(slope if space is None else space.transpose(slope))

    try:
        found = optimize.minimize(
            negated,
            np.zeros(len(bound)),
            method="L-BFGS-B",
            jac=True,
            bounds=optimize.Bounds(-bound, bound),
            options={"maxiter": iterations, "ftol": 0.0, "gtol": 0.0},
        )
    except _NotFiniteError:
        return result(None, None, None, 0, "no φ: the loss or its gradient is not finite within the box")
    highest = -float(found.fun)
    phi = 100 * (highest - loss) / (1 + loss)
    at_bound = float(np.mean(np.abs(found.x) >= bound))
    return result(phi, highest, at_bound, int(found.nit), _words(found.message))


def box(x: Vector, epsilon: float, subspace: Subspace | None = None) -> Vector:
    """ε(|(A⁺x)_i| + 1), the largest |z_i|; A is the identity unless given."""
    centre = x if subspace is None else subspace.pseudo_inverse(x)
    return epsilon * (np.abs(centre) + 1)


def _words(message: str | bytes) -> str:
    text = message.decode() if isinstance(message, bytes) else message
    return " ".join(text.split())
