"""LeNet-5."""

from __future__ import annotations

from torch import Tensor, nn

from bsgap_kernels.lab.checks import UserError


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
