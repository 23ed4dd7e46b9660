"""Result files: rows, directories that are never destroyed silently, and the sweep."""

import json
import math
from pathlib import Path

import pytest
from lab_data import quick_sharpness, small_data

from bsgap_kernels.lab.config import SweepConfig, UserError
from bsgap_kernels.lab.results import MetricWriter, write_summary
from bsgap_kernels.lab.sweep import format_table, sweep
from bsgap_kernels.tracking import SiteRecord
from bsgap_kernels.tracking.sinks import jsonl


def test_rows_are_json_and_non_finite_values_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    values = [1, -1, 0.1, 1e-300, 1e22, math.nan, math.inf, -math.inf]
    with MetricWriter(path, 'odd "name"', attempt=2) as writer:
        for step, value in enumerate(values):
            writer.add(step, "relu#0", "probe.ratio", value)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["value"] for row in found] == [1, -1, 0.1, 1e-300, 1e22, None, None, None]
    assert found[3] == {
        "run": 'odd "name"', "attempt": 2, "step": 3, "site": "relu#0", "metric": "probe.ratio",
        "value": 1e-300,
    }  # fmt: skip


def test_rows_reach_the_file_when_the_block_raises(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"

    def measure() -> None:
        with MetricWriter(path, "r") as writer:
            writer.add(0, "", "lr", 0.1)
            assert path.read_text() == ""
            raise KeyError

    with pytest.raises(KeyError):
        measure()
    assert len(path.read_text().splitlines()) == 1


def test_rows_of_slow_steps_reach_the_file_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    record = SiteRecord((4, 3), 2, 2, 2, 2 / 3, {"sigma_max": 1.0}, 0.0)
    now = [100.0]
    monkeypatch.setattr(jsonl.time, "monotonic", lambda: now[0])
    with MetricWriter(path, "r") as writer:
        writer.add_records(0, "batch", {"relu#0": record}, certified=True)
        assert path.read_text() == ""
        now[0] += jsonl._SECONDS_BETWEEN_FLUSHES + 0.1
        writer.add_records(1, "batch", {"relu#0": record}, certified=True)
        assert len(path.read_text().splitlines()) == 10


def test_summary_has_no_nan(tmp_path: Path) -> None:
    write_summary(tmp_path / "summary.json", {"a": math.nan, "sites": [{"ratio": math.inf}], "b": 1})
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "a": None,
        "sites": [{"ratio": None}],
        "b": 1,
    }
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


@pytest.fixture
def small_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bsgap_kernels.lab.setup.load_data", lambda *arguments, **options: small_data())


