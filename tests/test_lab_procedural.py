"""The procedural set: the same from any chunk and for any size, what its options do, what it hides."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import procedural_pilot
import pytest
import torch

from bsgap_kernels.lab.data import load_data, procedural
from bsgap_kernels.lab.data.images import ImageData
from bsgap_kernels.lab.data_options import MAX_PROCEDURAL_CLASSES, ProceduralOptions


def drawn(**options: object) -> ImageData:
    return load_data("procedural", options=ProceduralOptions(**{"train": 60, "test": 40, **options}))


def test_shapes_and_classes() -> None:
    data = drawn(train=205, classes=7)
    assert data.train_images.shape == (205, 3, 32, 32)
    assert data.test_images.shape == (40, 3, 32, 32)
    assert data.train_images.dtype == data.test_images.dtype == torch.uint8
    assert data.train_labels.dtype == torch.int64
    assert data.synthetic
    assert data.mirrored
    assert data.classes == 7
    counts = torch.bincount(data.train_labels)
    assert len(counts) == 7
    assert int(counts.max() - counts.min()) == 1
    images = data.train(slice(None))[0]
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)


def test_options_may_be_a_mapping() -> None:
    options = {"train": 30, "test": 20, "seed": 3}
    assert torch.equal(
        load_data("procedural", options=options).train_images,
        drawn(train=30, test=20, seed=3).train_images,
    )


def test_bytes_are_those_that_results_were_measured_on() -> None:
    data = drawn(train=200, test=100, classes=MAX_PROCEDURAL_CLASSES, difficulty=1.0, label_noise=0.3)
    parts = (data.train_images, data.train_labels, data.test_images, data.test_labels)
    digest = hashlib.sha256(b"".join(part.numpy().astype("<i8").tobytes() for part in parts)).hexdigest()
    assert digest == "46012649f404722ac7c9adf62f79f7e0d149961a22bab0323413140086b3e0fa"


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_images_do_not_depend_on_the_chunk(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = drawn(label_noise=0.5)
    monkeypatch.setattr(procedural, "_CHUNK", chunk)
    again = drawn(label_noise=0.5)
    assert torch.equal(again.train_images, whole.train_images)
    assert torch.equal(again.test_images, whole.test_images)
    assert torch.equal(again.train_labels, whole.train_labels)


def test_a_larger_set_begins_with_the_smaller() -> None:
    small, large = drawn(label_noise=0.2), drawn(train=130, test=90, label_noise=0.2)
    assert torch.equal(large.train_images[:60], small.train_images)
    assert torch.equal(large.train_labels[:60], small.train_labels)
    assert torch.equal(large.test_images[:40], small.test_images)


def test_splits_and_seeds_differ() -> None:
    sets = [drawn(seed=seed) for seed in (0, 1, 2**63 - 1)]
    images = torch.cat([part for data in sets for part in (data.train_images, data.test_images)])
    assert len(images.flatten(1).unique(dim=0)) == 300


def test_label_noise_is_symmetric_and_of_training_labels_alone() -> None:
    clean, noisy = drawn(train=9000), drawn(train=9000, label_noise=0.3)
    assert torch.equal(clean.train_images, noisy.train_images)
    assert torch.equal(clean.test_labels, noisy.test_labels)
    assert torch.equal(clean.train_labels, torch.arange(9000) % 10)
    step = (noisy.train_labels - clean.train_labels) % 10
    counts = torch.bincount(step, minlength=10)
    # 2700 labels replaced, deviation 44; 300 by each of the nine others, deviation 17.
    assert 2500 < 9000 - int(counts[0]) < 2900
    assert int(counts[1:].min()) > 230
    assert int(counts[1:].max()) < 370


def test_difficulty_moves_what_says_nothing_of_the_class() -> None:
    """Without difficulty all that differs is colour, size and phase: objects lie in the middle, unturned."""
    easy = drawn(difficulty=0.0).train_images.float()
    assert float(easy[:, :, :2, :2].std((2, 3)).max()) == 0
    spread = [
        float(drawn(difficulty=d).train_images[:, :, :4, :4].float().std((2, 3)).mean()) for d in (0.5, 1, 2)
    ]
    assert spread == sorted(spread)
    assert spread[0] > 1


@pytest.mark.parametrize("difficulty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("classes", [2, 3, MAX_PROCEDURAL_CLASSES])
def test_any_options_draw_images(classes: int, difficulty: float) -> None:
    data = drawn(train=2 * classes, classes=classes, difficulty=difficulty)
    assert float(data.train_images.float().std((1, 2, 3)).min()) > 5


def test_classes_are_pairs_that_share_shapes_and_textures() -> None:
    for classes in (10, 16, 37, MAX_PROCEDURAL_CLASSES):
        names = procedural.class_names(classes)
        assert len(set(names)) == classes
        textures, shapes = zip(*(name.split(" ", 1) for name in names), strict=True)
        assert min(shapes.count(shape) for shape in shapes) > 1
        assert max(shapes.count(shape) for shape in shapes) < classes
        assert max(textures.count(texture) for texture in textures) < classes


def plane() -> tuple[np.ndarray, np.ndarray]:
    axis = np.linspace(-1.5, 1.5, 61, dtype=np.float32)
    return np.broadcast_to(axis, (61, 61)), np.broadcast_to(axis[:, None], (61, 61))


def test_shapes_are_their_own_mirror_image_and_no_two_are_alike() -> None:
    u, v = plane()
    inside = {name: shape(u, v) < 0 for name, shape in procedural.SHAPES.items()}
    for name, shape in procedural.SHAPES.items():
        assert np.array_equal(shape(-u, v), shape(u, v))
        others = [np.mean(inside[name] != inside[other]) for other in inside if other != name]
        assert min(others) > 0.04, name
        assert inside[name].mean() > 0.15


def test_textures_are_their_own_mirror_image_and_no_two_are_alike() -> None:
    u, v = (1.7 * axis for axis in plane())
    fields = {name: texture(u, v) for name, texture in procedural.TEXTURES.items()}
    for name, texture in procedural.TEXTURES.items():
        mirrored = texture(-u, v)
        # Or with the two colours swapped, which say nothing of the class.
        assert np.allclose(mirrored, fields[name]) or np.allclose(mirrored, 1 - fields[name]), name
        assert float(fields[name].min()) >= 0
        assert float(fields[name].max()) <= 1
        others = [np.abs(fields[name] - fields[other]).mean() for other in fields if other != name]
        assert min(others) > 0.2, name


def test_colours_and_positions_tell_nothing_of_the_class() -> None:
    """Nearest class mean on pixels averaged over the image, and on the brightness of every place."""
    data = drawn(train=3000, test=1500)
    for reduce in (lambda x: x.mean((2, 3)), lambda x: x.mean(1).flatten(1)):
        train, test = (reduce(part.float()) for part in (data.train_images, data.test_images))
        means = torch.stack([train[data.train_labels == label].mean(0) for label in range(10)])
        right = (torch.cdist(test, means).argmin(1) == data.test_labels).float().mean()
        # Chance is 10 %, deviation 0.8 %.
        assert float(right) < 0.16


def test_contact_sheet_has_a_column_a_class() -> None:
    options = ProceduralOptions(classes=5, seed=2)
    sheet = procedural.contact_sheet(options, rows=3)
    assert sheet.shape == (96, 160, 3)
    assert sheet.dtype == np.uint8
    data = drawn(train=15, classes=5, seed=2)
    assert np.array_equal(sheet[32:64, 64:96], data.train_images[7].permute(1, 2, 0))


def test_the_pilot_is_what_the_page_says_and_set_the_default() -> None:
    result = json.loads(procedural_pilot.RESULT.read_text(encoding="utf-8"))
    text = procedural_pilot.PAGE.read_text(encoding="utf-8")
    assert procedural_pilot.page(result, text) == text
    default = [row for row in result["runs"] if row["difficulty"] == ProceduralOptions().difficulty]
    assert len({row["seed"] for row in default}) >= 3
    for row in default:
        assert row["seed"] >= 1000
        assert 0.7 < row["cnn"]["test_accuracy"] < 0.9
        assert row["linear"]["test_accuracy"] < 0.2
        assert row["cnn"]["train_accuracy"] > row["cnn"]["test_accuracy"] + 0.1
