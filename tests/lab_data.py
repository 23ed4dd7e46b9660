"""Small image data for the trainer's tests: quick to train on, and learnable."""

import torch

from bsgap_kernels.lab.data import ImageData


def small_data(train: int = 48, test: int = 20) -> ImageData:
    """Noisy 28×28 images whose class is where a bright bar lies."""
    generator = torch.Generator().manual_seed(7)
    labels = torch.arange(train + test) % 10
    images = 0.3 * torch.randn(train + test, 1, 28, 28, generator=generator)
    for row, label in enumerate(labels.tolist()):
        images[row, :, 2 * label + 3 : 2 * label + 6] += 2.0
    return ImageData("digits", images[:train], labels[:train], images[train:], labels[train:], classes=10)
