"""The lab's networks: shapes, sites and published sizes."""

import pytest
import torch
from torch import nn

from bsgap_kernels.lab.config import MODELS
from bsgap_kernels.lab.models import REGISTRY, ResNet56, build_model
from bsgap_kernels.tracking import RankTracker


def test_every_model_of_the_command_line_can_be_built() -> None:
    assert tuple(REGISTRY) == MODELS
    for name in MODELS:
        assert build_model(name, torch.Size((1, 28, 28)), 7)(torch.zeros(2, 1, 28, 28)).shape == (2, 7)


def test_resnet56_has_the_published_size() -> None:
    model = ResNet56()
    # He et al. 2015, table 6: 0.85 M.
    assert sum(parameter.numel() for parameter in model.parameters()) == 853_018
    kinds = [type(module) for module in model.modules()]
    assert (kinds.count(nn.Conv2d), kinds.count(nn.BatchNorm2d), kinds.count(nn.Linear)) == (55, 55, 1)


def test_every_convolution_of_resnet56_has_a_site() -> None:
    model = ResNet56()
    with RankTracker(model, unfold="channel") as tracker:
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
        shapes = [record.shape for record in tracker.collect().values()]
    stages = [(2 * 32 * 32, 16)] * 19 + [(2 * 16 * 16, 32)] * 18 + [(2 * 8 * 8, 64)] * 18
    assert shapes == stages


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32), (2, 9)])
def test_resnet56_takes_any_image(channels: int, size: int) -> None:
    model = ResNet56(channels, size, 5)
    seen = []
    model.stages.register_forward_hook(lambda module, args, output: seen.append(output.shape[1:]))
    logits = model(torch.randn(3, channels, size, size))
    logits.sum().backward()
    assert logits.shape == (3, 5)
    quarter = -(-size // 4)
    assert seen == [(64, quarter, quarter)]
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_shortcut_is_the_identity_padded_with_zeros() -> None:
    """With convolutions that give nothing, a block's output is ReLU of its shortcut."""
    block = ResNet56().stages[1][0].eval()
    for convolution in (block.conv1, block.conv2):
        nn.init.zeros_(convolution.weight)
    x = torch.randn(2, 16, 7, 7)
    y = block(x)
    assert y.shape == (2, 32, 4, 4)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2].relu())
    assert not y[:, 16:].any()
