"""Residual networks in their CIFAR forms."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from bsgap_kernels.lab.models.initial import he_initialise


class PaddedShortcut(nn.Module):
    """A shortcut without weights (He et al. 2015, option A).

    It takes every `stride`-th pixel and pads the new channels with zeros, so that every weight of the network
    lies on the path through the convolutions.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        """Activations (B, channels, ⌈H / stride⌉, ⌈W / stride⌉) of activations (B, channels_in, H, W)."""
        x = x[:, :, :: self.stride, :: self.stride]
        return nn.functional.pad(x, (0, 0, 0, 0, 0, self.new_channels))


def projection(channels_in: int, channels: int, stride: int) -> nn.Module:
    """A shortcut by a 1×1 convolution and batch norm (He et al. 2015, option B)."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
    )


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch norm beside a shortcut (He et al. 2015, figure 2).

    The shortcut is the identity but where the block changes shape: there `shortcut` of (channels_in,
    channels, stride) makes it.
    """

    def __init__(
        self, channels_in: int, channels: int, stride: int, shortcut: Callable[[int, int, int], nn.Module]
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        same = stride == 1 and channels == channels_in
        self.shortcut = nn.Identity() if same else shortcut(channels_in, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Activations (B, channels, ⌈H / stride⌉, ⌈W / stride⌉) of activations (B, channels_in, H, W)."""
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu2(y + self.shortcut(x))
        return out


class ResNet(nn.Module):
    """A 3×3 convolution, stages of basic blocks, global average pooling and one linear layer.

    Every stage but the first starts with stride 2. Convolutions start as `he_initialise` draws them, which is
    the initialisation He et al. 2015 name, batch norm and the linear layer by PyTorch's defaults.

    Args:
        channels: channels of the images.
        widths: channels of each stage; the first convolution has those of the first.
        blocks: blocks of a stage.
        classes: number of logits.
        shortcut: what makes the shortcut of a block that changes shape.
    """

    def __init__(
        self,
        channels: int,
        widths: tuple[int, ...],
        blocks: int,
        classes: int,
        shortcut: Callable[[int, int, int], nn.Module],
    ) -> None:
        super().__init__()
        width = widths[0]
        self.conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        stages = []
        for stage, channels_out in enumerate(widths):
            made = []
            for block in range(blocks):
                made.append(BasicBlock(width, channels_out, 2 if stage and not block else 1, shortcut))
                width = channels_out
            stages.append(nn.Sequential(*made))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(width, classes)
        he_initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, channels, size, size)."""
        x = self.stages(self.relu(self.bn(self.conv(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class ResNet56(ResNet):
    """ResNet-56 in its CIFAR form (He et al. 2015, section 4.2): 55 convolutions, each followed by a ReLU.

    A 3×3 convolution and 3 stages of 9 basic blocks with 16, 32 and 64 channels, the second and third at
    half the resolution of the one before, shortcuts without weights (option A). 853,018 parameters for 10
    classes of RGB images. Made for 32×32, takes any number of channels and any size.
    """

    def __init__(self, channels: int = 3, size: int = 32, classes: int = 10) -> None:
        super().__init__(channels, (16, 32, 64), 9, classes, PaddedShortcut)


class ResNet18(ResNet):
    """ResNet-18 in its CIFAR form: the four stages of He et al. 2015 (table 1) behind a 3×3 convolution.

    4 stages of 2 basic blocks with 64, 128, 256 and 512 channels, each but the first at half the resolution
    of the one before, shortcuts by 1×1 convolutions (option B). The original, for 224×224, starts with a 7×7
    convolution of stride 2 and a max pool; the form for 32×32, in common use (that of
    kuangliu/pytorch-cifar), has a 3×3 convolution of stride 1 and no pool. 11,173,962 parameters for 10
    classes of RGB images. Takes any number of channels and any size.
    """

    def __init__(self, channels: int = 3, size: int = 32, classes: int = 10) -> None:
        super().__init__(channels, (64, 128, 256, 512), 2, classes, projection)
