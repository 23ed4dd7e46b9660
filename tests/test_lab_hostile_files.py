"""Crafted and damaged option files, plans and weights: one sentence that names the file, and no traceback."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bsgap_kernels import cli
from bsgap_kernels.lab.checkpoint import Checkpoints
from bsgap_kernels.lab.checks import UserError
from bsgap_kernels.lab.config import TrainConfig
from bsgap_kernels.lab.saved import load_run
from bsgap_kernels.lab.train import train

pytest.importorskip("jsonargparse", reason="jsonargparse, of the lab extra, is not installed")

BOMB = "a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 20)
)
FILES = {
    "empty": (b"", "the file holds no mapping of options such as lr: 0.02"),
    "comment": (b"# nothing\n", "the file holds no mapping"),
    "list": (b"- a\n", "the file holds no mapping"),
    "text": (b"lr\n", "the file holds no mapping"),
    "integer keys": (b"1: 2\n", "got the key '1', expected names of options"),
    "null key": (b"null: 2\n", "got the key 'null', expected names of options"),
    "list as a key": (b"? [a]\n: 2\n", "got the key 'SequenceNode', expected names of options"),
    "twice": (b"lr: 0.1\nlr: 0.2\n", "lr is there twice, expected each option once"),
    "bomb": (BOMB.encode(), "the file stands for more than 100000 values"),
    "itself": (b"lr: &x [*x]\n", "a value holds itself"),
    "deep": (b"lr: " + b"[" * 5000 + b"]" * 5000, "the file is nested too deeply"),
    "digits": (b"seed: " + b"9" * 5000, "the file is not valid YAML: Exceeds the limit"),
    "large": (b"#" * (2**20 + 1), "the file has more than 1048576 bytes"),
    "UTF-16": ("lr: 0.1".encode("utf-16"), "the file is not UTF-8 text"),
    "a control sign": (b"lr: \x07\n", "the file is not valid YAML"),
    "an object": (b"lr: !!python/object/apply:os.system [ls]\n", "the file is not valid YAML"),
    "two documents": (b"lr: 0.1\n---\nlr: 0.2\n", "the file is not valid YAML"),
    "a date of no month": (b"lr: 2026-99-01\n", "the file is not valid YAML"),
}


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert len(error) < 1200
    return error


@pytest.mark.parametrize("name", FILES)
def test_option_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, sentence = FILES[name]
    path = tmp_path / "options.yaml"
    path.write_bytes(content)
    out = tmp_path / "out"
    assert f"{path}: {sentence}" in mistake(capsys, "train", f"--config={path}", "--out", str(out))
    pytest.importorskip("scipy")
    pytest.importorskip("bokeh")
    assert f"{path}: {sentence}" in mistake(capsys, "study", "--plan", str(path), "--out", str(out))
    # A directory whose options these are is not taken for one of ours.
    out.mkdir()
    (out / "config.yaml").write_bytes(content)
    assert str(out) in mistake(capsys, "train", "--steps", "1", "--overwrite", "--out", str(out))
    assert (out / "config.yaml").read_bytes() == content


def test_a_value_out_of_range_names_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("lr: .nan\n")
    assert f"{path}: lr: got nan, expected a finite number" in mistake(capsys, "train", "--config", str(path))
    # On the command line it is no fault of the file.
    assert "bsgap train: lr: got -1.0" in mistake(capsys, "train", "--config", str(path), "--lr", "-1")
    for wrong in (tmp_path, tmp_path / "none.yaml"):
        assert str(wrong) in mistake(capsys, "train", "--config", str(wrong))


def test_a_long_value_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    assert "lr" in mistake(capsys, "train", "--lr", "9x" * 50_000)


def test_aliases_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("seeds: &all [1, 2]\nbatch_sizes: *all\nlr: -1\n")
    assert f"{path}: lr: got -1" in mistake(capsys, "sweep", "--config", str(path))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn")
    directory = tmp_path_factory.mktemp("run") / "r"
    train(TrainConfig(model="mlp", steps=1, probe_size=32), directory)
    return directory


def crafted(weights: dict[str, Tensor]) -> dict[str, Any]:
    values = list(weights.values())
    return {
        "integer names": {"model": dict(enumerate(values))},
        "names of tuples": {"model": {(1, number): value for number, value in enumerate(values)}},
        "no mapping": [1, 2],
        "a tensor": torch.ones(3),
        "nothing": None,
        "integers above": {1: 2},
        "a list": {"model": values},
        "no weights": {"model": {}},
        "nested": {"model": {name: {"x": value} for name, value in weights.items()}},
        "texts": {"model": dict.fromkeys(weights, "x")},
        "one too many": {"model": {**weights, "more": torch.ones(1)}},
        "other shapes": {"model": {name: value.reshape(-1)[:1] for name, value in weights.items()}},
        "complex": {"model": {name: value.cfloat() for name, value in weights.items()}},
        "integers": {"model": {name: value.long() for name, value in weights.items()}},
        "16 bits": {"model": {name: value.half() for name, value in weights.items()}},
        "64 bits": {"model": {name: value.double() for name, value in weights.items()}},
        "sparse": {"model": {name: value.to_sparse() for name, value in weights.items()}},
        "meta": {"model": {name: value.to("meta") for name, value in weights.items()}},
    }


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_crafted_weights(run: Path) -> None:
    path = run / "weights.pt"
    good = path.read_bytes()
    weights = torch.load(path)["model"]
    sentence = r"weights.pt: the file is damaged or of another network; remove it"
    try:
        for content in crafted(weights).values():
            torch.save(content, path)
            with pytest.raises(UserError, match=sentence):
                load_run(run)
        for content in (b"", b"hello", good[: len(good) // 2], good[:-1], b"\x80\x04."):
            path.write_bytes(content)
            with pytest.raises(UserError, match=sentence):
                load_run(run)
    finally:
        path.write_bytes(good)
    assert load_run(run).config.steps == 1


@pytest.mark.parametrize("space", [3000, 50_000])
def test_a_full_disk_names_the_file_and_spares_the_checkpoint(space: int, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": torch.ones(3)})
    code = f"""if True:
        import resource, torch
        from pathlib import Path
        from bsgap_kernels.lab.checkpoint import Checkpoints
        resource.setrlimit(resource.RLIMIT_FSIZE, ({space}, {space}))
        try:
            Checkpoints(Path({str(tmp_path)!r})).save(2, {{"x": torch.ones(10**5)}})
        except OSError as error:
            print(error.filename, error.strerror)
    """
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == f"{tmp_path / 'step-000000002.pt'} File too large\n"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-000000001.json", "step-000000001.pt"]
    state = checkpoints.load(problems := [])
    assert state is not None
    assert torch.equal(state["x"], torch.ones(3))
    assert problems == []


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"status": "finished"}', '{"status": "finished", "sites": [1]}']
)
def test_a_study_names_a_summary_that_is_none(text: str, tmp_path: Path) -> None:
    from bsgap_kernels.lab.study.run import _run

    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        _run("experiment", "epochs", tmp_path)