@pytest.mark.usefixtures("small_digits")
def test_sweep_runs_every_batch_size_with_every_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = SweepConfig(batch_sizes="16,full", seeds="0,1", epochs=2, probe_size=24)
    summaries = sweep(settings, tmp_path)
    assert [(s["run"], s["batch_size"], s["seed"], s["steps"]) for s in summaries] == [
        ("b16-s0", 16, 0, 6), ("b16-s1", 16, 1, 6), ("bfull-s0", 48, 0, 2), ("bfull-s1", 48, 1, 2),
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "b16-s0", "b16-s1", "bfull-s0", "bfull-s1", "sweep.yaml",
    ]  # fmt: skip
    assert "b16-s0: step 6/6, loss" in capsys.readouterr().out
    lines = format_table(summaries).splitlines()
    for title in ("batch size", "steps", "train acc", "test acc", "gap", "relu1#0", "relu4#0"):
        assert title in lines[0]
    assert "ended" not in lines[0]
    costs = lines[lines.index("") + 1 :]
    assert costs[0].split()[3:] == [
        *("step", "ms", "metric", "ms", "metric", "%", "floor", "ms", "probe", "ms", "probes")
    ]
    assert [costs[2].split()[place] for place in (0, 1, -1)] == ["16", "0", "7"]
    assert costs[2].split()[4] == f"{summaries[0]['metric_percent_of_step']:.1f}"
    assert lines[2].split()[:3] == ["16", "0", "6"]
    assert lines[5].split()[:3] == ["48", "1", "2"]
    assert f"{summaries[0]['sites'][1]['ratio']:.3f}" in lines[2]
    assert sweep(settings, tmp_path) == json.loads(json.dumps(summaries))
    assert "step" not in capsys.readouterr().out  # nothing is trained again
    sweep(SweepConfig(batch_sizes="full", epochs=1, probe_size=24, overwrite=True), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bfull-s0", "sweep.yaml"]


@pytest.mark.usefixtures("small_digits")
def test_sharpness_of_a_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every run, once; and the curves between the ends of the first seed."""
    quick_sharpness(monkeypatch, hessian=False)
    options = {"batch_sizes": "full,16,24", "steps": 2, "probe_size": 24, "layers": "relu4"}
    sweep(SweepConfig(**options, seeds="1,0", sharpness=True, sharpness_images=32), tmp_path)
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json"))
    runs = [f"b{size}-s{seed}" for size in (16, 24, "full") for seed in (0, 1)]
    expected = [f"{run}/{name}.json" for run in runs for name in ("sharpness", "summary")]
    assert files == sorted([*expected, "curves/b16-s1--bfull-s1.json"])
    record = json.loads((tmp_path / "b24-s0" / "sharpness.json").read_text())
    assert (record["images"], record["of"]) == (32, 48)
    assert (
        record["weights_sha256"]
        == json.loads((tmp_path / "b24-s0" / "summary.json").read_text())["weights_sha256"]
    )
    assert capsys.readouterr().out.count("sharpness measured") == 6
    sweep(SweepConfig(**options, seeds="1,0", sharpness=True, sharpness_images=32), tmp_path)
    assert "measured" not in capsys.readouterr().out
    sweep(SweepConfig(**options, seeds="0", sharpness=True, sharpness_images=16), tmp_path)
    said = capsys.readouterr().out
    assert said.count("sharpness measured") == 3
    assert "b16-s0, bfull-s0: loss between them drawn" in said
    with pytest.raises(UserError, match="sharpness_images: got 49, expected at most the 48 training images"):
        sweep(SweepConfig(**options, sharpness=True, sharpness_images=49), tmp_path)


@pytest.mark.usefixtures("small_digits")
def test_equal_steps(tmp_path: Path) -> None:
    summaries = sweep(SweepConfig(batch_sizes="16,full", steps=3, probe_size=24), tmp_path)
    assert [s["steps"] for s in summaries] == [3, 3]
    assert [s["epochs"] for s in summaries] == [1.0, 3.0]


@pytest.mark.usefixtures("small_digits")
def test_a_mistake_in_the_last_run_costs_no_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batch_size: got 64, expected at most the 48"):
        sweep(SweepConfig(batch_sizes="16,64", probe_size=24), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_table_of_a_run_that_was_stopped_early() -> None:
    summary = {
        "method": "sgd", "batch_size": 16, "seed": 0, "steps": 0, "train_accuracy": None,
        "test_accuracy": None, "generalization_gap": None, "sites": [], "metric_percent_of_step": None,
        "until_fitted": None, "ended": None, "step_ms": 0.0, "metric_ms_per_step": None,
        "metric_floor_ms": None, "probe_ms": None, "probes": 0,
    }  # fmt: skip
    cells = ["16", "0", "0", "-", "-", "-"]
    lines = format_table([summary]).splitlines()
    assert lines[2].split() == cells
    assert lines[7].split() == ["16", "0", "0", "-", "-", "-", "-", "0"]
    two = format_table([summary, {**summary, "method": "adam"}]).splitlines()
    assert two[0].split()[0] == "method"
    assert [line.split() for line in two[2:4]] == [["sgd", *cells], ["adam", *cells]]
