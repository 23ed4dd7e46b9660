"""φ_ε against maxima known in closed form, the box, and what the search's tolerances do to it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from bsgap_kernels.lab import sharpness as module
from bsgap_kernels.lab.sharpness import Sharpness, Subspace, box, sharpness

optimize = pytest.importorskip("scipy.optimize")

Vector = NDArray[np.float64]
Function = Callable[[Vector], tuple[float, Vector]]
RNG_SEED = 3


def normal(*shape: int) -> Vector:
    return np.random.default_rng(RNG_SEED).standard_normal(shape)


def linear(slope: Vector, offset: float = 5.0) -> Function:
    return lambda x: (offset + float(slope @ x), slope.copy())


def quadratic(diagonal: Vector) -> Function:
    return lambda x: (0.5 * float(diagonal @ x**2), diagonal * x)


class Recorder:
    """An objective that remembers where it was asked."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.points: list[Vector] = []

    def __call__(self, x: Vector) -> tuple[float, Vector]:
        self.points.append(x.copy())
        return self.function(x)


def timeless(found: Sharpness) -> Sharpness:
    return dataclasses.replace(found, seconds=0.0)


def test_of_a_linear_function() -> None:
    slope, x = normal(2, 30)
    found = sharpness(linear(slope), x, 1e-3)
    loss = 5.0 + slope @ x
    rise = 1e-3 * (np.abs(x) + 1) @ np.abs(slope)
    assert found.loss == pytest.approx(loss, rel=1e-15)
    assert found.max_loss == pytest.approx(loss + rise, rel=1e-13)
    assert found.phi == pytest.approx(100 * rise / (1 + loss), rel=1e-10)
    assert found.at_bound == 1.0
    assert (found.space, found.dimension, found.epsilon, found.seed) == ("full", 30, 1e-3, None)


@pytest.mark.parametrize("epsilon", [1e-3, 5e-4, 1e-2])
def test_of_a_quadratic_is_its_value_at_a_corner(epsilon: float) -> None:
    x = normal(25)
    diagonal = np.linspace(1, 40, 25)
    found = sharpness(quadratic(diagonal), x, epsilon)
    loss = 0.5 * diagonal @ x**2
    highest = 0.5 * diagonal @ (np.abs(x) + epsilon * (np.abs(x) + 1)) ** 2
    assert found.max_loss == pytest.approx(highest, rel=1e-13)
    assert found.phi == pytest.approx(100 * (highest - loss) / (1 + loss), rel=1e-10)


def test_subspace_of_the_identity_is_the_full_space() -> None:
    x, diagonal = normal(12), np.linspace(1, 40, 12)
    full = sharpness(quadratic(diagonal), x, 1e-3)
    same = sharpness(quadratic(diagonal), x, 1e-3, subspace=Subspace(np.eye(12)))
    assert (same.phi, same.max_loss, same.evaluations) == (full.phi, full.max_loss, full.evaluations)
    assert (same.space, same.dimension, same.seed) == ("subspace", 12, None)


def test_box_of_a_scaled_identity() -> None:
    # A = 2: A⁺x is x / 2, so the loss is looked at up to 2ε(|x| / 2 + 1) away from x.
    x, diagonal = normal(12), np.linspace(1, 40, 12)
    found = sharpness(quadratic(diagonal), x, 1e-3, subspace=Subspace(2 * np.eye(12)))
    highest = 0.5 * diagonal @ (np.abs(x) + 1e-3 * (np.abs(x) + 2)) ** 2
    assert found.max_loss == pytest.approx(highest, rel=1e-13)


def test_of_a_linear_function_in_rotated_coordinates() -> None:
    slope, x = normal(2, 16)
    rotation = np.linalg.qr(normal(16, 16))[0].astype(np.float32)
    found = sharpness(linear(slope, 9.0), x, 1e-3, subspace=Subspace(rotation))
    inverse = np.linalg.inv(rotation.astype(np.float64))
    rise = 1e-3 * (np.abs(inverse @ x) + 1) @ np.abs(rotation.T.astype(np.float64) @ slope)
    assert found.max_loss == pytest.approx(9.0 + slope @ x + rise, rel=1e-12)


