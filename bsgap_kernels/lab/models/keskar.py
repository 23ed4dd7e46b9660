"""The networks of Keskar et al., "On Large-Batch Training for Deep Learning" (arXiv 1609.04836).

F1 and F2 are fully connected, for MNIST and TIMIT; C1 to C4 are convolutional, for CIFAR-10 (C1, C2) and
CIFAR-100 (C3, C4). The form of C1 to C4 is that of the authors' published code (network_zoo.py in
keskarnitish/large-batch-training), which has no F1 and F2. F1 follows a restatement of the paper's appendix
B; F2 is ours: F1 with 7 hidden layers, for we found no source to read for it.

Ours in all of them: initial weights are PyTorch's defaults (the code's are Keras 1's), and batch norm is
PyTorch's, with running statistics in eval mode. The code's (Keras 1, mode 2) takes the statistics of the
batch at test time too.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from bsgap_kernels.lab.models.vgg import vgg_features, vgg_stages

DROPOUT = 0.5
"""Share dropped around dense layers, in the code and in restatements of the paper."""
STAGE_DROPOUT = (0.3, 0.4, 0.4, 0.4, 0.4)
"""Share dropped between the convolutions of each stage of C2, in the code."""


def _dense(features_in: int, features: int) -> OrderedDict[str, nn.Module]:
    """A linear layer, batch norm over its outputs, ReLU."""
    return OrderedDict(linear=nn.Linear(features_in, features), bn=nn.BatchNorm1d(features), relu=nn.ReLU())


class KeskarMLP(nn.Module):
    """F1 (5 hidden layers) and F2 (7): linear layers of 512 units, each with batch norm and ReLU.

    F1 for MNIST is 784-512×5-10, 1,462,794 parameters of which 5,120 are batch norm's. Input size and classes
    are the data's: the first layer takes all channels · size² values of an image. Takes any image.
    """

    def __init__(self, channels: int = 1, size: int = 28, classes: int = 10, hidden: int = 5) -> None:
        super().__init__()
        features, layers = channels * size * size, []
        for _ in range(hidden):
            layers.append(nn.Sequential(_dense(features, 512)))
            features = 512
        self.hidden = nn.Sequential(*layers)
        self.out = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, channels, size, size)."""
        logits: Tensor = self.out(self.hidden(x.flatten(1)))
        return logits


class KeskarAlexNet(nn.Module):
    """C1, and C3 with 100 classes: two convolutions and two dense layers, a small AlexNet.

    Twice a 5×5 convolution of 64 channels, batch norm, ReLU and an overlapping 3×3 max pool of stride 2; then
    384 and 192 units, each with batch norm, ReLU and dropout of 0.5; 1,757,834 parameters for 10 classes of
    32×32 RGB images. Strides are those of the authors' code, 1 in the convolutions and 2 in the pools;
    restatements of the appendix give the convolutions a stride of 2. Takes any number of channels and any
    size, of which the first dense layer takes 64·⌈size / 4⌉² features.
    """

    def __init__(self, channels: int = 3, size: int = 32, classes: int = 10) -> None:
        super().__init__()
        stages = []
        for _ in range(2):
            layers: OrderedDict[str, nn.Module] = OrderedDict(
                conv=nn.Conv2d(channels, 64, 5, padding=2),
                bn=nn.BatchNorm2d(64),
                relu=nn.ReLU(),
                pool=nn.MaxPool2d(3, stride=2, padding=1),
            )
            stages.append(nn.Sequential(layers))
            channels = 64
        self.stages = nn.Sequential(*stages)
        features, dense = 64 * (-(-size // 4)) ** 2, []
        for units in (384, 192):
            dense.append(nn.Sequential(OrderedDict(**_dense(features, units), drop=nn.Dropout(DROPOUT))))
            features = units
        self.dense = nn.Sequential(*dense)
        self.out = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, channels, size, size)."""
        logits: Tensor = self.out(self.dense(self.stages(x).flatten(1)))
        return logits


class KeskarVGG(nn.Module):
    """C2, and C4 with 100 classes: the convolutions of VGG-16 with batch norm, and 512 dense units.

    2×64, 2×128, 3×256, 3×512 and 3×512 channels of 3×3 convolutions, each with batch norm and ReLU, and a
    2×2 max pool after each stage; dropout, 512 units with batch norm and ReLU, dropout; 14,991,946 parameters
    for 10 classes of RGB images up to 32×32. Dropout between the convolutions is the authors' code's, 0.3 in
    the first stage and 0.4 in the others. Takes any number of channels and any size, as `VGG16` does.
    """

    def __init__(self, channels: int = 3, size: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.stages = vgg_stages(channels, batch_norm=True, dropout=STAGE_DROPOUT)
        self.drop1 = nn.Dropout(DROPOUT)
        self.dense = nn.Sequential(_dense(vgg_features(size), 512))
        self.drop2 = nn.Dropout(DROPOUT)
        self.out = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, channels, size, size)."""
        x = self.drop1(self.stages(x).flatten(1))
        logits: Tensor = self.out(self.drop2(self.dense(x)))
        return logits
