"""Data sets: the digits split, torchvision's file formats from small files, and what is said of bad ones."""

import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from bsgap_kernels.lab.config import UserError
from bsgap_kernels.lab.data import load_data

MNIST_SETS = (("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST"))
CIFAR_SETS = (("cifar10", "CIFAR10"), ("cifar100", "CIFAR100"))


def write_idx(path: Path, array: np.ndarray) -> None:
    path.write_bytes(struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes())


def write_mnist(root: Path, folder: str, train: int = 30, test: int = 10) -> Path:
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for prefix, rows in (("train", train), ("t10k", test)):
        write_idx(raw / f"{prefix}-images-idx3-ubyte", rng.integers(0, 256, (rows, 28, 28), dtype=np.uint8))
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", (np.arange(rows) % 10).astype(np.uint8))
    return raw


def write_cifar(root: Path, name: str, monkeypatch: pytest.MonkeyPatch, rows: int = 10) -> Path:
    """Small pickles in the true layout; torchvision's list of MD5 sums is set to theirs."""
    datasets = pytest.importorskip("torchvision.datasets")
    dataset = getattr(datasets, name)
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    label_key, classes = ("labels", 10) if name == "CIFAR10" else ("fine_labels", 100)

    def write(file: str, content: dict[str, object]) -> str:
        (folder / file).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / file).read_bytes()).hexdigest()

    for attribute in ("train_list", "test_list"):
        sums = []
        for file, _ in getattr(dataset, attribute):
            images = rng.integers(0, 256, (rows, 3072), dtype=np.uint8)
            sums.append([file, write(file, {"data": images, label_key: [i % classes for i in range(rows)]})])
        monkeypatch.setattr(dataset, attribute, sums)
    names = {dataset.meta["key"]: [str(i) for i in range(classes)]}
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": write(dataset.meta["filename"], names)})
    return folder


def test_digits_split_is_fixed_stratified_and_normalised() -> None:
    data = load_data("digits")
    assert data.train_images.shape == (1437, 1, 28, 28)
    assert data.test_images.shape == (360, 1, 28, 28)
    assert data.train_images.dtype == torch.float32
    assert abs(float(data.train_images.mean())) < 1e-4
    assert abs(float(data.train_images.std()) - 1) < 1e-4
    share = torch.bincount(data.test_labels) / torch.bincount(
        torch.cat([data.train_labels, data.test_labels])
    )
    assert ((share - 0.2).abs() < 0.01).all()
    again = load_data("digits")
    assert torch.equal(data.train_images, again.train_images)
    assert torch.equal(data.probe(100), again.probe(512)[:100])


def test_probe_larger_than_the_training_set() -> None:
    with pytest.raises(
        UserError, match="probe_size: got 1438, expected at most the 1437 training images of digits"
    ):
        load_data("digits").probe(1438)


@pytest.mark.parametrize(("name", "folder"), MNIST_SETS)
def test_mnist_files(name: str, folder: str, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    raw = write_mnist(tmp_path, folder)
    data = load_data(name, tmp_path)
    assert data.train_images.shape == (30, 1, 28, 28)
    assert data.test_labels.tolist() == list(range(10))
    pixels = np.frombuffer((raw / "train-images-idx3-ubyte").read_bytes()[16:], np.uint8).reshape(30, 28, 28)
    correlation = np.corrcoef(pixels.ravel(), data.train_images.numpy().ravel())[0, 1]
    assert correlation > 1 - 1e-6


@pytest.mark.parametrize(("name", "dataset"), CIFAR_SETS)
def test_cifar_files(name: str, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, dataset, monkeypatch)
    data = load_data(name, tmp_path)
    assert data.train_images.shape == (50 if name == "cifar10" else 10, 3, 32, 32)
    assert data.classes == (10 if name == "cifar10" else 100)
    torch.testing.assert_close(data.train_images.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100"])
def test_missing_root_says_path_and_tree(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    root = tmp_path / "nowhere"
    with pytest.raises(UserError) as caught:
        load_data(name, root)
    assert str(root) in str(caught.value)
    expected = {"mnist": "MNIST/raw/", "fashion-mnist": "FashionMNIST/raw/t10k-labels-idx1-ubyte"}
    tree = {**expected, "cifar10": "cifar-10-batches-py/data_batch_5", "cifar100": "cifar-100-python/train"}
    assert tree[name] in str(caught.value)


def test_missing_file_and_packed_file(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    raw = write_mnist(tmp_path, "MNIST")
    (raw / "t10k-labels-idx1-ubyte").rename(raw / "t10k-labels-idx1-ubyte.gz")
    with pytest.raises(
        UserError, match=r"found no MNIST/raw/t10k-labels-idx1-ubyte.*unpack .*ubyte\.gz first"
    ):
        load_data("mnist", tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 6, 16, 1000])
def test_truncated_mnist_file_is_named(keep: int, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    path = write_mnist(tmp_path, "MNIST") / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        UserError, match=r"train-images-idx3-ubyte: the file is .*corrupt.*delete it and unpack"
    ):
        load_data("mnist", tmp_path)


def test_mnist_file_that_is_something_else(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    path = write_mnist(tmp_path, "MNIST") / "t10k-labels-idx1-ubyte"
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte: the file is corrupt"):
        load_data("mnist", tmp_path)


def test_labels_that_do_not_fit(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    raw = write_mnist(tmp_path, "MNIST")
    write_idx(raw / "train-labels-idx1-ubyte", np.zeros(29, dtype=np.uint8))
    with pytest.raises(UserError, match="has 30 images but 29 labels"):
        load_data("mnist", tmp_path)
    write_idx(raw / "train-labels-idx1-ubyte", np.full(30, 10, dtype=np.uint8))
    with pytest.raises(UserError, match="labels of mnist run from 10 to 10, expected 0 to 9"):
        load_data("mnist", tmp_path)


@pytest.mark.parametrize(("name", "dataset"), CIFAR_SETS)
def test_corrupt_cifar_file_is_named(
    name: str, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = "data_batch_3" if name == "cifar10" else "train"
    path = write_cifar(tmp_path, dataset, monkeypatch) / file
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=rf"{file}: the file is truncated or corrupt \(MD5 .*unpack cifar-10"):
        load_data(name, tmp_path)