def test_of_a_linear_function_in_a_random_subspace() -> None:
    slope, x = normal(2, 400)
    found = sharpness(linear(slope, 90.0), x, 1e-3, subspace=7, seed=11)
    matrix = Subspace.random(400, 7, seed=11).matrix.astype(np.float64)
    rise = 1e-3 * (np.abs(np.linalg.pinv(matrix) @ x) + 1) @ np.abs(matrix.T @ slope)
    assert found.max_loss == pytest.approx(90.0 + slope @ x + rise, rel=1e-12)
    assert (found.space, found.dimension, found.seed) == ("subspace", 7, 11)


def rugged(x: Vector) -> tuple[float, Vector]:
    frequency = 3000 * np.arange(1, len(x) + 1)
    return 100 + float(np.sin(frequency * x).sum()), frequency * np.cos(frequency * x)


@pytest.mark.parametrize("columns", [None, 5])
def test_every_point_lies_in_the_box(columns: int | None) -> None:
    x = normal(20)
    recorder = Recorder(rugged)
    found = sharpness(recorder, x, 1e-3, subspace=columns, seed=2)
    assert len(recorder.points) == found.evaluations > 5
    assert (found.phi or 0) > 0
    if columns is None:
        # Rounding is monotone: a z within the bound gives a sum within the sum's.
        low, high = x - box(x, 1e-3), x + box(x, 1e-3)
        assert all((low <= point).all() and (point <= high).all() for point in recorder.points)
        return
    space = Subspace.random(20, columns, seed=2)
    limit = box(x, 1e-3, space)
    inverse = np.linalg.pinv(space.matrix.astype(np.float64))
    for point in recorder.points:
        z = inverse @ (point - x)
        assert (np.abs(z) <= limit * (1 + 1e-9)).all()
        assert space.apply(z) == pytest.approx(point - x, abs=1e-12)


def test_iterations_and_evaluations_are_counted() -> None:
    recorder = Recorder(rugged)
    found = sharpness(recorder, normal(20), 1e-3, iterations=3)
    assert found.iterations == 3
    assert found.evaluations == len(recorder.points) >= 4
    assert "ITERATIONS" in found.message
    # φ is of the search's result, the highest of its iterates and of none that a line search gave up.
    assert found.max_loss in [rugged(point)[0] for point in recorder.points]


def by_default(function: Function, x: Vector, epsilon: float) -> tuple[float, int]:
    """The highest loss that SciPy finds with its own tolerances, and its iterations."""
    bound = box(x, epsilon)
    found = optimize.minimize(
        lambda z: tuple(-part for part in function(x + z)),
        np.zeros(len(x)),
        jac=True,
        method="L-BFGS-B",
        bounds=optimize.Bounds(-bound, bound),
        options={"maxiter": 10},
    )
    return -found.fun, found.nit


def test_default_tolerances_would_give_zero() -> None:
    """A gradient below SciPy's gtol = 1e-5 ends the search at z = 0, however sharp (curvature 1000) it is."""
    x, function = np.full(20, 5e-9), quadratic(np.full(20, 1000.0))
    loss, corner = function(x)[0], function(x + box(x, 1e-3))[0]
    assert by_default(function, x, 1e-3) == (loss, 0)
    found = sharpness(function, x, 1e-3)
    assert found.phi == pytest.approx(100 * (corner - loss) / (1 + loss), rel=1e-12)
    assert found.phi == pytest.approx(1.0, rel=1e-3)


def test_default_tolerances_would_stop_at_the_first_small_rise() -> None:
    """A first rise below SciPy's ftol = 2.2e-9 ends the search, though each step is six times the last."""
    x, function = np.full(1, 4e-6), quadratic(np.full(1, 5.0))
    loss, corner = function(x)[0], function(x + box(x, 1e-3))[0]
    highest, iterations = by_default(function, x, 1e-3)
    assert iterations == 1
    assert highest - loss < 1e-3 * (corner - loss)
    assert sharpness(function, x, 1e-3).max_loss == pytest.approx(corner, rel=1e-12)


