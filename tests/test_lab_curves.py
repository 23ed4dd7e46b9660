"""The line and the arc between two networks: their ends, their middle, and batch norm on the way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lab_data import small_data
from torch import Tensor, nn

from bsgap_kernels.lab.curves import ALPHAS, KINDS, check_comparable, curve, weights
from bsgap_kernels.lab.models import LeNet5
from bsgap_kernels.lab.objective import Objective

DATA = small_data()
TRAIN, TEST = len(DATA.train_labels), len(DATA.test_labels)


def train_rows(rows: slice) -> tuple[Tensor, Tensor]:
    return DATA.train_images[rows], DATA.train_labels[rows]


def test_rows(rows: slice) -> tuple[Tensor, Tensor]:
    return DATA.test_images[rows], DATA.test_labels[rows]


test_rows.__test__ = False  # type: ignore[attr-defined]


def lenet(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return LeNet5()


def normed(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 3, 5, stride=4),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(108, 10),
    )


def pair(model: nn.Module, chunk: int = 16) -> tuple[Objective, Objective]:
    return Objective(model, train_rows, TRAIN, chunk=chunk), Objective(model, test_rows, TEST, chunk=chunk)


def test_grid() -> None:
    assert len(ALPHAS) == 25
    assert (ALPHAS[0], ALPHAS[-1]) == (-1.0, 2.0)
    assert {0.0, 1.0} < set(ALPHAS)
    assert np.diff(ALPHAS) == pytest.approx(np.full(24, 0.125), abs=1e-15)


def test_weights() -> None:
    assert weights("linear", -1.0) == (2.0, -1.0)
    assert weights("linear", 0.25) == (0.75, 0.25)
    half = np.sqrt(0.5)
    assert weights("curved", 0.5) == pytest.approx((half, half), rel=1e-15)
    assert weights("curved", 1.5) == pytest.approx((-half, half), rel=1e-15)
    assert weights("curved", -0.5) == pytest.approx((half, -half), rel=1e-15)
    for alpha, expected in ((-1, (0, -1)), (0, (1, 0)), (1, (0, 1)), (2, (-1, 0))):
        assert weights("curved", float(alpha)) == expected
    with pytest.raises(ValueError, match="kind: got 'round', expected one of linear, curved"):
        weights("round", 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_ends_are_the_two_networks_bit_for_bit(kind: str) -> None:
    (train, test), (train_b, test_b) = pair(lenet(0)), pair(lenet(1))
    with torch.no_grad():  # parameters that are 0, to which an almost exact cosine would add something
        x_b = train_b.parameters()
        x_b[::7] = 0
    x_a = train.parameters()
    found = curve(kind, train, test, x_a, x_b, (0.0, 0.5, 1.0))
    assert found.kind == kind
    assert found.alpha == [0.0, 0.5, 1.0]
    for index, x in ((0, x_a), (2, x_b)):
        for own, losses, accuracies in (
            (train_b, found.train_loss, found.train_accuracy),
            (test_b, found.test_loss, found.test_accuracy),
        ):
            alone = own.evaluate(x)
            assert (losses[index], accuracies[index]) == (alone.loss, alone.accuracy)
    middle = (0.5, 0.5) if kind == "linear" else (np.sqrt(0.5), np.sqrt(0.5))
    x = middle[0] * x_a + middle[1] * x_b
    assert found.train_loss[1] == pytest.approx(train.evaluate(x).loss, rel=1e-6)


def test_every_point_of_a_network_with_batch_norm_has_statistics_of_its_own() -> None:
    (train, test), (train_b, test_b) = pair(normed(0)), pair(normed(1))
    x_a, x_b = train.parameters(), train_b.parameters()
    found = curve("linear", train, test, x_a, x_b, (0.0, 0.5, 1.0))
    for index, x in ((0, x_a), (1, 0.5 * x_a + 0.5 * x_b), (2, x_b)):
        own = train_b.reestimate(x)
        assert found.train_loss[index] == train_b.evaluate(x, own).loss
        assert found.test_loss[index] == test_b.evaluate(x, own).loss
        # The fresh networks' running statistics are 0 and 1, which fit nothing.
        assert abs(found.train_loss[index] - train.evaluate(x).loss) > 1e-3
    # What one point estimated is gone at the next.
    again = curve("linear", train, test, x_a, x_b, (1.0, 0.0))
    assert again.train_loss == found.train_loss[::-2]
    assert again.test_loss == found.test_loss[::-2]


def test_networks_that_do_not_lie_on_one_line() -> None:
    check_comparable(pair(normed(0))[0], pair(normed(1))[0])
    wide = nn.Sequential(nn.Conv2d(1, 4, 5), nn.Flatten(), nn.Linear(4 * 576, 10))
    with pytest.raises(ValueError, match="differ in shape"):
        check_comparable(pair(normed(0))[0], pair(wide)[0])
    frozen = [normed(seed) for seed in (0, 1)]
    for model in frozen:
        model[0].bias.requires_grad_(False)  # type: ignore[index]
    with pytest.raises(ValueError, match=r"differ in 0\.bias, which is not trained"):
        check_comparable(*(pair(model)[0] for model in frozen))
    frozen[1][0].bias.copy_(frozen[0][0].bias)  # type: ignore[index]
    check_comparable(*(pair(model)[0] for model in frozen))
