"""`bsgap sharpness` on finished runs: its files, its tables, and one sentence for every mistake."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bsgap_kernels.cli import main
from bsgap_kernels.lab.config import TrainConfig, UserError
from bsgap_kernels.lab.objective import Objective
from bsgap_kernels.lab.saved import SavedRun, load_run
from bsgap_kernels.lab.sharpness_run import SharpnessOptions, curves_of, curves_path, sharpness_of
from bsgap_kernels.lab.train import train

for needed in ("scipy", "sklearn", "yaml"):
    pytest.importorskip(needed)
QUICK = ["--images", "40", "--iterations", "2", "--subspace", "5"]


def finished_run(sweep: Path, batch_size: int) -> Path:
    """LeNet-5 on digits after a few updates."""
    quick: dict[str, Any] = {"steps": 20, "every": None, "probe_every": None, "probe_size": 8}
    config = TrainConfig(batch_size=batch_size, **quick)
    train(config, sweep / config.run)
    return sweep / config.run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    sweep = tmp_path_factory.mktemp("sweep")
    return finished_run(sweep, 16), finished_run(sweep, 64)


@pytest.fixture
def runs(trained: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """Copies, so that no test sees another's files."""
    return tuple(Path(shutil.copytree(run, tmp_path / "sweep" / run.name)) for run in trained)  # type: ignore[return-value]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["sharpness", *arguments]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("bsgap sharpness: ")
    assert captured.out == ""
    return lines[0]


