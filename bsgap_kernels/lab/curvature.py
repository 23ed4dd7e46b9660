"""The Hessian's largest eigenvalue, by Lanczos iterations on Hessian-vector products."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bsgap_kernels.lab.optional import require

Vector = NDArray[np.float64]
HessianProduct = Callable[[Vector], Vector]

RTOL = 1e-3
RESTARTS = 20


@dataclass(frozen=True)
class Curvature:
    """Largest eigenvalue of a Hessian, with its evidence.

    Attributes:
        max_eigenvalue: λ, the largest algebraic one; None where the iteration did not converge.
        residual: ‖Hv − λv‖ for the unit vector v found: some eigenvalue lies within it of λ.
        iterations: Lanczos steps, restarts included.
        products: Hessian-vector products, that of the residual included.
        message: how it ended.
    """

    max_eigenvalue: float | None
    residual: float | None
    iterations: int
    products: int
    message: str


def max_eigenvalue(
    product: HessianProduct, dimension: int, *, seed: int = 0, rtol: float = RTOL, restarts: int = RESTARTS
) -> Curvature:
    """Largest eigenvalue of the symmetric matrix v ↦ product(v).

    ARPACK's restarted Lanczos (SciPy's eigsh, which="LA") from a random vector, until the residual is about
    rtol · |λ|; λ's own error is then of the order of the residual's square over the gap to the next one.

    Args:
        product: Hv of v, both float64 (dimension,).
        dimension: of v.
        seed: of the vector it starts from.
        rtol: relative residual to reach.
        restarts: most restarts, of about 20 products each.

    Cost: a few dozen products as a rule, and 20 vectors of memory.
    """
    linalg = require("scipy.sparse.linalg")
    products = 0

    def counted(v: Vector) -> Vector:
        nonlocal products
        products += 1
        found = product(np.asarray(v, dtype=np.float64).reshape(-1))
        if not np.isfinite(found).all():
            raise FloatingPointError
        return found

    def failed(message: str) -> Curvature:
        return Curvature(None, None, products, products, message)

    start = np.random.default_rng(seed).standard_normal(dimension)
    start /= np.linalg.norm(start)
    try:
        first = counted(start)
        if dimension == 1 or not first.any():
            # ARPACK takes neither; a random vector is in the null space of the zero matrix alone.
            value, vector = float(first @ start), start
        else:
            operator = linalg.LinearOperator((dimension, dimension), matvec=counted, dtype=np.float64)
            values, vectors = linalg.eigsh(operator, k=1, which="LA", v0=start, tol=rtol, maxiter=restarts)
            value, vector = float(values[0]), vectors[:, 0]
        steps = products
        residual = float(np.linalg.norm(counted(vector) - value * vector))
    except FloatingPointError:
        return failed("no eigenvalue: a Hessian-vector product is not finite")
    except linalg.ArpackNoConvergence:
        return failed(f"no eigenvalue: not converged within {restarts} restarts")
    except linalg.ArpackError as error:
        return failed(f"no eigenvalue: {' '.join(str(error).split())}")
    if not math.isfinite(value):
        return failed("no eigenvalue: it is not finite")
    return Curvature(value, residual, steps, products, f"residual {residual / max(abs(value), 1e-300):.1e} λ")
