"""The command line: what it prints, what it writes, and one sentence with exit code 2 for every mistake."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml
from lab_data import small_data

from bsgap_kernels import cli
from bsgap_kernels.cli import main
from bsgap_kernels.lab.config import UserError
from bsgap_kernels.lab.optional import require

pytest.importorskip("jsonargparse")
SMALL = ["--steps", "2", "--batch-size", "16", "--probe-size", "24"]


@pytest.fixture
def small_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bsgap_kernels.lab.setup.load_data", lambda *arguments, **options: small_data())


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A stand-in for the report, which has its own tests; the list holds the directories it was asked for."""
    asked: list[Path] = []
    module = types.ModuleType("bsgap_kernels.lab.report")

    def write_report(directory: Path) -> Path:
        asked.append(directory)
        if directory.name == "empty":
            raise ValueError("nothing to report in empty")
        return directory / "report.html"

    module.write_report = write_report  # type: ignore[attr-defined]
    module.is_tracked = lambda paths: False  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bsgap_kernels.lab.report", module)
    return asked


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail; return its sentence."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("bsgap")
    assert captured.out == ""
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("tarin", "bsgap: got the command 'tarin', expected one of train, sweep, compare, report, demo"),
        ("train --lr abc", "bsgap train: lr: got 'abc', expected a number"),
        ("train --lr nan", "bsgap train: lr: got 'nan', expected a number"),
        ("train --epochs 3.5", "bsgap train: epochs: got '3.5', expected an integer or null"),
        ("train --lrr 3", "bsgap train: --lrr: unknown option; the nearest is --lr"),
        ("train extra", "bsgap train: extra: unknown option"),
        ("train --batch-size", "bsgap train: argument --batch_size: expected one argument"),
        ("train --batch-size 0", "batch_size: got 0, expected an integer of at least 1, or full"),
        ("train --batch-size abc", "batch_size: got 'abc', expected an integer of at least 1, or full"),
        (
            "train --batch-size 2000",
            "batch_size: got 2000, expected at most the 48 images of digits, or full",
        ),
        ("train --rtol -1", "bsgap train: rtol: got -1.0, expected a finite number of at least 0"),
        ("train --center --atol -1", "bsgap train: atol: got -1.0, expected a finite number of at least 0"),
        ("train --overwrite maybe", "bsgap train: overwrite: got 'maybe', expected true or false"),
        ("train --epochs 3 --steps 4", "epochs, steps: got both 3 and 4, expected one of the two budgets"),
        (
            "train --batch-size 9 --probe-size 49",
            "probe_size: got 49, expected at most the 48 training images of digits",
        ),
        (
            "train --batch-size 9 --probe-size 9 --layers rleu1",
            "the pattern 'rleu1' matches no module; the nearest names are relu1",
        ),
        ("train --device tpu", "device: got 'tpu', expected one that torch can use here, such as cpu"),
        (
            "train --data mnist",
            "data_root: got none, expected the directory that holds torchvision's files of mnist",
        ),
        ("train --download maybe", "bsgap train: download: got 'maybe', expected true or false"),
        ("train --procedural.test 9", "procedural: got options of the procedural set, but data is digits"),
        (
            "train --data procedural --procedural.label-noise x --procedural.test 9",
            "bsgap train: procedural.label_noise: got 'x', expected a number",
        ),
        (
            "train --data procedural --procedural.test 9 --procedural.trian 9",
            "procedural.trian: unknown option; the nearest is --procedural.train",
        ),
        ("train --data procedural --procedural 9", "procedural: got '9', expected its options one by one"),
        ("train --data procedural --procedural.seed -1", "procedural.seed: got -1, expected an integer of"),
        ("sweep --batch-sizes 16,half", "bsgap sweep: batch_sizes: got 'half', expected an integer"),
        (
            "sweep --batch-sizes 16,2000 --probe-size 9",
            "batch_size: got 2000, expected at most the 48 images",
        ),
        ("sweep --seeds 0,x", "bsgap sweep: seeds: got 'x', expected integers of at least 0"),
        ("demo --steps 0", "bsgap demo: steps: got 0, expected an integer of at least 1"),
        ("demo --bogus", "bsgap demo: --bogus: unknown option"),
        ("report", "bsgap report: the following arguments are required: path"),
        (
            "report /no/such/run",
            "looked at /no/such/run and found nothing, expected a sweep, a run or a tracker's file",
        ),
        ("info --bogus", "bsgap info: --bogus: unknown option"),
    ],
)
@pytest.mark.usefixtures("small_digits", "reports")
def test_mistakes(arguments: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sentence in mistake(capsys, *arguments.split())


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"lr: [1\n foo: : x", "bad.yaml: the file is not valid YAML"),
        (b"lr: 0.1\nbatch_sise: 3\n", "batch_sise: unknown option; the nearest is --batch_size"),
        (b"- 1\n- 2\n", "bad.yaml: the file holds no mapping of options"),
        (b"lr: fast\n", "lr: got 'fast', expected a number"),
        (b"procedural: {train: few}\n", "procedural.train: got 'few', expected an integer"),
        (b"procedural: 3\n", "procedural: got '3', expected its options one by one"),
        (b"\xff\xfe\x00", "bad.yaml: the file is not UTF-8 text"),
    ],
)
def test_bad_config_files(
    content: bytes, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    assert sentence in mistake(capsys, "train", "--config", str(path))


def test_missing_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "none.yaml"
    assert str(path) in mistake(capsys, "train", "--config", str(path))


def test_missing_data_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    root = tmp_path / "nowhere"
    sentence = mistake(capsys, "train", "--data", "cifar10", "--data-root", str(root))
    assert f"looked at {root}" in sentence
    assert "cifar-10-batches-py/data_batch_1" in sentence


def test_procedural_options_from_the_command_line_and_from_its_config(tmp_path: Path) -> None:
    sizes = ["--procedural.train", "40", "--procedural.test", "30"]
    options = ["--data", "procedural", *sizes, "--procedural.label-noise", "1e-1"]
    assert main(["train", *SMALL, *options, "--out", str(tmp_path / "first")]) == 0
    config = tmp_path / "first" / "config.yaml"
    written = yaml.safe_load(config.read_text())
    expected = {"train": 40, "test": 30, "classes": 10, "difficulty": 0.75, "label_noise": 0.1, "seed": 0}
    assert written["procedural"] == expected
    again = ["--config", str(config), "--procedural.seed", "7", "--out", str(tmp_path / "second")]
    assert main(["train", *again]) == 0
    written = yaml.safe_load((tmp_path / "second" / "config.yaml").read_text())
    assert written["procedural"] == {**expected, "seed": 7}


@pytest.mark.usefixtures("small_digits")
def test_train_writes_a_run_that_its_own_config_repeats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["train", *SMALL, "--layers", "relu3,relu4", "--seed=3", "--out", str(first)]) == 0
    output = capsys.readouterr().out
    assert "relu3#0  relu4#0" in output
    assert f"results: {first}" in output
    assert {path.name for path in first.iterdir()} == {
        "config.yaml", "metrics.jsonl", "summary.json", "weights.pt",
    }  # fmt: skip
    assert yaml.safe_load((first / "config.yaml").read_text())["layers"] == ["relu3", "relu4"]
    assert main(["train", "--config", str(first / "config.yaml"), "--out", str(second)]) == 0
    runs = [json.loads((directory / "summary.json").read_text()) for directory in (first, second)]
    for run in runs:
        for key in [key for key in run if "_ms" in key or "percent" in key or "second" in key]:
            del run[key]
    assert runs[0] == runs[1]


