"""torchvision's classification networks by name, without their trained weights."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor, nn

from bsgap_kernels.lab.config import TORCHVISION, UserError
from bsgap_kernels.lab.optional import require

COLOURS = 3
SIZES = (28, 32, 64, 96, 128, 224, 299)
"""Sizes tried to say which a network takes: those of common data sets and of the networks' papers."""

# In training mode auxiliary heads make the output a tuple; the trainer has one loss. `init_weights` says what
# these two do anyway, without their warning that a later default may differ.
_AUXILIARY = {"aux_logits": False, "init_weights": True}
_REFUSALS = (RuntimeError, ValueError, AssertionError)


class RepeatedChannel(nn.Module):
    """A network for RGB images that takes images of one channel, as grey ones."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """What the network gives for images (B, 1, H, W) with their channel in each of three."""
        logits: Tensor = self.network(x.expand(-1, COLOURS, -1, -1))
        return logits


def build_torchvision(name: str, channels: int, size: int, classes: int) -> nn.Module:
    """torchvision's classification model `name`, with its own initialisation, for images of one size.

    Images of one channel are repeated to three. GoogLeNet and Inception v3 are without their auxiliary heads;
    vision transformers are built for images of `size` (torchvision's default is 224). One image is passed
    through the network, in eval mode, to see whether it takes the size.

    Raises:
        UserError: torchvision is missing or has no such model, or the model does not take such images.
    """
    models = require("torchvision.models")
    names = models.list_models(module=models)
    if name not in names:
        near = ", ".join(difflib.get_close_matches(name, names, n=5, cutoff=0.0))
        raise UserError(
            f"model: got {TORCHVISION + name!r}, expected one of torchvision's {len(names)} classification "
            f"models; the nearest are {near}"
        )
    if channels not in (1, COLOURS):
        raise UserError(
            f"model: {TORCHVISION}{name} takes images of 3 channels, or of 1 that is repeated; got {channels}"
        )
    options: dict[str, Any] = {"weights": None, "num_classes": classes}
    if name in ("googlenet", "inception_v3"):
        options.update(_AUXILIARY)
    if name.startswith("vit_"):
        patch = int(name.rsplit("_", 1)[1])
        if size % patch:
            raise UserError(
                f"model: {TORCHVISION}{name} takes images of a multiple of {patch}×{patch} pixels, "
                f"got {size}×{size}"
            )
        options["image_size"] = size
    network: nn.Module = models.get_model(name, **options)
    reason = _refusal(network, size)
    if reason is not None:
        other = next((s for s in SIZES if s != size and _refusal(network, s) is None), None)
        takes = f"; the smallest that it takes of {', '.join(map(str, SIZES))} is {other}×{other}"
        raise UserError(
            f"model: {TORCHVISION}{name} takes no images of {size}×{size}: {reason}{takes if other else ''}"
        )
    return network if channels == COLOURS else RepeatedChannel(network)


def _refusal(network: nn.Module, size: int) -> str | None:
    """Why a network does not take images of a size, or None; modes and buffers stay as they are."""
    network.eval()
    try:
        with torch.no_grad():
            network(torch.zeros(1, COLOURS, size, size))
    except _REFUSALS as error:
        return " ".join(str(error).split())
    finally:
        network.train()
    return None
