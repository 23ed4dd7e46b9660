"""Networks of the lab."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bsgap_kernels.lab.config import UserError


class LeNet5(nn.Module):
    """LeNet-5 (LeCun et al. 1998, section II.B) with ReLU and max pooling, for 28×28 or 32×32 images.

    The first convolution pads 28×28 images to 32×32 as the original's data did, so that the second one gives
    16×10×10 and the fully connected layers have 120, 84 and `classes` units either way.
    """

    def __init__(self, channels: int = 1, size: int = 28, classes: int = 10) -> None:
        super().__init__()
        if size not in (28, 32):
            raise UserError(f"model: lenet5 takes images of 28×28 or 32×32, got {size}×{size}")
        self.conv1 = nn.Conv2d(channels, 6, 5, padding=(32 - size) // 2)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(120, 84)
        self.relu4 = nn.ReLU()
        self.fc3 = nn.Linear(84, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, channels, size, size)."""
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        x = self.relu3(self.fc1(x.flatten(1)))
        x = self.relu4(self.fc2(x))
        logits: Tensor = self.fc3(x)
        return logits


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch norm and a shortcut without weights (He et al. 2015, option A).

    Where the block changes shape the shortcut takes every `stride`-th pixel and pads the new channels with
    zeros, so that every weight of the network lies on the path through the convolutions.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.stride = stride
        self.new_channels = channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        """Activations (B, channels, ⌈H / stride⌉, ⌈W / stride⌉) of activations (B, channels_in, H, W)."""
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            x = nn.functional.pad(x, (0, 0, 0, 0, 0, self.new_channels))
        out: Tensor = self.relu2(y + x)
        return out


class ResNet56(nn.Module):
    """ResNet-56 in its CIFAR form (He et al. 2015, section 4.2): 55 convolutions, each followed by a ReLU.

    A 3×3 convolution and 3 stages of 9 basic blocks with 16, 32 and 64 channels, the second and third at
    half the resolution of the one before; global average pooling; one linear layer. 853,018 parameters for
    10 classes of RGB images. Made for 32×32, takes any number of channels and any size.
    """

    def __init__(self, channels: int = 3, size: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        stages, width = [], 16
        for stage in range(3):
            blocks = []
            for block in range(9):
                blocks.append(BasicBlock(width, 16 << stage, stride=2 if stage and not block else 1))
                width = 16 << stage
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, channels, size, size)."""
        x = self.stages(self.relu(self.bn(self.conv(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


# Name on the command line (config.MODELS) to a function of (channels, size, classes).
REGISTRY: dict[str, Callable[[int, int, int], nn.Module]] = {"lenet5": LeNet5, "resnet56": ResNet56}


def build_model(name: str, image_shape: torch.Size, classes: int) -> nn.Module:
    """The model `name` for images of shape (channels, height, width)."""
    channels, height, width = image_shape
    if height != width:
        raise UserError(f"model: {name} takes square images, got {height}×{width}")
    return REGISTRY[name](channels, height, classes)
