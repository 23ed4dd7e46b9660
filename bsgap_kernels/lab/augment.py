"""Random crops and flips of a batch, drawn for the whole batch at once and applied on any device.

The parameters of a batch come from one generator on the CPU, before it is known which process or micro-batch
applies which share of it: the augmented batch is the same however it is divided, and on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bsgap_kernels.lab.checks import UserError

AUGMENTATIONS = ("none", "standard")
PADDING = 4
"""Pixels around the image out of which it is cropped: the usual choice for CIFAR."""


@dataclass(frozen=True)
class Augmentation:
    """What is done to each image of a batch.

    Attributes:
        parameters: (B, 3), int64, on the CPU: how far down and to the right of the image's corner the crop
            begins, from -PADDING to PADDING, and 1 where the crop is flipped left to right.
    """

    parameters: Tensor

    def apply(self, images: Tensor, share: slice = slice(None), *, fill: Tensor | float = 0.0) -> Tensor:
        """The images of rows `share` of the batch, each cropped, then flipped where drawn so.

        What lies outside an image is `fill`. Stored uint8 images are filled with 0: the padding is black, and
        is normalised with the rest, as by torchvision's RandomCrop followed by ToTensor and Normalize.

        Args:
            images: (B', C, H, W) of any dtype, contiguous or not; B' rows as `share` has.
            share: which rows of the batch they are.
            fill: a number or (C, 1, 1), in the units of `images`.

        Returns:
            (B', C, H, W), contiguous, of the dtype and on the device of `images`: one gather, no loop over
            images, and on a GPU no wait for it.

        Raises:
            ValueError: the share has another number of rows than there are images.
        """
        rows = self.parameters[share]
        if len(rows) != len(images):
            raise ValueError(f"images: got {len(images)} images, expected the {len(rows)} of {share}")
        batch, channels, height, width = images.shape
        down, right, flip = rows.to(images.device, non_blocking=True).unbind(1)
        across = torch.arange(width, device=images.device).expand(batch, width)
        across = torch.where(flip.bool()[:, None], width - 1 - across, across) + right[:, None]
        along = torch.arange(height, device=images.device) + down[:, None]
        inside = _within(along, height)[:, :, None] & _within(across, width)[:, None, :]
        source = along.clamp(0, height - 1)[:, :, None] * width + across.clamp(0, width - 1)[:, None, :]
        pixels = images.reshape(batch, channels, height * width)
        index = source.view(batch, 1, height * width).expand(batch, channels, height * width)
        cropped = pixels.gather(2, index).view(batch, channels, height, width)
        outside = torch.as_tensor(fill, dtype=images.dtype, device=images.device)
        return torch.where(inside[:, None], cropped, outside)


def draw(
    name: str, rows: int, image_shape: Sequence[int], generator: torch.Generator, *, flip: bool = True
) -> Augmentation | None:
    """Draw the augmentation of a batch of `rows` images, or None for `none`.

    `standard` pads by 4 pixels, crops to the old size at random and, with `flip`, flips every second image
    left to right on average.

    Args:
        name: none or standard.
        rows: images in the whole batch.
        image_shape: (C, H, W).
        generator: on the CPU; it is left alone by `none`. Flips are drawn, and dropped, without `flip` too,
            so that the crops are the same.
        flip: False for images whose mirror image is another thing, such as digits: `ImageData.mirrored`.

    Raises:
        UserError: the name is no augmentation, or an image is smaller than the padding.
    """
    if name == "none":
        return None
    if name not in AUGMENTATIONS:
        raise UserError(f"augment: got {name!r}, expected one of {', '.join(AUGMENTATIONS)}")
    if min(image_shape[-2:]) <= PADDING:
        size = "×".join(map(str, image_shape[-2:]))
        raise UserError(f"augment: got images of {size}, expected more than the {PADDING} pixels of padding")
    shifts = torch.randint(-PADDING, PADDING + 1, (rows, 2), generator=generator)
    flips = torch.randint(0, 2, (rows, 1), generator=generator)
    return Augmentation(torch.cat([shifts, flips if flip else torch.zeros_like(flips)], dim=1))


def _within(positions: Tensor, size: int) -> Tensor:
    return (positions >= 0) & (positions < size)