@pytest.mark.usefixtures("small_digits")
def test_results_are_not_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "run")
    assert main(["train", *SMALL, "--out", out]) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert "holds a run with other options (seed: 0 there, 1 now)" in mistake(
        capsys, "train", *SMALL, "--seed", "1", "--out", out
    )
    assert main(["train", *SMALL, "--out", out]) == 0
    assert "b16-s0: done already, nothing is trained again" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert main(["train", *SMALL, "--seed", "1", "--out", out, "--overwrite"]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["seed"] == 1


@pytest.mark.usefixtures("small_digits")
def test_a_path_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    sentence = mistake(capsys, "train", *SMALL, "--out", str(tmp_path / "file" / "run"))
    assert str(tmp_path / "file") in sentence


@pytest.mark.usefixtures("small_digits")
def test_sweep_prints_table_and_report(
    tmp_path: Path, reports: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    sizes = ["--batch-sizes", "16,full", "--seeds", "0,1", "--steps", "2", "--probe-size", "24"]
    assert main(["sweep", *sizes, "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"report: {out / 'report.html'}"
    assert any(line.split()[:3] == ["48", "1", "2"] for line in lines)
    assert reports == [out]
    assert yaml.safe_load((out / "sweep.yaml").read_text())["batch_sizes"] == [16, "full"]


def test_demo_is_the_sweep_of_the_issue(
    tmp_path: Path, reports: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bsgap_kernels.lab import sweep

    asked = []
    monkeypatch.setattr(
        sweep, "sweep", lambda config, directory, stop: asked.append((config, directory)) or []
    )
    assert main(["demo", "--out", str(tmp_path)]) == 0
    (config, directory), output = asked[0], capsys.readouterr().out
    assert directory == tmp_path
    assert (config.data, config.model, config.batch_sizes, config.seeds) == (
        "digits",
        "lenet5",
        [16, 128, "full"],
        [0],
    )
    assert (config.epochs, config.steps, config.every) == (None, cli.DEMO_STEPS, 1)
    assert (config.until_fitted, config.metrics, config.certify) == (0.99, ["near_rank"], False)
    assert "(99 % train accuracy, at most 1000 steps)" in output
    assert f"Results go to {tmp_path}" in output
    assert output.splitlines()[-1] == f"report: {tmp_path / 'report.html'}"


def test_report(tmp_path: Path, reports: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"report: {tmp_path / 'report.html'}\n"
    (tmp_path / "empty").mkdir()
    assert "bsgap report: nothing to report in empty" in mistake(capsys, "report", str(tmp_path / "empty"))


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"]
    assert found["backends"]["threads"] >= 1
    assert main(["info"]) == 0
    assert f"torch: {found['versions']['torch']}" in capsys.readouterr().out


@pytest.mark.usefixtures("small_digits")
def test_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bsgap_kernels.lab import loop

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Loop, "_update", stop)
    assert main(["train", *SMALL, "--out", str(tmp_path / "run")]) == 130
    assert "stopped; what was measured until then is kept" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "stopped"


def test_a_package_that_is_not_installed() -> None:
    with pytest.raises(
        UserError, match=r"no_such_package is not installed; .*pip install 'bsgap_kernels\[lab\]'"
    ):
        require("no_such_package.module")


def test_a_bug_is_not_hidden_as_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arguments: list[str]) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "_info", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["info"])


def test_default_directory_is_new_and_named_after_the_time() -> None:
    assert cli._directory("demo", None).parent == Path("runs")
    assert cli._directory("demo", None).name.startswith("demo-2")


def test_help_of_the_module(capsys: pytest.CaptureFixture[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    command = [sys.executable, "-m", "bsgap_kernels", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stderr) == (0, "")
    assert main(["--help"]) == 0
    assert result.stdout == capsys.readouterr().out
    assert "usage: bsgap COMMAND" in result.stdout


def test_help_imports_nothing_that_it_does_not_print() -> None:
    code = """if True:
        import sys, torch
        before = set(sys.modules)
        from bsgap_kernels.cli import main
        main(["--help"])
        print("imported:", *sorted(set(sys.modules) - before))
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = result.stdout.rpartition("imported: ")[2].split()
    ours = [name for name in imported if name.startswith("bsgap_kernels.")]
    assert "bsgap_kernels.cli" in ours
    # What the exit codes need, and no trainer, benchmark, compiler or data set.
    lab = {"bsgap_kernels.lab", *(f"bsgap_kernels.lab.{name}" for name in ("checks", "optional", "stop"))}
    assert {name for name in ours if name.split(".")[1] in ("lab", "bench")} == lab
    others = {name.partition(".")[0] for name in imported} - {"bsgap_kernels", *sys.stdlib_module_names}
    assert not others


def test_help_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="^0$"):
        main(["train", "--help"])
    captured = capsys.readouterr()
    assert "--probe_every" in captured.out
    assert captured.err == ""


def test_a_mistake_at_the_shell_has_no_traceback() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    command = [sys.executable, "-m", "bsgap_kernels", "train", "--lr", "abc"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "bsgap train: lr: got 'abc', expected a number or null\n"