def test_two_runs(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    small, large = runs
    assert main(["sharpness", str(large), str(small), *QUICK]) == 0
    record = read(small / "sharpness.json")
    assert {key: record[key] for key in ("schema", "run", "mode", "images", "of", "precision")} == {
        "schema": 1, "run": "b16-s0", "mode": "eval", "images": 40, "of": 1437, "precision": "float32",
    }  # fmt: skip
    assert [(one["space"], one["dimension"], one["epsilon"], one["seed"]) for one in record["sharpness"]] == [
        ("full", 61706, 1e-3, None),
        ("full", 61706, 5e-4, None),
        ("subspace", 5, 1e-3, 0),
        ("subspace", 5, 5e-4, 0),
    ]
    for one in record["sharpness"]:
        assert one["loss"] == record["train_loss"]
        assert one["phi"] == pytest.approx(
            100 * (one["max_loss"] - one["loss"]) / (1 + one["loss"]), rel=1e-12
        )
        assert one["phi"] > 0
        assert 1 <= one["iterations"] <= 2 <= one["evaluations"]
        assert 0 <= one["at_bound"] <= 1
        assert one["message"]
    hessian = record["hessian"]
    assert hessian["max_eigenvalue"] > 0
    assert hessian["residual"] < 0.01 * hessian["max_eigenvalue"]
    assert hessian["products"] == hessian["iterations"] + 1
    assert {"torch", "numpy", "scipy", "python"} <= set(record["versions"])

    # α = 0 is the smaller batch, in whatever order the two are given.
    curves = read(small.parent / "curves" / "b16-s0--b64-s0.json")
    assert (curves["a"], curves["b"]) == ("b16-s0", "b64-s0")
    assert (curves["images"], curves["test_images"], curves["batch_norm"]) == (40, 360, None)
    assert [curve["kind"] for curve in curves["curves"]] == ["linear", "curved"]
    for curve in curves["curves"]:
        assert curve["alpha"] == [-1 + step / 8 for step in range(25)]
        columns = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
        assert {len(curve[column]) for column in columns} == {25}
        for alpha, run in ((0.0, small), (1.0, large)):
            own = read(run / "sharpness.json")
            at = curve["alpha"].index(alpha)
            assert curve["train_loss"][at] == own["train_loss"]
            assert curve["train_accuracy"][at] == own["train_accuracy"]

    shown = capsys.readouterr()
    lines = [line.split() for line in shown.out.splitlines()]
    for one in record["sharpness"]:
        space = ["full"] if one["space"] == "full" else ["subspace", "5"]
        numbers = [f"{one[key]:.4g}" for key in ("loss", "max_loss", "phi")]
        row = ["b16-s0", *space, f"{one['epsilon']:g}", *numbers]
        assert sum(line[: len(row)] == row for line in lines) == 1, row
    assert f"largest Hessian eigenvalue {hessian['max_eigenvalue']:.4g}" in shown.out
    assert "40 of 1437 training images" in shown.out
    assert f"Written: {small / 'sharpness.json'}" in shown.out
    assert "φ, full space, ε 0.001" in shown.err
    ends = [line for line in lines if line[:1] == ["curved"]]
    assert [line[-5] for line in ends] == ["0", ends[1][-5], "1"]
    assert 0 < float(ends[1][-5]) < 1


@pytest.mark.parametrize(
    ("within", "count"), [("evaluate", 1), ("__call__", 1), ("hessian_product", 1), ("evaluate", 2)]
)
def test_sigterm_ends_a_measurement_within_a_pass(
    within: str,
    count: int,
    runs: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At f(x), in SciPy's search, in Lanczos iterations, on a curve; what was there stays."""
    arguments = ["sharpness", *map(str, runs[:count]), *QUICK]
    assert main(arguments) == 0
    files = sorted(path for path in runs[0].parent.rglob("*") if path.is_file())
    before = [path.read_bytes() for path in files]
    calls: list[Objective] = []
    original = getattr(Objective, within)

    def asking(self: Objective, *given: Any) -> Any:
        calls.append(self)
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *given)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(Objective, within, asking)
        assert main(arguments) == 143
    assert len(calls) == 1
    assert capsys.readouterr().err.endswith("bsgap sharpness: stopped; files that were written are whole\n")
    assert sorted(path for path in runs[0].parent.rglob("*") if path.is_file()) == files
    assert [path.read_bytes() for path in files] == before
    assert main(arguments) == 0


def test_one_run_as_json(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    small = runs[0]
    arguments = [*QUICK, "--epsilon", "1e-2", "--subspace", "0", "--no-hessian", "--json", "--double"]
    assert main(["sharpness", str(small), *arguments]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"runs": [read(small / "sharpness.json")], "curves": None}
    (record,) = printed["runs"]
    assert record["hessian"] is None
    assert record["precision"] == "float64"
    assert [(one["space"], one["epsilon"]) for one in record["sharpness"]] == [("full", 0.01)]
    assert not (small.parent / "curves").exists()


def test_the_same_images_whatever_the_run_and_the_chunk(runs: tuple[Path, Path]) -> None:
    options = {"epsilons": (1e-3,), "iterations": 2, "images": 40, "subspace": 0, "hessian": False}
    first = sharpness_of(runs[0], SharpnessOptions(**options))
    again = sharpness_of(runs[0], SharpnessOptions(**options, chunk=40))
    other = sharpness_of(runs[0], SharpnessOptions(**options, chunk=9, seed=5))
    assert first["train_loss"] == again["train_loss"]
    assert first["train_loss"] == pytest.approx(other["train_loss"], rel=1e-6)
    assert first["sharpness"][0]["phi"] == again["sharpness"][0]["phi"]
    saved = load_run(runs[0])
    with torch.no_grad():
        losses = nn.functional.cross_entropy(
            saved.model(saved.data.train_images).double(), saved.data.train_labels, reduction="none"
        )
    whole = sharpness_of(runs[0], SharpnessOptions(**{**options, "images": None, "iterations": 1}))
    assert whole["train_loss"] == pytest.approx(losses.mean().item(), rel=1e-6)
    assert whole["images"] == whole["of"] == 1437
    # A part of the set is drawn from all of it: not the first rows.
    assert abs(first["train_loss"] - losses[:40].mean().item()) > 1e-3


def test_batch_norm_is_said_to_be_reestimated(tmp_path: Path, runs: tuple[Path, Path]) -> None:
    saved = load_run(runs[0])
    torch.manual_seed(0)
    first, second = (
        SavedRun(
            directory=tmp_path,
            config=TrainConfig(batch_size=batch_size),
            data=saved.data,
            model=nn.Sequential(nn.Conv2d(1, 2, 5, 4), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 10)),
            summary={},
        )
        for batch_size in (8, 32)
    )
    path, record = curves_of(
        tmp_path / "b8", tmp_path / "b32", SharpnessOptions(images=40), saved=(first, second)
    )
    assert path == tmp_path / "curves" / "b8-s0--b32-s0.json"
    assert record["batch_norm"] == "reestimated"


def test_a_run_that_diverged(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    small = runs[0]
    weights = torch.load(small / "weights.pt", weights_only=True)
    weights["model"]["fc3.bias"][0] = math.nan
    torch.save(weights, small / "weights.pt")
    assert main(["sharpness", str(small), *QUICK]) == 0
    record = read(small / "sharpness.json")
    assert record["train_loss"] is None
    assert record["hessian"] is None
    assert [(one["phi"], one["loss"]) for one in record["sharpness"]] == [(None, None)] * 4
    assert (
        "b16-s0, full, ε 0.001: no φ: the loss or its gradient at x is not finite" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--epsilon", "0"], "epsilon: got [0.0], expected finite numbers above 0"),
        (["--epsilon", "nan"], "epsilon: got [nan], expected finite numbers above 0"),
        (["--epsilon", "a"], "epsilon: got 'a', expected numbers separated by commas"),
        (["--epsilon", ","], "epsilon: got [], expected finite numbers above 0"),
        (["--epsilon", "1e-3,0.001"], "epsilon: got [0.001, 0.001], expected each value once"),
        (["--images", "1438"], "images: got 1438, expected at most the 1437 training images of digits"),
        (["--images", "0"], "images: got 0, expected an integer of at least 1"),
        (["--subspace", "-1"], "subspace: got -1, expected an integer of at least 0"),
        (["--iterations", "0"], "iterations: got 0, expected an integer of at least 1"),
        (["--chunk", "x"], "argument --chunk: invalid int value: 'x'"),
        (["--device", "tpu9"], "device: got 'tpu9'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_mistakes_in_options(
    trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert sentence in mistake(capsys, str(trained[0]), *arguments)
    assert not (trained[0] / "sharpness.json").exists()


def test_mistakes_in_runs(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, large = map(str, runs)
    assert "the following arguments are required: RUN" in mistake(capsys)
    assert "runs: got 3, expected one or two directories" in mistake(capsys, small, large, small)
    assert "twice, expected two runs" in mistake(capsys, small, f"{small}/../b16-s0")
    assert "found no such directory" in mistake(capsys, str(tmp_path / "none"))
    (runs[1] / "weights.pt").unlink()
    sentence = mistake(capsys, small, large)
    assert "weights.pt" in sentence
    assert "again" in sentence
    assert not (runs[0] / "sharpness.json").exists()


def test_runs_of_different_networks(runs: tuple[Path, Path]) -> None:
    small, large = runs
    saved = load_run(small)
    other = dataclasses.replace(saved, config=TrainConfig(batch_size=32, model="resnet56"))
    with pytest.raises(UserError, match="got lenet5 on digits and resnet56 on digits, expected the same"):
        curves_of(small, large, saved=(saved, other))
    wider = dataclasses.replace(saved, model=nn.Sequential(nn.Flatten(), nn.Linear(784, 10)))
    with pytest.raises(UserError, match="runs: the networks differ in shape"):
        curves_of(small, large, saved=(saved, wider))


def test_names_of_curve_files(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    within = curves_path(one / "b16-s0", "b16-s0", one / "b64-s0", "b64-s0")
    assert within == one / "curves" / "b16-s0--b64-s0.json"
    # Two sweeps have runs of one name: another pair gets another file.
    across = curves_path(one / "b16-s0", "b16-s0", two / "b16-s0", "b16-s0")
    assert across == one / "curves" / "b16-s0--two-b16-s0.json"
