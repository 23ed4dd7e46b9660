"""The 8×8 digits that scikit-learn brings along."""

from __future__ import annotations

import torch

from bsgap_kernels.lab.data.images import ImageData, check_split, float_statistics
from bsgap_kernels.lab.optional import require


def load_digits() -> ImageData:
    """1437 training and 360 test images, float32 and normalised, upsampled bilinearly from 8×8 to 28×28.

    The split is 80/20, stratified, and the same always. They are held as float32 rather than uint8, since
    upsampled pixels are no integers and committed results rest on these very values.
    """
    pixels, labels = require("sklearn.datasets").load_digits(return_X_y=True)
    split = require("sklearn.model_selection").train_test_split(
        pixels.reshape(-1, 1, 8, 8), labels, test_size=0.2, stratify=labels, random_state=0
    )
    small_train, small_test = (torch.from_numpy(part).float() / 16 for part in split[:2])
    train, test = (
        torch.nn.functional.interpolate(part, size=(28, 28), mode="bilinear", align_corners=False)
        for part in (small_train, small_test)
    )
    train_labels, test_labels = (torch.from_numpy(part).long() for part in split[2:])
    check_split("digits", "training", train, train_labels, classes=10)
    check_split("digits", "test", test, test_labels, classes=10)
    mean, std = float_statistics(train)
    return ImageData(
        "digits",
        (train - mean) / std,
        train_labels,
        (test - mean) / std,
        test_labels,
        classes=10,
        mean=mean[0],
        std=std[0],
        mirrored=False,
    )
