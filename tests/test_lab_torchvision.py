"""torchvision's models in the lab: what they are fed, and what is refused with what would fit."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from lab_data import small_data

from bsgap_kernels.lab.config import TrainConfig, UserError
from bsgap_kernels.lab.models import build_model
from bsgap_kernels.lab.setup import set_up
from bsgap_kernels.tracking import RankTracker

models = pytest.importorskip("torchvision.models")
RGB, GREY = torch.Size((3, 32, 32)), torch.Size((1, 28, 28))


def test_a_model_is_torchvisions_own_with_its_own_weights() -> None:
    torch.manual_seed(0)
    theirs = models.get_model("resnet18", weights=None, num_classes=10).state_dict()
    torch.manual_seed(0)
    ours = build_model("torchvision:resnet18", RGB, 10)
    assert ours.training
    found = ours.state_dict()
    assert list(found) == list(theirs)
    # The buffers too: the image that was tried has left no trace in batch norm.
    assert all(torch.equal(found[key], value) for key, value in theirs.items())


def test_one_channel_is_repeated_to_three() -> None:
    torch.manual_seed(0)
    colour = build_model("torchvision:squeezenet1_1", torch.Size((3, 28, 28)), 10).eval()
    torch.manual_seed(0)
    grey = build_model("torchvision:squeezenet1_1", GREY, 10).eval()
    images = torch.randn(2, *GREY)
    assert torch.equal(grey(images), colour(images.repeat(1, 3, 1, 1)))
    assert list(grey.network.state_dict()) == list(colour.state_dict())


def test_sites_of_a_model_with_shared_modules() -> None:
    """Its ReLU modules are called twice a block: a stem and 8 blocks of 2."""
    model = build_model("torchvision:resnet18", GREY, 10)
    with RankTracker(model, unfold="channel") as tracker:
        model(torch.randn(2, *GREY))
        assert len(tracker.collect()) == 17


def test_models_with_auxiliary_heads_give_logits_alone() -> None:
    model = build_model("torchvision:googlenet", RGB, 10)
    assert model.training
    assert model(torch.randn(2, *RGB)).shape == (2, 10)


def test_transformers_take_the_size_of_the_data() -> None:
    with torch.device("meta"):
        model = build_model("torchvision:vit_b_16", RGB, 10)
    tokens = 1 + 2 * 2
    assert model.encoder.pos_embedding.shape == (1, tokens, 768)
    with pytest.raises(UserError) as caught:
        build_model("torchvision:vit_b_16", torch.Size((3, 28, 28)), 10)
    assert str(caught.value) == (
        "model: torchvision:vit_b_16 takes images of a multiple of 16×16 pixels, got 28×28"
    )


@pytest.mark.parametrize(
    ("name", "image", "sentence"),
    [
        ("resnet19", RGB, "model: got 'torchvision:resnet19', expected one of torchvision's .* resnet18"),
        ("", RGB, "model: got 'torchvision:', expected one of torchvision's"),
        ("fcn_resnet50", RGB, "model: got 'torchvision:fcn_resnet50', expected .* classification models"),
        ("resnet18", (2, 32, 32), "takes images of 3 channels, or of 1 that is repeated; got 2"),
        ("alexnet", RGB, "alexnet takes no images of 32×32: .* too small; the smallest .* is 64×64"),
        ("vgg11", GREY, "vgg11 takes no images of 28×28: .*; the smallest .* is 32×32"),
    ],
)
def test_mistakes_name_what_would_fit(name: str, image: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        build_model(f"torchvision:{name}", torch.Size(image), 10)
    assert "\n" not in str(caught.value)


def test_torchvision_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(UserError, match="torchvision is not installed"):
        build_model("torchvision:resnet18", RGB, 10)
    assert build_model("cnn", RGB, 10)(torch.zeros(1, *RGB)).shape == (1, 10)


def test_batch_norm_of_one_pixel_needs_two_images() -> None:
    """Where a map has shrunk to 1×1, one image gives one value a channel; where it has not, it is enough."""
    for options, option in (
        ({"batch_size": 1}, "batch_size"),
        ({"batch_size": 4, "micro_batch": 1}, "micro_batch"),
    ):
        given: dict[str, Any] = {**options, "probe_size": 8, "steps": 1, "every": None}
        with pytest.raises(UserError, match=f"{option}: got passes of 1 row, expected at least 2 for batch"):
            set_up(TrainConfig(model="torchvision:resnet18", **given), small_data())
        set_up(TrainConfig(model="resnet18", **given), small_data()).tracker.close()
