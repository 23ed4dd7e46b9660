"""The loss along a line and along an arc between two networks (Keskar et al., arXiv 1609.04836)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from bsgap_kernels.lab.objective import Evaluation, Objective, Vector

ALPHAS: tuple[float, ...] = tuple(np.linspace(-1, 2, 25).tolist())
"""25 points in [−1, 2], steps of 1/8: 0 and 1 are among them."""
KINDS = ("linear", "curved")


@dataclass
class Curve:
    """Loss and accuracy at each α on the training and the test images."""

    kind: str
    alpha: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)

    def add(self, alpha: float, train: Evaluation, test: Evaluation) -> None:
        """Append one point."""
        self.alpha.append(alpha)
        self.train_loss.append(train.loss)
        self.train_accuracy.append(train.accuracy)
        self.test_loss.append(test.loss)
        self.test_accuracy.append(test.accuracy)


def weights(kind: str, alpha: float) -> tuple[float, float]:
    """Factors of x_a and x_b at α: (1 − α, α) on the line, (cos(απ/2), sin(απ/2)) on the arc.

    Exactly (1, 0) at α = 0 and (0, 1) at α = 1: the cosine of the float next to π/2 is 6e-17, which would be
    added to parameters that are 0.
    """
    if kind == "linear":
        return 1 - alpha, alpha
    if kind != "curved":
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")
    if alpha == round(alpha):
        return ((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0))[round(alpha) % 4]
    return math.cos(alpha * math.pi / 2), math.sin(alpha * math.pi / 2)


def curve(
    kind: str, train: Objective, test: Objective, x_a: Vector, x_b: Vector, alphas: tuple[float, ...] = ALPHAS
) -> Curve:
    """f(α x_b + (1 − α) x_a), or f(sin(απ/2) x_b + cos(απ/2) x_a), on the images of two objectives.

    Both objectives are of one architecture in eval mode. Running statistics of batch norm fit one network
    and none between two, so every point, the ends included, gets statistics of its own: estimated anew in one
    pass over `train`'s images (`Objective.reestimate`) and used for both sets. The ends of networks without
    batch norm are the networks' own losses, bit for bit; with it they differ from those under the running
    statistics.

    Cost: a pass over both sets a point, with batch norm another one over the training images; no gradient.

    Raises:
        ValueError: the vectors do not fit the objectives, or the kind is unknown.

    Source: Keskar et al., arXiv 1609.04836: both curves, and 25 points of α in [−1, 2] for the line.
    """
    found = Curve(kind)
    for alpha in alphas:
        of_a, of_b = weights(kind, alpha)
        x = of_a * x_a + of_b * x_b
        buffers = train.reestimate(x)
        found.add(alpha, train.evaluate(x, buffers), test.evaluate(x, buffers))
    return found


def check_comparable(a: Objective, b: Objective) -> None:
    """That a line between two networks has those networks at its ends.

    Raises:
        ValueError: parameters differ in name or shape, or something that is no part of x (a frozen
            parameter, a buffer of another layer than batch norm) differs in value.
    """
    shapes_a, shapes_b = a.shapes(), b.shapes()
    if shapes_a != shapes_b:
        names = sorted(set(shapes_a.items()) ^ set(shapes_b.items()))
        raise ValueError(
            f"the networks differ in shape, {names[0][0]} among others; expected one architecture"
        )
    others = b.frozen()
    for name, value in a.frozen().items():
        if name not in others or not torch.equal(value, others[name].to(value.device)):
            raise ValueError(f"the networks differ in {name}, which is not trained and not interpolated")