def test_a_stationary_point_gives_zero_and_shows_that_the_search_did_not_move() -> None:
    found = sharpness(quadratic(np.full(8, 1000.0)), np.zeros(8), 1e-3)
    assert (found.phi, found.at_bound, found.iterations) == (0.0, 0.0, 0)


def test_same_seed_same_numbers() -> None:
    x = normal(60)
    found = [timeless(sharpness(rugged, x, 1e-3, subspace=9, seed=seed)) for seed in (4, 4, 5)]
    assert found[0] == found[1]
    assert found[0].phi != found[2].phi


def test_loss_that_is_not_finite_gives_no_phi() -> None:
    def broken(x: Vector) -> tuple[float, Vector]:
        return math.nan, np.zeros_like(x)

    found = sharpness(broken, normal(5), 1e-3)
    assert (found.phi, found.max_loss, found.at_bound, found.evaluations) == (None, None, None, 1)
    assert "not finite" in found.message

    def wall(x: Vector) -> tuple[float, Vector]:
        return (math.inf if np.abs(x).max() > 1e-4 else float(x.sum())), np.ones_like(x)

    found = sharpness(wall, np.zeros(5), 1e-3)
    assert (found.phi, found.max_loss, found.loss) == (None, None, 0.0)
    assert "within the box" in found.message

    def steep(x: Vector) -> tuple[float, Vector]:
        return 1.0, np.full_like(x, math.nan)

    assert sharpness(steep, np.zeros(5), 1e-3).phi is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"epsilon": 0.0}, "epsilon: got 0.0, expected a finite number above 0"),
        ({"epsilon": math.nan}, "epsilon: got nan"),
        ({"epsilon": 1e-3, "iterations": 0}, "iterations: got 0, expected at least 1"),
        ({"epsilon": 1e-3, "subspace": 0}, "subspace: got 0, expected at least 1 column"),
        ({"epsilon": 1e-3, "subspace": Subspace(np.eye(4))}, "subspace: got 4 rows, expected 5"),
    ],
)
def test_mistakes(options: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        sharpness(quadratic(np.ones(5)), np.ones(5), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"matrix: got shape \(3,\)"):
        Subspace(np.zeros(3))


@pytest.mark.parametrize(("n", "k"), [(300, 20), (40, 20), (20, 20), (10, 20), (1, 3)])
def test_pseudo_inverse(n: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 64)  # several blocks, the last one ragged
    space = Subspace.random(n, k, seed=1)
    dense = space.matrix.astype(np.float64)
    x = normal(n)
    expected = np.linalg.pinv(dense) @ x
    condition = np.linalg.cond(dense)
    error = np.abs(space.pseudo_inverse(x) - expected).max()
    # Normal equations are taken only where the condition number is small; its square would show here.
    assert error <= 1e-14 * n * condition * np.abs(expected).max()
    by_hand = Subspace(space.matrix)
    assert by_hand.pseudo_inverse(x) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_products_with_a_are_those_of_the_dense_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 7)
    space = Subspace.random(30, 4, seed=1)
    dense = space.matrix.astype(np.float64)
    z, g = normal(4), normal(30)
    assert space.apply(z) == pytest.approx(dense @ z, rel=1e-13, abs=1e-14)
    assert space.transpose(g) == pytest.approx(dense.T @ g, rel=1e-13, abs=1e-14)
    assert space.matrix.dtype == np.float32


def test_random_matrix_is_standard_normal() -> None:
    matrix = Subspace.random(20_000, 5, seed=0).matrix
    # Five standard errors of the mean and of the variance of 100,000 draws.
    assert abs(matrix.mean()) < 5 / math.sqrt(matrix.size)
    assert abs(matrix.var() - 1) < 5 * math.sqrt(2 / matrix.size)
