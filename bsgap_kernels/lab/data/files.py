"""MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100 from the files that torchvision keeps under a root.

Every file is checked before it is read. Published are the MD5 sums of CIFAR's files, and of the archives of
MNIST's: those are compared with what was unpacked from them, where they lie beside it.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bsgap_kernels.lab.checks import UserError
from bsgap_kernels.lab.data.images import ImageData, byte_data
from bsgap_kernels.lab.optional import require

_TORCHVISION_NAMES = {
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
}
_MNIST_FILES = {
    "train-images-idx3-ubyte": (28, 28),
    "train-labels-idx1-ubyte": (),
    "t10k-images-idx3-ubyte": (28, 28),
    "t10k-labels-idx1-ubyte": (),
}
"""Shape of one entry, by file; the names end in the number of dimensions."""
_CHUNK = 2**20


def load_files(name: str, root: Path, *, download: bool = False) -> ImageData:
    """A data set from torchvision's files under `root`, as uint8.

    With `download`, torchvision fetches them first unless all are there. Processes that share the root wait
    for the one that fetches (on systems with flock).

    Raises:
        UserError: a file is missing, truncated, foreign or corrupt, or the download failed.
    """
    dataset = getattr(require("torchvision.datasets"), _TORCHVISION_NAMES[name])
    mnist = name in ("mnist", "fashion-mnist")
    if mnist:
        paths = [root / dataset.__name__ / "raw" / file for file in _MNIST_FILES]
    else:
        files = [file for file, _ in (*dataset.train_list, *dataset.test_list)]
        paths = [root / dataset.base_folder / file for file in (*files, dataset.meta["filename"])]
    if download:
        _download(name, dataset, root, paths)
    _require(paths, name, root)
    return _mnist(name, dataset, paths) if mnist else _cifar(name, dataset, root)


def _mnist(name: str, dataset: Any, paths: list[Path]) -> ImageData:
    sums = dict(dataset.resources)
    parts = []
    for path in paths:
        part = _read_idx(path, _MNIST_FILES[path.name])
        archive = path.with_name(path.name + ".gz")
        if archive.is_file() and archive.name in sums:
            _check_archive(archive, sums[archive.name], path)
        parts.append(part)
    train, train_labels, test, test_labels = parts
    # The mirror image of a digit is no digit; that of a shirt is a shirt.
    mirrored = name != "mnist"
    return byte_data(
        name, train.unsqueeze(1), train_labels, test.unsqueeze(1), test_labels, 10, mirrored=mirrored
    )


def _cifar(name: str, dataset: Any, root: Path) -> ImageData:
    meta = [dataset.meta["filename"], dataset.meta["md5"]]
    for file, expected in [*dataset.train_list, *dataset.test_list, meta]:
        # torchvision makes the same check, but its message names neither the file nor what to do. They are
        # pickles, which can run anything: none is opened before its sum is right.
        path = root / dataset.base_folder / file
        found = _md5(path)
        if found != expected:
            raise UserError(
                f"{path}: the file is truncated, corrupt or another one (MD5 {found}, expected {expected}); "
                f"delete it and unpack {dataset.filename} again in {root}"
            )
    try:
        train, test = (dataset(str(root), train=train) for train in (True, False))
        images = [torch.from_numpy(part.data).permute(0, 3, 1, 2) for part in (train, test)]
        labels = [torch.tensor(part.targets) for part in (train, test)]
    except Exception as error:
        # Files with the right sums that this torchvision cannot read, whatever it makes of them.
        raise UserError(f"data: torchvision could not read {name}: {_sentence(error)}") from error
    return byte_data(name, images[0], labels[0], images[1], labels[1], len(train.classes))


# -- what is there


def _require(paths: list[Path], name: str, root: Path) -> None:
    tree = ", ".join(str(path.relative_to(root)) for path in paths)
    if not root.is_dir():
        raise UserError(
            f"data_root: looked at {root} and found no such directory; {name} expects in it: {tree}; "
            "or give --download"
        )
    missing = [path for path in paths if not path.is_file()]
    if missing:
        zipped = [path for path in missing if path.with_name(path.name + ".gz").is_file()]
        hint = f"unpack {zipped[0]}.gz first (gunzip -k)" if zipped else "or give --download"
        raise UserError(
            f"data_root: looked at {root} and found no {missing[0].relative_to(root)}; expected: {tree}; "
            f"{hint}"
        )


def _read_idx(path: Path, entry: tuple[int, ...]) -> Tensor:
    """The unsigned bytes of an IDX file: a magic number, one big-endian size a dimension, the bytes."""
    ndim = 1 + len(entry)
    content = path.read_bytes()
    start = 4 * (1 + ndim)
    fix = "delete it and unpack its .gz archive again"
    # Third byte 8: unsigned bytes; fourth byte: the number of dimensions.
    if content[:4] != bytes((0, 0, 8, ndim)):
        raise UserError(
            f"{path}: the file is corrupt (no IDX header of unsigned bytes in {ndim} dimensions); {fix}"
        )
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    expected = start + math.prod(shape) if len(content) >= start else start
    if len(content) != expected:
        raise UserError(
            f"{path}: the file is truncated or corrupt ({len(content)} bytes, expected {expected}); {fix}"
        )
    if tuple(shape[1:]) != entry:
        found, wanted = ("×".join(map(str, sizes)) for sizes in (shape[1:], entry))
        raise UserError(f"{path}: the file is another one (images of {found}, expected {wanted}); {fix}")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


def _check_archive(archive: Path, expected: str, unpacked: Path) -> None:
    """The archive is the published one, and `unpacked` is what it holds."""
    found = _md5(archive)
    if found != expected:
        raise UserError(
            f"{archive}: the file is truncated, corrupt or another one (MD5 {found}, expected {expected}); "
            "delete it and download it again"
        )
    try:
        with gzip.open(archive) as packed, unpacked.open("rb") as plain:
            same = True
            while same and (part := packed.read(_CHUNK)):
                same = part == plain.read(len(part))
            same = same and not plain.read(1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{archive}: could not be unpacked: {_sentence(error)}") from error
    if not same:
        raise UserError(
            f"{unpacked}: the file is not what {archive.name} holds; delete it and unpack the archive again"
        )


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while part := file.read(_CHUNK):
            digest.update(part)
    return digest.hexdigest()


# -- downloads


def _download(name: str, dataset: Any, root: Path, paths: list[Path]) -> None:
    """Let torchvision fetch and unpack the set if a file is missing; a wrong file is not its business."""
    by_hand = _by_hand(dataset, root, paths[0].parent)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _alone(root):
            if not all(path.is_file() for path in paths):
                dataset(str(root), train=True, download=True)
    except Exception as error:
        # Of many kinds: no name server, a refusal, a time-out, a wrong sum, a full disk, a broken archive.
        raise UserError(f"data: the download of {name} failed ({_sentence(error)}); {by_hand}") from error


def _by_hand(dataset: Any, root: Path, folder: Path) -> str:
    if hasattr(dataset, "resources"):
        archives = ", ".join(file for file, _ in dataset.resources)
        return f"by hand: fetch {archives} from {dataset.mirrors[0]} and unpack them (gunzip -k) in {folder}"
    return f"by hand: fetch {dataset.url} and unpack it (tar -xzf {dataset.filename}) in {root}"


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Hold the download lock of a root, so that one process fetches and the others find the files."""
    try:
        import fcntl
    except ImportError:  # no flock here: processes that start together may fetch twice
        yield
        return
    descriptor = os.open(root / ".download.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
