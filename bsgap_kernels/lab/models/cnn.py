"""A small convolutional network of our own."""

from __future__ import annotations

from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Three convolutions and one hidden linear layer: ours, for studies that train many networks on a CPU.

    3×3 convolutions of 16, 32 and 64 channels, each with stride 2 in the place of a pool, so that the first
    layer, on the most pixels, costs little; 64 hidden units; no batch norm, so that a row's activation does
    not depend on the rest of its batch. Weights are PyTorch's defaults. 89,834 parameters for 10 classes of
    32×32 RGB images; takes any number of channels and any size.
    """

    def __init__(self, channels: int = 3, size: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, stride=2, padding=1)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.relu3 = nn.ReLU()
        side = -(-size // 8)
        self.fc1 = nn.Linear(64 * side * side, 64)
        self.relu4 = nn.ReLU()
        self.fc2 = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, channels, size, size)."""
        x = self.relu1(self.conv1(x))
        x = self.relu2(self.conv2(x))
        x = self.relu3(self.conv3(x))
        logits: Tensor = self.fc2(self.relu4(self.fc1(x.flatten(1))))
        return logits
