"""Image data as two tensors a split: digits from scikit-learn, the rest from torchvision's files on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bsgap_kernels.lab.config import UserError
from bsgap_kernels.lab.optional import require

# The rows of the probe batch depend on this alone, so every run of every sweep reads the same images.
_PROBE_SEED = 20221012

_MNIST_FILES = (
    ("train-images-idx3-ubyte", 3),
    ("train-labels-idx1-ubyte", 1),
    ("t10k-images-idx3-ubyte", 3),
    ("t10k-labels-idx1-ubyte", 1),
)


@dataclass(frozen=True)
class ImageData:
    """A data set in memory: images (N, channels, size, size) float32, normalised; labels (N,) int64."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int

    def to(self, device: torch.device) -> ImageData:
        """The same data on another device."""
        return dataclasses.replace(
            self,
            train_images=self.train_images.to(device),
            train_labels=self.train_labels.to(device),
            test_images=self.test_images.to(device),
            test_labels=self.test_labels.to(device),
        )

    def probe(self, size: int) -> Tensor:
        """The fixed probe batch: `size` training images, the same for every run."""
        total = len(self.train_images)
        if size > total:
            raise UserError(
                f"probe_size: got {size}, expected at most the {total} training images of {self.name}"
            )
        order = torch.randperm(total, generator=torch.Generator().manual_seed(_PROBE_SEED))
        return self.train_images[order[:size].to(self.train_images.device)]


def load_data(name: str, data_root: str | os.PathLike[str] | None = None) -> ImageData:
    """Load a data set; nothing is ever downloaded.

    Every channel is shifted and scaled to mean 0 and standard deviation 1 over the training images. `digits`
    is split 80/20 (1437 / 360, stratified, the same split always) and upsampled from 8×8 to 28×28.

    Raises:
        UserError: the data root or a file is missing, truncated or corrupt; the message names the path.
    """
    if name == "digits":
        return _digits()
    if data_root is None:
        raise UserError(
            f"data_root: got none, expected the directory that holds torchvision's files of {name}"
        )
    root = Path(data_root).expanduser()
    loaders = {"mnist": _mnist, "fashion-mnist": _mnist, "cifar10": _cifar, "cifar100": _cifar}
    return loaders[name](name, root)


def _digits() -> ImageData:
    pixels, labels = require("sklearn.datasets").load_digits(return_X_y=True)
    split = require("sklearn.model_selection").train_test_split(
        pixels.reshape(-1, 1, 8, 8), labels, test_size=0.2, stratify=labels, random_state=0
    )
    small_train, small_test = (torch.from_numpy(part).float() / 16 for part in split[:2])
    train, test = (
        torch.nn.functional.interpolate(part, size=(28, 28), mode="bilinear", align_corners=False)
        for part in (small_train, small_test)
    )
    return _normalised(
        "digits", train, torch.from_numpy(split[2]), test, torch.from_numpy(split[3]), classes=10
    )


def _mnist(name: str, root: Path) -> ImageData:
    datasets = require("torchvision.datasets")
    dataset = datasets.MNIST if name == "mnist" else datasets.FashionMNIST
    folder = root / dataset.__name__ / "raw"
    _require([folder / file for file, _ in _MNIST_FILES], name, root)
    for file, ndim in _MNIST_FILES:
        _check_idx(folder / file, ndim)
    train, test = (_read(name, partial(dataset, str(root), train=train)) for train in (True, False))
    return _normalised(
        name,
        train.data.unsqueeze(1).float() / 255,
        train.targets,
        test.data.unsqueeze(1).float() / 255,
        test.targets,
        10,
    )


def _cifar(name: str, root: Path) -> ImageData:
    datasets = require("torchvision.datasets")
    dataset = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    folder = root / dataset.base_folder
    listed = [*dataset.train_list, *dataset.test_list, [dataset.meta["filename"], dataset.meta["md5"]]]
    _require([folder / file for file, _ in listed], name, root)
    for file, expected in listed:
        # torchvision makes the same check, but its message names neither the file nor what to do.
        found = hashlib.md5((folder / file).read_bytes(), usedforsecurity=False).hexdigest()
        if found != expected:
            raise UserError(
                f"{folder / file}: the file is truncated or corrupt (MD5 {found}, expected {expected}); "
                f"delete it and unpack {dataset.filename} again in {root}"
            )
    train, test = (_read(name, partial(dataset, str(root), train=train)) for train in (True, False))
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).float() / 255 for part in (train, test)]
    labels = [torch.tensor(part.targets) for part in (train, test)]
    return _normalised(name, images[0], labels[0], images[1], labels[1], classes=len(train.classes))


def _require(paths: list[Path], name: str, root: Path) -> None:
    tree = ", ".join(str(path.relative_to(root)) for path in paths)
    if not root.is_dir():
        raise UserError(
            f"data_root: looked at {root} and found no such directory; {name} expects in it: {tree}"
        )
    missing = [path for path in paths if not path.is_file()]
    if missing:
        zipped = [path for path in missing if path.with_name(path.name + ".gz").is_file()]
        hint = f"; unpack {zipped[0]}.gz first (gunzip -k)" if zipped else ""
        raise UserError(
            f"data_root: looked at {root} and found no {missing[0].relative_to(root)}; expected: {tree}{hint}"
        )


def _check_idx(path: Path, ndim: int) -> None:
    """Compare an IDX file's header (magic number, then one big-endian size a dimension) with its length."""
    with path.open("rb") as file:
        header = file.read(4 * (1 + ndim))
    length = path.stat().st_size
    fix = "delete it and unpack its .gz archive again"
    # Third byte 8: unsigned bytes; fourth byte: the number of dimensions.
    if header[:4] != bytes((0, 0, 8, ndim)):
        raise UserError(
            f"{path}: the file is corrupt (no IDX header of unsigned bytes in {ndim} dimensions); {fix}"
        )
    expected = len(header)
    if len(header) == 4 * (1 + ndim):
        sizes = [int.from_bytes(header[4 * i : 4 * i + 4], "big") for i in range(1, ndim + 1)]
        payload = 1
        for size in sizes:
            payload *= size
        expected += payload
    if len(header) < 4 * (1 + ndim) or length != expected:
        raise UserError(
            f"{path}: the file is truncated or corrupt ({length} bytes, expected {expected}); {fix}"
        )


def _read(name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:
        # The checks above have passed, so this is a file that is consistent and still not what torchvision
        # reads.
        raise UserError(f"data: torchvision could not read {name}: {' '.join(str(error).split())}") from error


def _normalised(
    name: str, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int
) -> ImageData:
    for split, images, labels in (("training", train, train_labels), ("test", test, test_labels)):
        if len(images) == 0:
            raise UserError(f"data: the {split} set of {name} is empty, expected at least one image")
        if len(images) != len(labels):
            raise UserError(
                f"data: the {split} set of {name} has {len(images)} images but {len(labels)} labels"
            )
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            raise UserError(f"data: labels of {name} run from {low} to {high}, expected 0 to {classes - 1}")
    mean = train.mean((0, 2, 3), keepdim=True)
    std = train.std((0, 2, 3), keepdim=True).clamp_min(1e-6)
    return ImageData(
        name, (train - mean) / std, train_labels.long(), (test - mean) / std, test_labels.long(), classes
    )
