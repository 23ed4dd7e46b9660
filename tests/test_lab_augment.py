"""Augmentation: against a loop over images, by shares, and that crops and flips occur as drawn."""

from __future__ import annotations

import pytest
import torch

from bsgap_kernels.lab.augment import AUGMENTATIONS, PADDING, Augmentation, draw
from bsgap_kernels.lab.config import UserError
from bsgap_kernels.lab.data import ImageData

SHAPE = (3, 12, 10)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(rows: int = 16) -> torch.Tensor:
    return torch.randint(1, 256, (rows, *SHAPE), dtype=torch.uint8, generator=generator(9))


def drawn(rows: int = 16, *, flip: bool = True) -> Augmentation:
    augmentation = draw("standard", rows, SHAPE, generator(), flip=flip)
    assert augmentation is not None
    return augmentation


def by_hand(image: torch.Tensor, parameters: list[int], fill: torch.Tensor | float) -> torch.Tensor:
    """Pad, cut out, flip: one image, pixel by pixel of the definition."""
    down, right, flip = parameters
    channels, height, width = image.shape
    padded = torch.empty(channels, height + 2 * PADDING, width + 2 * PADDING, dtype=image.dtype)
    padded[:] = torch.as_tensor(fill, dtype=image.dtype)
    padded[:, PADDING : PADDING + height, PADDING : PADDING + width] = image
    top, left = PADDING + down, PADDING + right
    crop = padded[:, top : top + height, left : left + width]
    return crop.flip(2) if flip else crop


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_equals_a_loop_over_images(dtype: torch.dtype, flip: bool) -> None:
    batch = images(200).to(dtype)
    fill = torch.tensor([0.0, 7.0, 200.0]).view(3, 1, 1)
    augmentation = drawn(200, flip=flip)
    result = augmentation.apply(batch, fill=fill)
    assert result.dtype == dtype
    assert result.is_contiguous()
    for row in range(200):
        expected = by_hand(batch[row], augmentation.parameters[row].tolist(), fill)
        assert torch.equal(result[row], expected)


def test_images_need_not_be_contiguous() -> None:
    batch = images()
    strided = batch.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(drawn().apply(strided), drawn().apply(batch))


def test_shares_make_up_the_whole() -> None:
    batch, augmentation = images(), drawn()
    shares = [slice(0, 5), slice(5, 6), slice(6, 16)]
    parts = [augmentation.apply(batch[share], share) for share in shares]
    assert torch.equal(torch.cat(parts), augmentation.apply(batch))


def test_a_share_of_another_size() -> None:
    with pytest.raises(ValueError, match="images: got 3 images, expected the 5 of slice"):
        drawn().apply(images(3), slice(0, 5))


def test_every_crop_occurs_and_every_second_image_is_flipped() -> None:
    parameters = drawn(4000).parameters
    shifts, counts = parameters[:, :2].unique(dim=0, return_counts=True)
    assert len(shifts) == (2 * PADDING + 1) ** 2
    assert int(shifts.abs().max()) == PADDING
    # 4000 / 81 = 49 expected, deviation 7.
    assert int(counts.min()) > 15
    assert int(counts.max()) < 90
    assert 1800 < int(parameters[:, 2].sum()) < 2200


def test_flips_are_left_out_and_the_crops_stay() -> None:
    with_flips, without = drawn().parameters, drawn(flip=False).parameters
    assert torch.equal(with_flips[:, :2], without[:, :2])
    assert not without[:, 2].any()


def test_a_batch_depends_on_the_generator_alone() -> None:
    assert torch.equal(drawn().parameters, drawn().parameters)
    other = draw("standard", 16, SHAPE, generator(1))
    assert other is not None
    assert not torch.equal(drawn().parameters, other.parameters)


def test_none_draws_nothing() -> None:
    numbers = generator()
    before = numbers.get_state()
    assert draw("none", 16, SHAPE, numbers) is None
    assert torch.equal(numbers.get_state(), before)


def test_mistakes() -> None:
    assert "standard" in AUGMENTATIONS
    with pytest.raises(UserError, match="augment: got 'cutout', expected one of none, standard"):
        draw("cutout", 16, SHAPE, generator())
    with pytest.raises(UserError, match="augment: got images of 12×4, expected more than the 4 pixels"):
        draw("standard", 16, (3, 12, 4), generator())


def data_of(batch: torch.Tensor, *, normalised: bool) -> ImageData:
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1)
    labels = torch.arange(len(batch))
    stored = (batch.float() / 255 - mean) / std if normalised else batch
    return ImageData("any", stored, labels, stored, labels, len(batch), mean=mean, std=std)


def test_padding_is_black_before_images_are_normalised() -> None:
    batch, augmentation = images(), drawn()
    rows = torch.tensor([3, 2, 11, 15])
    share = slice(4, 8)
    expected = torch.stack(
        [
            by_hand(batch[row], augmentation.parameters[4 + i].tolist(), 0)
            for i, row in enumerate(rows.tolist())
        ]
    )
    stored = data_of(batch, normalised=False)
    result, labels = stored.train(rows, augmentation, share)
    assert torch.equal(result, stored.normalised(expected))
    assert torch.equal(labels, rows)
    # Black occurs in the padding alone: the images here have none.
    assert bool((expected == 0).any())
    # Images that are stored as floating point numbers get the same black.
    floating = data_of(batch, normalised=True).train(rows, augmentation, share)[0]
    torch.testing.assert_close(floating, result)


def test_nothing_is_done_without_augmentation() -> None:
    data = data_of(images(), normalised=False)
    assert torch.equal(data.train(slice(2, 5), None)[0], data.train(torch.tensor([2, 3, 4]))[0])


@pytest.mark.gpu
def test_a_gpu_gives_the_same_images() -> None:
    batch, augmentation = images(), drawn()
    assert torch.equal(augmentation.apply(batch.cuda()).cpu(), augmentation.apply(batch))
