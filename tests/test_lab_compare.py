"""Comparisons: which runs there are at which learning rates, and what is said of each method."""

import json
import math
import shutil
from pathlib import Path

import pytest
from lab_data import quick_sharpness, small_data

from bsgap_kernels.cli import main
from bsgap_kernels.lab.comparison import cells_of, compare, format_comparison
from bsgap_kernels.lab.config import SweepConfig, TrainConfig, UserError

pytest.importorskip("jsonargparse")


def kinds(config: SweepConfig) -> list[tuple[str, int | str, int, float | None]]:
    return [(run.method, run.batch_size, run.seed, run.lr) for run in config.runs()]


def test_reference_and_learning_rates_of_single_methods() -> None:
    config = SweepConfig(
        methods="adam,legw", batch_sizes="64", seeds="0,1", reference=16, lr=0.5, lrs="legw=0.1, sgd=0.02"
    )
    assert kinds(config) == [
        ("sgd", 16, 0, 0.02), ("sgd", 16, 1, 0.02),
        ("adam", 64, 0, 0.5), ("adam", 64, 1, 0.5),
        ("legw", 64, 0, 0.1), ("legw", 64, 1, 0.1),
    ]  # fmt: skip


def test_a_reference_that_is_there_already_is_no_second_run() -> None:
    config = SweepConfig(methods="adam,sgd", batch_sizes="16,64", reference="16")
    names = [run.run for run in config.runs()]
    assert names == ["b16-s0", "adam-b16-s0", "adam-b64-s0", "b64-s0"]


def test_methods_without_a_rate_have_their_own() -> None:
    config = SweepConfig(methods="sgd,adam", batch_sizes="64", lrs={"sgd": 0.02})
    own = TrainConfig(method="adam").lr
    assert own not in (None, 0.02)
    assert kinds(config) == [("sgd", 64, 0, 0.02), ("adam", 64, 0, own)]


def test_a_rate_at_one_batch_size() -> None:
    config = SweepConfig(
        methods="sgd,adam", batch_sizes="64", reference=16, lrs="sgd=0.02,sgd@64=0.05,adam@64=1"
    )
    assert kinds(config) == [("sgd", 16, 0, 0.02), ("sgd", 64, 0, 0.05), ("adam", 64, 0, 1.0)]


