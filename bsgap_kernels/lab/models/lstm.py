"""An LSTM that reads an image row by row."""

from __future__ import annotations

from torch import Tensor, nn


class RowLSTM(nn.Module):
    """One LSTM layer of 128 units over the rows of an image, then a hidden layer of 128 units with ReLU.

    Ours: a recurrent network for methods whose sources train those (LEGW, arXiv 1901.08256). A step's input
    is one row of all channels. The last hidden state goes to the hidden layer, whose ReLU is the tracker's
    site: what is inside the LSTM is one operation. Weights are PyTorch's defaults, uniform up to 1/√128 in
    the LSTM. 98,698 parameters for 10 classes of 28×28 images in grey; takes any number of channels and any
    size.
    """

    def __init__(self, channels: int = 1, size: int = 28, classes: int = 10) -> None:
        super().__init__()
        self.lstm = nn.LSTM(channels * size, 128, batch_first=True)
        self.fc1 = nn.Linear(128, 128)
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, channels, size, size)."""
        rows = x.transpose(1, 2).flatten(2)
        hidden: Tensor = self.lstm(rows)[0][:, -1]
        logits: Tensor = self.fc2(self.relu1(self.fc1(hidden)))
        return logits
