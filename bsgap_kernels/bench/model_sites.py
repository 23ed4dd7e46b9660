"""Shapes of the activations of well-known models, without building more than meta tensors."""

from __future__ import annotations

import importlib
import re

import torch
from torch import nn

from .roofline import Site

MODELS = (
    "resnet56",
    "lenet5",
    "vgg16",
    "resnet18",
    "resnet50",
    "transformer:LAYERS,TOKENS,DIM",
    "matrix:M,N",
)
RESNET56_STAGES = ((19, 16, 32), (18, 32, 16), (18, 64, 8))
"""(convolutions, channels, side) on 32 x 32 images: the stem, then 3 x 9 blocks of two."""
VGG16_STAGES = ((2, 64, 32), (2, 128, 16), (3, 256, 8), (3, 512, 4), (3, 512, 2))
LENET5 = ((6, 28), (16, 10))


def model_sites(model: str) -> list[Site]:
    """The sites of a model, in forward order: conv outputs, tokens x features, or one matrix.

    ResNet-56 (option A: no convolution in a shortcut) and VGG-16 for 32 x 32 images, LeNet-5 for 28 x 28,
    ResNet-18 and 50 as torchvision builds them for 224 x 224. Raises ValueError in one sentence.
    """
    if model == "resnet56":
        return _stages(RESNET56_STAGES)
    if model == "vgg16":
        return _stages(VGG16_STAGES)
    if model == "lenet5":
        return [Site(f"conv{i}", channels, side * side) for i, (channels, side) in enumerate(LENET5, start=1)]
    if model in ("resnet18", "resnet50"):
        return _torchvision(model)
    if match := re.fullmatch(r"transformer:(\d+),(\d+),(\d+)", model):
        layers, tokens, features = map(int, match.groups())
        if min(layers, tokens, features) > 0:
            return [Site(f"layer{i}", features, tokens) for i in range(layers)]
    if match := re.fullmatch(r"matrix:(\d+),(\d+)", model):
        m, n = map(int, match.groups())
        if min(m, n) > 0:
            return [Site("matrix", n, m)]
    raise ValueError(f"model: got {model!r}, expected one of {', '.join(MODELS)}")


def _stages(stages: tuple[tuple[int, int, int], ...]) -> list[Site]:
    return [
        Site(f"stage{number}.conv{i}", channels, side * side)
        for number, (convolutions, channels, side) in enumerate(stages, start=1)
        for i in range(convolutions)
    ]


def _torchvision(model: str) -> list[Site]:
    try:
        models = importlib.import_module("torchvision.models")
    except (ImportError, RuntimeError) as error:  # built for another torch it dies with a RuntimeError
        reason = " ".join(str(error).split())
        raise ValueError(f"model: {model} needs torchvision, which does not load here ({reason})") from error
    with torch.device("meta"):
        network: nn.Module = getattr(models, model)()
        image = torch.empty(1, 3, 224, 224)
    return trace_convolutions(network, image)


def trace_convolutions(network: nn.Module, image: torch.Tensor) -> list[Site]:
    """The outputs of all convolutions of a network on meta tensors, in forward order."""
    sites: list[Site] = []

    def record(name: str) -> object:
        def hook(module: nn.Module, args: object, output: torch.Tensor) -> None:
            sites.append(Site(name, output.shape[1], output.shape[2:].numel()))

        return hook

    handles = [
        module.register_forward_hook(record(name))  # type: ignore[arg-type]
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    with torch.no_grad():
        network.eval()(image)
    for handle in handles:
        handle.remove()
    return sites
