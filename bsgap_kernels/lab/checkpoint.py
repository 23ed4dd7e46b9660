"""Checkpoints of a run: whole or not at all, checked by hash; an older one where the newest is damaged."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bsgap_kernels.lab.files import sha256_of_file, write_atomically, write_text

FOLDER = "checkpoints"
_SCHEMA = 2
# Of torch.load, by the kind of damage.
UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, EOFError,
)  # fmt: skip
_OURS = re.compile(r"step-\d{9,}\.(pt|json)(\.([^/]+\.)?tmp)?")


class Checkpoints:
    """The last few states of a run in `directory`.

    A state is a file `step-N.pt` (torch.save; read with weights_only=True, so nothing in it is executed) and,
    written after it, a manifest `step-N.json` with its size and SHA-256. Each is written to a temporary file,
    synced and renamed: a kill at any moment leaves the states that were there, and at most a file without a
    manifest, which counts for nothing.

    Args:
        directory: where the files lie; made by the first save.
        keep: how many states are kept.
    """

    def __init__(self, directory: Path, keep: int = 2) -> None:
        self.directory = directory
        self.keep = keep

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Save a state (tensors, numbers, texts, lists and dicts of them); remove all but the last ones.

        States of later steps go too: they were damaged, or the run would not have come by here again.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self._path(step)
        write_atomically(path, lambda file: torch.save(state, file))
        manifest = {
            "schema": _SCHEMA,
            "step": step,
            "bytes": path.stat().st_size,
            "sha256": sha256_of_file(path),
        }
        write_text(path.with_suffix(".json"), json.dumps(manifest) + "\n")
        earlier = [found.stem for found in self._manifests() if found.stem <= path.stem]
        for file in self._files():
            if file.stem not in earlier[: self.keep]:
                file.unlink(missing_ok=True)

    def load(self, problems: list[str]) -> dict[str, Any] | None:
        """The newest state that is whole, if any; a sentence in `problems` for each newer one that is not."""
        return next(self._states(problems), None)

    def clear(self) -> None:
        """Remove every state, and the directory if nothing else is in it."""
        if not self.directory.is_dir():
            return
        for file in self._files():
            file.unlink(missing_ok=True)
        if not any(self.directory.iterdir()):
            self.directory.rmdir()

    def _files(self) -> list[Path]:
        """Of every state, whole or not; not what else somebody put there."""
        return [file for file in self.directory.iterdir() if _OURS.fullmatch(file.name)]

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:09d}.pt"

    def _manifests(self) -> list[Path]:
        """Newest first."""
        return sorted(self.directory.glob("step-*.json"), reverse=True)

    def _states(self, problems: list[str]) -> Iterator[dict[str, Any]]:
        for manifest in self._manifests():
            path = manifest.with_suffix(".pt")
            try:
                yield _read(manifest, path)
            except _DamagedError as error:
                problems.append(
                    f"{path.parent.name}/{path.name}: {error}; an older checkpoint is used instead"
                )


class _DamagedError(Exception):
    """Why a checkpoint cannot be used."""


def _read(manifest: Path, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(manifest.read_bytes())
        schema, size, digest = content["schema"], int(content["bytes"]), str(content["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _DamagedError("its manifest cannot be read") from error
    if schema != _SCHEMA:
        raise _DamagedError(f"its manifest has schema {schema!r}, expected {_SCHEMA}")
    try:
        if path.stat().st_size != size:
            raise _DamagedError(f"it has {path.stat().st_size} bytes, expected {size}")
        if sha256_of_file(path) != digest:
            raise _DamagedError("its bytes are not those that were saved (SHA-256)")
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise _DamagedError(f"it cannot be read ({error.strerror})") from error
    except UNREADABLE as error:
        raise _DamagedError("torch cannot read it") from error
