"""VGG-16 in its CIFAR form."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from bsgap_kernels.lab.models.initial import he_initialise

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""(channels, convolutions) of the stages of VGG-16: Simonyan & Zisserman 2014, table 1, column D."""


def vgg_stages(channels: int, batch_norm: bool, dropout: tuple[float, ...] = (0.0,) * 5) -> nn.Sequential:
    """The 13 convolutions of VGG-16, 3×3 with bias, each with a ReLU; a 2×2 max pool ends a stage.

    Activations (B, 512, ⌈size / 32⌉, ⌈size / 32⌉) of images (B, channels, size, size). Pools keep a ragged
    border, so that 28×28 images end at 1×1 as those of 32×32 do.

    Args:
        channels: channels of the images.
        batch_norm: whether batch norm stands between a convolution and its ReLU.
        dropout: of each stage, the share of activations dropped after each ReLU but the stage's last.
    """
    stages = []
    for (width, convolutions), share in zip(STAGES, dropout, strict=True):
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number in range(1, convolutions + 1):
            layers[f"conv{number}"] = nn.Conv2d(channels, width, 3, padding=1)
            if batch_norm:
                layers[f"bn{number}"] = nn.BatchNorm2d(width)
            layers[f"relu{number}"] = nn.ReLU()
            if share and number < convolutions:
                layers[f"drop{number}"] = nn.Dropout(share)
            channels = width
        layers["pool"] = nn.MaxPool2d(2, ceil_mode=True)
        stages.append(nn.Sequential(layers))
    return nn.Sequential(*stages)


def vgg_features(size: int) -> int:
    """Features of an image after `vgg_stages`: 512 up to 32×32."""
    side = -(-size // 32)
    return STAGES[-1][0] * side * side


class VGG16(nn.Module):
    """VGG-16 in its CIFAR form: 13 convolutions, 5 max pools, one linear layer from 512 features.

    The convolutions of Simonyan & Zisserman 2014 (arXiv 1409.1556, table 1, column D). They say nothing of
    32×32 images, on which the convolutions end at 1×1 pixels; that one linear layer takes the place of their
    three, without dropout, is the form in common use (that of kuangliu/pytorch-cifar, which has batch norm).
    Batch norm, not in the original, follows each convolution where asked for. Convolutions start as
    `he_initialise` draws them (ours: with PyTorch's default nothing would arrive at the end of 13 layers
    without batch norm), the linear layer by PyTorch's default.

    14,719,818 parameters for 10 classes of RGB images, 14,728,266 with batch norm. Made for 32×32, takes any
    number of channels and any size; above 32×32 the linear layer grows with the pixels that are left.
    """

    def __init__(
        self, channels: int = 3, size: int = 32, classes: int = 10, batch_norm: bool = False
    ) -> None:
        super().__init__()
        self.stages = vgg_stages(channels, batch_norm)
        self.fc = nn.Linear(vgg_features(size), classes)
        he_initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, channels, size, size)."""
        logits: Tensor = self.fc(self.stages(x).flatten(1))
        return logits
