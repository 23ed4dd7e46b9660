"""Files that are there whole or not at all, whatever kills the process or the machine."""

from __future__ import annotations

import glob
import hashlib
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

TEMPORARY = ".tmp"


def write_atomically(path: Path, write: Callable[[Any], object]) -> None:
    """Have `write` fill a temporary file beside `path`, bring it to the disk, and rename it to `path`.

    The temporary file is this process's own, so that of two that write one path each writes it whole, and the
    last one's stays. Those of processes of this machine that were killed are removed.
    """
    for left, process in temporaries(path):
        if process is not None and not _is_alive(process):
            left.unlink(missing_ok=True)
    guarded: _Remembering | None = None
    temporary = path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            guarded = _Remembering(file)
            write(guarded)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as raised:
        temporary.unlink(missing_ok=True)
        # torch.save hides a full disk behind a RuntimeError of its archive.
        error = raised if guarded is None or guarded.error is None else guarded.error
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from raised
        raise
    sync_directory(path.parent)


class _Remembering:
    """A file that keeps the first error of its writes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes, /) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def temporaries(path: Path) -> list[tuple[Path, int | None]]:
    """The temporary files of `path`, each with the process that writes it, None on another machine."""
    ours = re.compile(rf"{re.escape(platform.node())}-(\d+)")
    found = []
    for file in path.parent.glob(f"{glob.escape(path.name)}.*{TEMPORARY}"):
        owner = ours.fullmatch(file.name[len(path.name) + 1 : -len(TEMPORARY)])
        found.append((file, int(owner[1]) if owner else None))
    return found


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_atomically(path, lambda file: file.write(text.encode()))


def sync_directory(directory: Path) -> None:
    """Bring the names of a directory's files to the disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_tensors(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes of tensors: equal if and only if all bits are."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
