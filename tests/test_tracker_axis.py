"""Which dimension of an activation the tracker takes for its features, against unfoldings written by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tracker_models import RTOL

import bsgap_kernels as bsgap
from bsgap_kernels.tracking import axis


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


WITHOUT_A_GRAPH = {
    "convolution", "one image", "1-d convolution", "3-d convolution", "batch norm", "linear on channels last",
    "linear on tokens", "layer norm", "embedding", "residual",
}  # fmt: skip


@pytest.mark.parametrize("way", ["frozen", "view", "compiled"])
@pytest.mark.parametrize("name", sorted(WITHOUT_A_GRAPH))
def test_layers_of_one_kind_decide_without_a_graph(name: str, way: str) -> None:
    torch._dynamo.reset()
    before, shape, features_dim = CASES[name]
    model = nn.Sequential(copy.deepcopy(before), nn.ReLU())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    if way == "frozen":
        model.requires_grad_(False)
    with watch(model) as tracker:
        run = torch.compile(model, backend="eager") if way == "compiled" else model
        if way == "view":
            with tracker.view("probe"), torch.no_grad():
                activation = run(x)
        else:
            activation = run(x)
        (record,) = (tracker.collect("probe") if way == "view" else tracker.collect()).values()
    assert record.shape == rows(activation, features_dim).shape


def test_layers_that_disagree_are_refused_without_a_graph() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), permuted(0, 2, 3, 1), nn.LayerNorm(5), nn.GELU())
    x = torch.randn(4, 3, 8, 9)
    with (
        watch(model) as tracker,
        tracker.view("probe"),
        torch.no_grad(),
        pytest.raises(ValueError, match=r"3#0: nothing says .* \(4, 6, 7, 5\) .* give features_dim="),
    ):
        model(x)
    with watch(model, features_dim=-1) as tracker, tracker.view("probe"), torch.no_grad():
        model(x)
        assert tracker.collect("probe")["3#0"].shape == (168, 5)


def test_a_view_takes_what_training_has_seen() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), permuted(0, 2, 3, 1), nn.LayerNorm(5), nn.GELU())
    x = torch.randn(4, 3, 8, 9)
    with watch(model) as tracker:
        model(x)
        tracker.step()
        with tracker.view("probe"), torch.no_grad():
            model(x)
        assert tracker.collect("probe")["3#0"].shape == (168, 5)


@pytest.mark.parametrize(
    "before",
    [
        nn.Sequential(nn.Linear(7, 5), permuted(0, 3, 1, 2), nn.Flatten(2)),
        nn.Sequential(nn.Conv2d(7, 5, 1), nn.Flatten(2)),
        nn.Sequential(nn.Linear(7, 5), Apply(lambda x: x.mean(-1))),
        nn.Sequential(nn.Linear(7, 5), Apply(lambda x: x.unsqueeze(-1))),
    ],
)
def test_the_graph_says_nothing_behind_what_moves_features(before: nn.Module) -> None:
    activation = before(torch.randn(4, 7, 7, 7, generator=torch.Generator().manual_seed(1)))
    assert axis.of_producer(torch.relu(activation)) is None


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
