"""Data sets: the digits split, torchvision's file formats from small files, and what is said of bad ones."""

import dataclasses
import gzip
import hashlib
import pickle
import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

from bsgap_kernels.lab.config import UserError
from bsgap_kernels.lab.data import ImageData, load_data

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


def pack_mnist(raw: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Archives beside the files; torchvision's list of MD5 sums is set to theirs."""
    dataset = getattr(pytest.importorskip("torchvision.datasets"), name)
    sums = []
    for file, _ in dataset.resources:
        packed = gzip.compress((raw / file.removesuffix(".gz")).read_bytes(), mtime=0)
        (raw / file).write_bytes(packed)
        sums.append((file, hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(dataset, "resources", sums)


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
    assert not data.synthetic
    assert not data.mirrored


def test_digits_are_stored_as_they_are_read() -> None:
    data = load_data("digits")
    rows = torch.tensor([3, 1400, 7])
    assert torch.equal(data.train(rows)[0], data.train_images[rows])
    assert torch.equal(data.test(slice(5, 9))[0], data.test_images[5:9])
    assert torch.equal(data.test(slice(5, 9))[1], data.test_labels[5:9])
    # The digits' background is 0 before it is normalised.
    assert torch.equal(data.black, data.train_images.min().reshape(1, 1, 1))


def byte_images() -> ImageData:
    images = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).reshape(2, 3, 4, 5)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)
    return ImageData("cifar10", images, torch.tensor([4, 2]), images[:1], torch.tensor([1]), 5, mean, std)


def test_bytes_are_normalised_where_they_are_read() -> None:
    data = byte_images()
    images, labels = data.train(torch.tensor([1, 0, 1]))
    assert images.dtype == torch.float32
    assert labels.tolist() == [2, 4, 2]
    for channel, (mean, std) in enumerate(((0.1, 1.0), (0.2, 2.0), (0.3, 4.0))):
        expected = (data.train_images[[1, 0, 1], channel].double() / 255 - mean) / std
        torch.testing.assert_close(images[:, channel].double(), expected, atol=1e-6, rtol=0)
    assert data.train_images.dtype == torch.uint8
    assert data.image_shape == (3, 4, 5)
    probe, whole = ({tuple(image.ravel().tolist()) for image in part} for part in (data.probe(2), images[:2]))
    assert probe == whole
    assert data.black == 0


def test_bytes_need_mean_and_deviation() -> None:
    with pytest.raises(ValueError, match="mean, std: got none"):
        dataclasses.replace(byte_images(), std=None)


def test_data_on_another_device() -> None:
    moved = byte_images().to("meta")
    tensors = [getattr(moved, field.name) for field in dataclasses.fields(moved)]
    assert sum(isinstance(value, torch.Tensor) for value in tensors) == 6
    assert {value.device.type for value in tensors if isinstance(value, torch.Tensor)} == {"meta"}
    assert moved.train(slice(0, 1))[0].device.type == "meta"
    assert moved.name == "cifar10"


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
    assert data.test_labels.tolist() == list(range(10))
    pixels = np.frombuffer((raw / "train-images-idx3-ubyte").read_bytes()[16:], np.uint8)
    assert np.array_equal(data.train_images, pixels.reshape(30, 1, 28, 28))
    assert data.train_images.dtype == torch.uint8
    expected = torch.tensor([pixels.mean() / 255, pixels.std(ddof=1) / 255])
    torch.testing.assert_close(torch.stack([data.mean, data.std]).ravel(), expected.float())
    # A digit in the mirror is no digit; a shirt is a shirt.
    assert data.mirrored == (name == "fashion-mnist")


@pytest.mark.parametrize(("name", "dataset"), CIFAR_SETS)
def test_cifar_files(name: str, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_cifar(tmp_path, dataset, monkeypatch)
    data = load_data(name, tmp_path)
    assert data.train_images.shape == (50 if name == "cifar10" else 10, 3, 32, 32)
    assert data.classes == (10 if name == "cifar10" else 100)
    first = pickle.loads((folder / ("data_batch_1" if name == "cifar10" else "train")).read_bytes())["data"]
    assert np.array_equal(data.train_images[:10], first.reshape(10, 3, 32, 32))
    images = data.train(slice(None))[0]
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.ones(3), atol=1e-5, rtol=0)


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


def test_mnist_files_of_another_set(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    path = write_mnist(tmp_path, "MNIST") / "t10k-images-idx3-ubyte"
    write_idx(path, np.zeros((10, 32, 32), np.uint8))
    with pytest.raises(
        UserError,
        match=r"t10k-images-idx3-ubyte: the file is another one \(images of 32×32, expected 28×28\)",
    ):
        load_data("mnist", tmp_path)


@pytest.mark.parametrize(("name", "folder"), MNIST_SETS)
def test_mnist_files_are_those_of_their_archives(
    name: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = write_mnist(tmp_path, folder)
    pack_mnist(raw, folder, monkeypatch)
    data = load_data(name, tmp_path)
    path = raw / "train-images-idx3-ubyte"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        UserError,
        match=r"train-images-idx3-ubyte: the file is not what train-images-idx3-ubyte.gz holds; delete it",
    ):
        load_data(name, tmp_path)
    # Without the archive nothing tells the two apart.
    path.with_name(path.name + ".gz").unlink()
    assert int((load_data(name, tmp_path).train_images != data.train_images).sum()) == 1


def test_mnist_archive_that_is_not_the_published_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = write_mnist(tmp_path, "MNIST")
    pack_mnist(raw, "MNIST", monkeypatch)
    archive = raw / "t10k-labels-idx1-ubyte.gz"
    archive.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(
        UserError, match=r"t10k-labels-idx1-ubyte.gz: the file is truncated.*MD5 .*delete it and download it"
    ):
        load_data("mnist", tmp_path)


def test_mnist_archive_that_cannot_be_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = write_mnist(tmp_path, "MNIST")
    pack_mnist(raw, "MNIST", monkeypatch)
    datasets = pytest.importorskip("torchvision.datasets")
    name = "t10k-labels-idx1-ubyte.gz"
    cut = (raw / name).read_bytes()[:-6]
    (raw / name).write_bytes(cut)
    sums = {**dict(datasets.MNIST.resources), name: hashlib.md5(cut).hexdigest()}
    monkeypatch.setattr(datasets.MNIST, "resources", list(sums.items()))
    with pytest.raises(UserError, match=rf"{name}: could not be unpacked: "):
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
    with pytest.raises(
        UserError, match=rf"{file}: the file is truncated, corrupt or another one \(MD5 .*unpack cifar"
    ):
        load_data(name, tmp_path)


@pytest.mark.parametrize(("name", "dataset"), CIFAR_SETS)
def test_no_foreign_pickle_is_opened(
    name: str, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "opened",)

    folder = write_cifar(tmp_path, dataset, monkeypatch)
    meta = "batches.meta" if name == "cifar10" else "meta"
    (folder / meta).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match=rf"{meta}: the file is truncated, corrupt or another one"):
        load_data(name, tmp_path)
    assert not (tmp_path / "opened").exists()
    pickle.loads((folder / meta).read_bytes())
    assert (tmp_path / "opened").exists()  # else the trap could not have sprung


def test_cifar_pickle_that_torchvision_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_cifar(tmp_path, "CIFAR10", monkeypatch)
    datasets = pytest.importorskip("torchvision.datasets")
    (folder / "test_batch").write_bytes(pickle.dumps({"images": []}))
    found = hashlib.md5((folder / "test_batch").read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", found]])
    with pytest.raises(UserError, match="data: torchvision could not read cifar10: "):
        load_data("cifar10", tmp_path)


def test_unknown_set() -> None:
    with pytest.raises(UserError, match="data: got 'imagenet', expected one of digits, procedural, mnist"):
        load_data("imagenet")
    with pytest.raises(UserError, match="data_root: got none, expected the directory"):
        load_data("mnist")


# -- downloads, by torchvision's own code with its last step replaced


def refuse(*arguments: object, **options: object) -> None:
    raise URLError("no such host")


@pytest.mark.parametrize(("name", "dataset"), MNIST_SETS + CIFAR_SETS)
def test_nothing_is_downloaded_unasked(
    name: str, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchvision.datasets")
    asked: list[object] = []
    for module in ("mnist", "cifar"):
        monkeypatch.setattr(
            f"torchvision.datasets.{module}.download_and_extract_archive", lambda *a, **_: asked.append(a)
        )
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="or give --download"):
            load_data(name, root)
    assert not asked
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "dataset"), MNIST_SETS + CIFAR_SETS)
def test_failed_download_says_why_and_what_to_do_by_hand(
    name: str, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchvision.datasets")
    for module in ("mnist", "cifar"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", refuse)
    with pytest.raises(UserError) as caught:
        load_data(name, tmp_path / "new", download=True)
    message = str(caught.value)
    assert message.startswith(f"data: the download of {name} failed (")
    assert "no such host" in message
    by_hand = {
        "mnist": f"unpack them (gunzip -k) in {tmp_path / 'new' / 'MNIST' / 'raw'}",
        "fashion-mnist": f"unpack them (gunzip -k) in {tmp_path / 'new' / 'FashionMNIST' / 'raw'}",
        "cifar10": "unpack it (tar -xzf cifar-10-python.tar.gz)",
        "cifar100": "unpack it (tar -xzf cifar-100-python.tar.gz)",
    }
    assert by_hand[name] in message


def test_download_into_a_root_that_cannot_be_made(tmp_path: Path) -> None:
    pytest.importorskip("torchvision.datasets")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data: the download of mnist failed \(.*file"):
        load_data("mnist", tmp_path / "file" / "root", download=True)


def test_download_of_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process fetches, under a lock; the files are then checked like any others."""
    fcntl = pytest.importorskip("fcntl")
    source = write_mnist(tmp_path / "source", "MNIST")
    pack_mnist(source, "MNIST", monkeypatch)
    root = tmp_path / "root"
    fetched = []

    def fetch(url: str, download_root: str, filename: str, md5: str) -> None:
        with (root / ".download.lock").open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for name in (filename, filename.removesuffix(".gz")):
            Path(download_root, name).write_bytes((source / name).read_bytes())
        fetched.append(filename)

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", fetch)
    data = load_data("mnist", root, download=True)
    assert len(fetched) == 4
    assert torch.equal(data.train_images, load_data("mnist", tmp_path / "source").train_images)
    load_data("mnist", root, download=True)
    load_data("mnist", root)
    assert len(fetched) == 4
    path = root / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="train-labels-idx1-ubyte: the file is truncated"):
        load_data("mnist", root, download=True)


def test_download_of_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_cifar(tmp_path / "source", "CIFAR10", monkeypatch)
    root = tmp_path / "root"

    def fetch(url: str, download_root: str, filename: str, md5: str) -> None:
        target = Path(download_root) / folder.name
        target.mkdir()
        for path in folder.iterdir():
            (target / path.name).write_bytes(path.read_bytes())

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fetch)
    data = load_data("cifar10", root, download=True)
    assert torch.equal(data.train_images, load_data("cifar10", tmp_path / "source").train_images)
