"""Checkpoints: whole or not at all, the last few kept, and an older one where the newest is damaged."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bsgap_kernels.lab.checkpoint import Checkpoints
from bsgap_kernels.lab.files import sha256_of_file, sha256_of_tensors, write_atomically, write_text


def state(step: int) -> dict[str, Any]:
    return {
        "done": step,
        "model": {"w": torch.full((3,), float(step))},
        "seconds": {"step": 0.5},
        "none": None,
    }


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoints:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (5, 10, 100):
        checkpoints.save(step, state(step))
    return checkpoints


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.directory.iterdir())


def newest(checkpoints: Checkpoints) -> Path:
    return checkpoints.directory / "step-000000100.pt"


def test_the_last_ones_are_kept_and_the_newest_is_read(saved: Checkpoints) -> None:
    assert names(saved) == [
        "step-000000010.json", "step-000000010.pt", "step-000000100.json", "step-000000100.pt",
    ]  # fmt: skip
    problems: list[str] = []
    found = saved.load(problems)
    assert problems == []
    assert found is not None
    assert found["done"] == 100
    assert torch.equal(found["model"]["w"], torch.full((3,), 100.0))
    assert (found["seconds"], found["none"]) == ({"step": 0.5}, None)
    manifest = json.loads(newest(saved).with_suffix(".json").read_text())
    assert manifest["sha256"] == sha256_of_file(newest(saved))


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _renumber(manifest: Path) -> None:
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "schema": 7}))


DAMAGE = {
    "a bit": (lambda path: _flip(path), "not those that were saved"),
    "cut": (lambda path: os.truncate(path, path.stat().st_size - 7), "bytes, expected"),
    "empty": (lambda path: os.truncate(path, 0), "it has 0 bytes"),
    "gone": (lambda path: path.unlink(), "cannot be read"),
    "manifest cut": (lambda path: os.truncate(path.with_suffix(".json"), 20), "manifest cannot be read"),
    "manifest of another schema": (lambda path: _renumber(path.with_suffix(".json")), "schema 7, expected 2"),
    "manifest of another form": (lambda path: path.with_suffix(".json").write_text("[]"), "manifest cannot"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_one_is_named_and_an_older_one_used(kind: str, saved: Checkpoints) -> None:
    damage, reason = DAMAGE[kind]
    damage(newest(saved))
    problems: list[str] = []
    found = saved.load(problems)
    assert found is not None
    assert found["done"] == 10
    assert len(problems) == 1
    assert problems[0].startswith("checkpoints/step-000000100.pt: ")
    assert reason in problems[0]


def test_all_damaged(saved: Checkpoints) -> None:
    for path in saved.directory.glob("*.pt"):
        _flip(path)
    problems: list[str] = []
    assert saved.load(problems) is None
    assert len(problems) == 2


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_one_does_not_take_the_place_of_later_saves(keep: int, saved: Checkpoints) -> None:
    _flip(newest(saved))
    checkpoints = Checkpoints(saved.directory, keep)
    checkpoints.save(20, state(20))
    problems: list[str] = []
    found = checkpoints.load(problems)
    assert found is not None
    assert (found["done"], problems) == (20, [])
    assert len(names(checkpoints)) == 2 * keep


def test_no_checkpoint(tmp_path: Path) -> None:
    problems: list[str] = []
    assert Checkpoints(tmp_path / "none").load(problems) is None
    assert problems == []
    Checkpoints(tmp_path / "none").clear()


class _Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, (str(_Evil.path),)

    path: Path


def test_a_pickle_that_would_run_code_is_refused(saved: Checkpoints, tmp_path: Path) -> None:
    """Also with a manifest that fits it."""
    _Evil.path = tmp_path / "evil"
    assert pickle.loads(pickle.dumps(_Evil())) is None
    _Evil.path.rmdir()  # the attack works where it is allowed to
    torch.save({"done": _Evil()}, newest(saved))
    manifest = newest(saved).with_suffix(".json")
    fitting = {"bytes": newest(saved).stat().st_size, "sha256": sha256_of_file(newest(saved))}
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **fitting}))
    problems: list[str] = []
    found = saved.load(problems)
    assert not _Evil.path.exists()
    assert found is not None
    assert found["done"] == 10
    assert "torch cannot read it" in problems[0]


@pytest.mark.parametrize("moment", ["temporary", "renamed", "manifest"])
def test_a_save_that_is_killed_leaves_the_earlier_ones(
    moment: str, saved: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def killed(self: Path, target: Path) -> Path:
        if moment == "temporary" or (moment == "renamed" and target.suffix == ".json"):
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        if moment == "manifest":
            patch.setattr(
                Path, "unlink", lambda self, missing_ok=False: (_ for _ in ()).throw(KeyboardInterrupt)
            )
        with pytest.raises(KeyboardInterrupt):
            saved.save(101, state(101))
    problems: list[str] = []
    found = saved.load(problems)
    assert found is not None
    assert (found["done"], problems) == (101 if moment == "manifest" else 100, [])
    saved.save(102, state(102))
    assert not any(name.endswith(".tmp") for name in names(saved))
    assert len(names(saved)) == 4


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text("old")

    def fail(file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def in_a_process(work: Callable[[], None]) -> None:
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()


def test_two_processes_write_one_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "sharpness.json"

    def write(file: Any) -> None:
        file.write(b"first ")
        file.flush()
        in_a_process(lambda: write_text(path, "second"))
        assert path.read_text() == "second"
        file.write(b"first")

    write_atomically(path, write)
    assert path.read_text() == "first first"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "sharpness.json"
    for _ in range(3):
        in_a_process(lambda: write_atomically(path, lambda file: os._exit(9)))
        assert len(list(tmp_path.iterdir())) == 1
    elsewhere = tmp_path / "sharpness.json.elsewhere-1.tmp"  # it may be at work
    elsewhere.touch()
    write_text(path, "whole")
    assert sorted(tmp_path.iterdir()) == [path, elsewhere]


def test_clear_leaves_other_files(saved: Checkpoints) -> None:
    for name in ("notes.txt", "best.pt", "best.json", "step-best.pt"):
        (saved.directory / name).write_text("x")
    saved.save(101, state(101))
    saved.clear()
    assert names(saved) == ["best.json", "best.pt", "notes.txt", "step-best.pt"]


def test_the_hash_of_tensors_sees_every_bit() -> None:
    first = {"a": torch.zeros(2, 3), "b": torch.tensor(1, dtype=torch.int64)}
    digest = sha256_of_tensors(first)
    assert digest == sha256_of_tensors({name: tensor.clone() for name, tensor in first.items()})
    others = [
        {"a": torch.zeros(3, 2), "b": first["b"]},
        {"a": -torch.zeros(2, 3), "b": first["b"]},
        {"a": torch.zeros(2, 3, dtype=torch.int32), "b": first["b"]},
        {"c": torch.zeros(2, 3), "b": first["b"]},
    ]
    assert len({digest, *map(sha256_of_tensors, others)}) == 5
