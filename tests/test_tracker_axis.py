"""Which dimension of an activation the tracker takes for its features, against unfoldings written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tracker_models import RTOL

import bsgap_kernels as bsgap


def watch(model: nn.Module, **options: Any) -> bsgap.RankTracker:
    return bsgap.RankTracker(model, rtol=RTOL, verbose=False, **options)


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def permuted(*dims: int) -> Apply:
    return Apply(lambda x: x.permute(*dims))


def rows(activation: Tensor, features_dim: int) -> Tensor:
    return activation.movedim(features_dim, -1).flatten(0, -2).detach()


CASES: dict[str, tuple[nn.Module, tuple[int, ...], int]] = {
    # layers before the ReLU, input, dimension of features of its output
    "convolution": (nn.Conv2d(3, 5, 3), (4, 3, 8, 9), 1),
    "one image": (nn.Conv2d(3, 5, 3), (3, 8, 9), 0),
    "1-d convolution": (nn.Conv1d(3, 5, 3), (4, 3, 9), 1),
    "3-d convolution": (nn.Conv3d(3, 5, 2), (4, 3, 4, 4, 4), 1),
    "batch norm": (nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)), (4, 3, 8, 9), 1),
    "group norm": (nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6)), (4, 3, 8, 9), 1),
    "linear on channels last": (nn.Linear(7, 5), (4, 6, 3, 7), -1),
    "linear on tokens": (nn.Linear(7, 5, bias=False), (4, 6, 7), -1),
    "layer norm": (nn.LayerNorm(7), (4, 6, 3, 7), -1),
    "embedding": (nn.Sequential(Apply(lambda x: x.long().abs() % 5), nn.Embedding(5, 7)), (4, 6, 2), -1),
    "to channels last": (nn.Sequential(nn.Conv2d(3, 5, 3), permuted(0, 2, 3, 1)), (4, 3, 8, 9), -1),
    "to channels first": (nn.Sequential(nn.Linear(7, 5), permuted(0, 3, 1, 2)), (4, 6, 3, 7), 1),
    "transposed tokens": (nn.Sequential(nn.Linear(7, 5), Apply(lambda x: x.transpose(1, 2))), (4, 6, 7), 1),
    "heads": (nn.Sequential(nn.Linear(8, 12), Apply(lambda x: x.view(4, 6, 3, 4))), (4, 6, 8), -1),
    "residual": (nn.Sequential(nn.Linear(7, 7), Apply(lambda x: x + x.sin())), (4, 6, 3, 7), -1),
}


@pytest.mark.parametrize("unfold", ["auto", "channel"])
@pytest.mark.parametrize("name", CASES)
def test_the_layer_before_decides(name: str, unfold: str) -> None:
    before, shape, features_dim = CASES[name]
    model = nn.Sequential(before, nn.ReLU())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    with watch(model, unfold=unfold) as tracker:
        activation = model(x.requires_grad_() if name == "layer norm" else x)
        (record,) = tracker.collect().values()
    A = rows(activation, features_dim)
    assert record.shape == A.shape
    assert record.near_rank == int(torch.linalg.matrix_rank(A.double(), rtol=RTOL))


class Functional(nn.Module):
    """Functional nonlinearities, whose consumers say where the features are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)
        self.conv = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(F.relu(self.first(x)))
        return self.conv(F.gelu(x).permute(0, 3, 1, 2))


def test_the_layer_behind_decides() -> None:
    with watch(Functional()) as tracker:
        tracker._reader._model(torch.randn(2, 7, 8, 6))
        shapes = {name: record.shape for name, record in tracker.collect().items()}
    assert shapes == {"second:input#0": (112, 5), "conv:input#0": (112, 4)}


@pytest.mark.parametrize(
    ("name", "site", "features"),
    [
        ("swin_t", "features.1.0.mlp.1", 384),
        ("convnext_tiny", "features.1.0.block.4", 384),
        ("vit_b_16", "encoder.layers.encoder_layer_0.mlp.1", 3072),
        ("resnet18", "layer1.0.relu", 64),
    ],
)
def test_models_of_torchvision(name: str, site: str, features: int) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    size = 224 if name == "vit_b_16" else 64
    model = getattr(models, name)(weights=None)
    with watch(model, layers=[site]) as tracker:
        model(torch.randn(2, 3, size, size))
        records = tracker.collect()
    assert {record.shape[1] for record in records.values()} == {features}


def test_what_the_user_says_holds() -> None:
    model = nn.Sequential(nn.Linear(7, 5), nn.ReLU())
    x = torch.randn(4, 6, 3, 7)
    with watch(model, features_dim=1) as tracker:
        model(x)
        (record,) = tracker.collect().values()
    assert record.shape == (60, 6)
    with (
        watch(model, features_dim=4) as tracker,
        pytest.raises(ValueError, match="1: features_dim is 4, and"),
    ):
        model(x)
    with pytest.raises(TypeError, match="features_dim: got '1', expected an int or None"):
        bsgap.RankTracker(model, features_dim="1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="features_dim: got 1, which unfold='token'"):
        bsgap.RankTracker(model, features_dim=1, unfold="token")


def test_pooling_is_over_the_other_dimensions() -> None:
    model = nn.Sequential(nn.Linear(7, 5), nn.ReLU())
    x = torch.randn(9, 6, 3, 7)
    with watch(model, unfold="pool") as tracker:
        A = model(x).mean((1, 2)).detach()
        (record,) = tracker.collect().values()
    assert record.shape == (9, 5)
    assert record.near_rank == int(torch.linalg.matrix_rank(A.double(), rtol=RTOL))