def test_options_come_back_from_their_file() -> None:
    config = SweepConfig(methods="adam", batch_sizes="64", reference=16, lrs="sgd=0.02,adam=0.001")
    again = SweepConfig.from_mapping(config.mapping())
    assert again.mapping() == config.mapping()
    assert kinds(again) == kinds(config)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"lrs": "adam=0.1", "batch_sizes": "16,64"},
            "lrs: got 'adam', expected NAME=RATE, NAME one of sgd, sgd@16, sgd@64",
        ),
        ({"lrs": "sgd"}, "lrs: got no rate for sgd, expected NAME=RATE"),
        ({"lrs": "sgd=0.1,sgd=0.2"}, "lrs: got sgd twice, expected each once"),
        ({"lrs": "sgd=fast"}, "lrs: got 'fast' for sgd, expected NAME=RATE"),
        ({"lrs": "sgd=-1"}, "lrs.sgd: got -1.0, expected a finite number of at least 0"),
        ({"lrs": "sgd=nan"}, "lrs.sgd: got nan, expected a finite number of at least 0"),
        ({"reference": 0}, "reference: got 0, expected an integer of at least 1, or full, or null for none"),
    ],
)
def test_mistakes(options: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        SweepConfig(**options)  # type: ignore[arg-type]
    assert str(caught.value) == sentence


def run_of(method: str, seed: int, **values: object) -> dict[str, object]:
    run: dict[str, object] = {
        "method": method, "batch_size": 256, "seed": seed, "lr": 0.1, "test_accuracy": 0.9,
        "generalization_gap": 0.05, "sharpness": 12.3456, "gradient_images": 20480, "train_seconds": 2.0,
        "near_rank_path": [[0, 0.75], [3, 0.5], [6, 0.25], [10, 0.125]],
    }  # fmt: skip
    return run | values


def test_means_and_intervals_over_seeds() -> None:
    runs = [run_of("sgd", 0), run_of("sgd", 1), run_of("adam", 0, test_accuracy=0.8)]
    runs.append(run_of("adam", 1, test_accuracy=0.9))
    lines = format_comparison(runs).splitlines()
    path = "0.750 → 0.500 → 0.250 → 0.125"
    assert " ".join(lines[2].split()) == f"sgd 256 0.1 90.0 ± 0.0 5.0 ± 0.0 {path} 12.3 ± 0 20,480 2.0"
    # t(0.975, 1) · s / √2 = 12.706 · 7.071 / 1.414 in percent.
    assert lines[3].split()[:6] == ["adam", "256", "0.1", "85.0", "±", "63.5"]
    assert list(cells_of(runs)) == [("sgd", 256), ("adam", 256)]


def test_reads_that_are_far_from_a_third_are_a_dash() -> None:
    few = [
        run_of("sgd", 0, near_rank_path=[[30, 0.5]]),
        run_of("adam", 0, near_rank_path=[[0, 0.5], [30, None]]),
    ]
    lines = format_comparison(few).splitlines()
    assert "- → - → - → 0.500" in lines[2]
    assert "0.500 → - → - → -" in lines[3]


def test_what_diverged_is_named() -> None:
    runs = [
        run_of("sgd", 0, train_loss=math.nan),
        run_of("sgd", 1, train_loss=0.1),
        run_of("adam", 2, train_loss=None),
    ]
    assert format_comparison(runs).splitlines()[-1] == (
        "Diverged, the training loss at the end is not finite: sgd at 256, seed 0; adam at 256, seed 2."
    )
    assert "Diverged" not in format_comparison(runs[1:2])


def test_what_was_to_be_fitted_and_is_not_is_named() -> None:
    runs = [
        run_of("sgd", 0, until_fitted=0.99, ended="fitted"),
        run_of("adam", 1, until_fitted=0.99, ended="budget"),
        run_of("adam", 2, until_fitted=0.99, ended="stalled"),
    ]
    said = "Not fitted when they ended, so not as well trained as the others: "
    assert format_comparison(runs).splitlines()[-1] == f"{said}adam at 256, seed 1; adam at 256, seed 2."
    assert "Not fitted" not in format_comparison([runs[0], run_of("adam", 1, ended="budget")])


def test_no_negative_zero() -> None:
    assert " 0.0 " in format_comparison([run_of("sgd", 0, generalization_gap=-1e-5)]).splitlines()[2]


def test_what_is_missing_is_a_dash() -> None:
    lost = run_of("sgd", 0, test_accuracy=None, sharpness=None, near_rank_path=[])
    cells = format_comparison([lost]).splitlines()[2].split()
    assert cells == ["sgd", "256", "0.1", "-", "5.0", "-", "-", "20,480", "2.0"]


def test_a_comparison_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bokeh")
    monkeypatch.setattr("bsgap_kernels.lab.setup.load_data", lambda *arguments, **options: small_data())
    quick_sharpness(monkeypatch, hessian=False)
    out = tmp_path / "compare"
    options = "--methods sgd,fb-reg --batch 24 --reference 8 --steps 3 --seeds 0,1 --probe-size 24"
    assert main(["compare", *options.split(), "--out", str(out)]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    content = json.loads((out / "comparison.json").read_text())
    assert (content["model"], content["data"], content["budget"]) == ("lenet5", "digits", "3 steps")
    runs = content["runs"]
    assert [(run["method"], run["batch_size"], run["seed"]) for run in runs] == [
        ("sgd", 8, 0), ("sgd", 8, 1), ("sgd", 24, 0), ("sgd", 24, 1), ("fb-reg", 24, 0), ("fb-reg", 24, 1),
    ]  # fmt: skip
    # The penalty's finite difference takes every gradient twice.
    assert [run["gradient_images"] for run in runs] == [24, 24, 72, 72, 144, 144]
    for run, name in zip(runs[::2], ("b8-s0", "b24-s0", "fb-reg-b24-s0"), strict=True):
        summary = json.loads((out / name / "summary.json").read_text())
        assert run["test_accuracy"] == summary["test_accuracy"]
        assert run["train_seconds"] == summary["train_seconds"]
        ratios = [site["ratio"] for site in summary["sites"]]
        assert math.isclose(run["near_rank_ratio"], sum(ratios) / len(ratios))
        steps, path = zip(*run["near_rank_path"], strict=True)
        assert steps == (0, 1, 2, 3)
        assert math.isclose(path[-1], run["near_rank_ratio"])
        sharpness = json.loads((out / name / "sharpness.json").read_text())["sharpness"]
        full = [entry["phi"] for entry in sharpness if (entry["space"], entry["epsilon"]) == ("full", 1e-3)]
        assert math.isclose(run["sharpness"], full[0])
    rows = [line.split() for line in printed.splitlines()]
    assert [row[:2] for row in rows if row and row[0] in ("sgd", "fb-reg")] == [
        ["sgd", "8"], ["sgd", "24"], ["fb-reg", "24"],
    ]  # fmt: skip
    assert (out / "report.html").is_file()
    assert '"batch.near_rank"' not in (out / "b8-s0" / "metrics.jsonl").read_text()  # of the probe alone
    # Again: everything is there, nothing is trained, the same is said.
    assert main(["compare", *options.split(), "--out", str(out)]) == 0
    assert json.loads((out / "comparison.json").read_text()) == content
    # Its directory is cleared like that of any sweep, runs of methods with a hyphen too.
    assert main(["compare", *options.split(), "--out", str(out), "--overwrite", "--methods", "sgd"]) == 0
    assert not (out / "fb-reg-b24-s0").exists()
    assert len(json.loads((out / "comparison.json").read_text())["runs"]) == 4


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ("--methods sgd", "--methods adam", None),
        ("--methods sgd --lrs sgd=0.1", "--methods sgd,adam --lrs sgd=0.1", None),
        ("--methods sgd --lrs sgd@8=0.1", "--methods sgd --batch 8,24 --lrs sgd@8=0.1", None),
        ("--methods sgd --lrs sgd=0.1", "--methods adam,sgd --lrs sgd=0.2", "lr: 0.1 there, 0.2 now"),
        ("--methods sgd", "--methods adam --rtol 0.1", "rtol: 0.01 there, 0.1 now"),
    ],
)
def test_a_comparison_is_extended(
    first: str, second: str, told: str | None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pytest.importorskip("bokeh")
    monkeypatch.setattr("bsgap_kernels.lab.setup.load_data", lambda *arguments, **options: small_data())
    shared = "--batch 8 --reference null --steps 1 --probe-size 12 --sharpness false --model mlp --out"
    assert main(["compare", *shared.split(), str(tmp_path / "out"), *first.split()]) == 0
    code = main(["compare", *shared.split(), str(tmp_path / "out"), *second.split()])
    assert (code, told or "") == (2 if told else 0, told if told and told in capsys.readouterr().err else "")


def test_a_run_that_fails_does_not_cost_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bokeh")
    monkeypatch.setattr("bsgap_kernels.lab.setup.load_data", lambda *arguments, **options: small_data())
    out = tmp_path / "out"
    options = "--batch 8 --reference null --steps 1 --probe-size 12 --sharpness false --model mlp --methods"
    command = ["compare", *options.split(), "sgd,adam", "--out", str(out)]
    (out / "adam-b8-s0").mkdir(parents=True)
    assert main(command) == 2  # a stranger's directory is refused whole
    shutil.rmtree(out)
    assert main([*command[:-3], "sgd", "--out", str(out)]) == 0
    (out / "adam-b8-s0").mkdir()
    (out / "adam-b8-s0" / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert main(command) == 2
    captured = capsys.readouterr()
    assert "1 of 2 runs failed (adam-b8-s0: " in captured.err
    assert "sgd" in captured.out
    assert [run["method"] for run in json.loads((out / "comparison.json").read_text())["runs"]] == ["sgd"]


@pytest.mark.parametrize("budget", [{"steps": 3}, {"epochs": 2}, {}])
def test_a_budget_from_a_file(
    budget: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[SweepConfig] = []
    monkeypatch.setattr("bsgap_kernels.cli._run_sweep", lambda config, *rest: asked.append(config) or 0)
    path = tmp_path / "options.yaml"
    path.write_text("\n".join(f"{name}: {value}" for name, value in {"methods": "sgd", **budget}.items()))
    assert main(["compare", "--config", str(path)]) == 0
    assert (asked[0].steps, asked[0].epochs) == (
        budget.get("steps"),
        budget.get("epochs", None if budget else 60),
    )


def test_methods_without_sharpness_and_a_path(tmp_path: Path) -> None:
    summary = {"run": "b8-s0", "method": "sgd", "batch_size": 8, "seed": 0, "sites": []}
    (run,) = compare([summary], tmp_path)
    assert run["sharpness"] is run["near_rank_ratio"] is run["test_accuracy"] is None
    assert run["near_rank_path"] == []
