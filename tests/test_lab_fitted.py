"""Runs that end once they fit their training set: the rule, its options and state, what is said of it."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import lab_stops
import pytest
from lab_data import small_data
from torch import nn

from bsgap_kernels import cli
from bsgap_kernels.lab import loop, setup
from bsgap_kernels.lab.config import SweepConfig, TrainConfig, UserError
from bsgap_kernels.lab.fitted import BUDGET, FITTED, STALLED, UntilFitted
from bsgap_kernels.lab.setup import set_up
from bsgap_kernels.lab.stop import Stop
from bsgap_kernels.lab.study.plan import load_plan
from bsgap_kernels.lab.sweep import format_table, sweep
from bsgap_kernels.lab.train import train

TARGET = 0.9


def config(**options: Any) -> TrainConfig:
    """Three updates an epoch, the layers read at the end alone."""
    given = {"batch_size": 16, "probe_size": 24, "epochs": 60, "lr": 0.05, "until_fitted": TARGET}
    return TrainConfig(**{**given, "every": None, "probe_every": None, "layers": ["relu4"], **options})


def accuracies(directory: Path) -> list[float]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row["value"] for row in rows if row["metric"] == "train_eval.accuracy"]


def test_the_rule() -> None:
    rule = UntilFitted(0.9, 2)
    losses = [(2.0, 0.1), (1.0, 0.5), (1.0, 0.5), (0.9, 0.5), (1.5, 0.89), (0.95, 0.5)]
    assert [rule.after(*values) for values in losses] == [None] * 5 + [STALLED]
    assert rule.after(5.0, 0.9) == FITTED
    assert UntilFitted(0.9, None).after(math.nan, 0.1) == STALLED
    patient = UntilFitted(0.9, None)
    assert {patient.after(1.0, 0.1) for _ in range(100)} == {None}
    assert UntilFitted(None, 1).after(math.nan, 1.0) is None


def test_a_run_ends_at_the_first_evaluation_that_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And is, until there, the run of so many steps."""
    found = train(config(), tmp_path / "fitted", data=small_data())
    *before, last = accuracies(tmp_path / "fitted")
    assert last == found["train_accuracy"] >= TARGET > max(before)
    assert (found["ended"], found["status"]) == (FITTED, "finished")
    assert found["steps"] == 3 * (len(before) + 1) < 180
    said = f"b16-s0: fitted: train accuracy {last:.3f} after {found['steps']} updates"
    assert said in capsys.readouterr().out
    plain = config(until_fitted=None, epochs=None, steps=found["steps"])
    whole = train(plain, tmp_path / "steps", data=small_data())
    assert whole["weights_sha256"] == found["weights_sha256"]
    assert (whole["ended"], whole["until_fitted"]) == (BUDGET, None)
    assert "fitted" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "ended", "steps"),
    [
        ({"lr": 0.0, "patience": 2}, STALLED, 9),  # three evaluations, of which two are no better
        ({"lr": 1e30}, STALLED, 3),  # not finite
        ({"lr": 0.0, "patience": 2, "epochs": 2}, BUDGET, 6),
        ({"lr": 0.0, "patience": 1, "epochs": 2}, STALLED, 6),
        ({"lr": 0.0, "patience": 2, "eval_every": 2}, STALLED, 18),
    ],
)
def test_what_does_not_get_there_says_so(
    options: dict[str, Any], ended: str, steps: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = train(config(**options), tmp_path, data=small_data())
    assert (found["ended"], found["steps"], found["status"]) == (ended, steps, "finished")
    assert json.loads((tmp_path / "summary.json").read_text())["ended"] == ended
    assert "b16-s0: not fitted: its " in capsys.readouterr().out


@pytest.mark.parametrize(
    "options", [{"lr": 0.0, "patience": 3}, {"eval_every": 2}], ids=["stalled", "fitted"]
)
def test_the_rule_goes_on_with_a_run(options: dict[str, Any], tmp_path: Path) -> None:
    """A run that is stopped, beside and at an evaluation, ends where the undisturbed one does."""
    whole = lab_stops.assert_goes_on(config(**options), (4, 7, 9), tmp_path)
    assert whole["steps"] > 9
    assert {
        json.loads((tmp_path / str(step) / "summary.json").read_text())["ended"] for step in (4, 7, 9)
    } == {whole["ended"]}


def small_network(*_: Any) -> nn.Module:
    """Few enough parameters for `subset` on few images."""
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(49, 3), nn.Tanh(), nn.Linear(3, 10))


def test_an_evaluation_before_an_update_that_was_left_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes during an evaluation, and the method leaves the update that follows."""
    monkeypatch.setattr(setup, "build_model", small_network)
    hyper = {"subset": {"restart": 1, "iterations": 60}}
    settings = config(method="subset", patience=1, until_fitted=1.0, epochs=40, layers=None, hyper=hyper)
    whole = train(settings, tmp_path / "whole", data=small_data())
    stop, evaluate = Stop(), loop.Loop._evaluate

    def stopped(self: Any, *arguments: Any) -> Any:
        stop.ask(signal.SIGTERM)
        return evaluate(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_evaluate", stopped)
        assert train(settings, tmp_path / "parts", data=small_data(), stop=stop)["status"] == "stopped"
    found = train(settings, tmp_path / "parts", data=small_data())
    assert (found["ended"], found["steps"], found["probes"]) == (
        whole["ended"],
        whole["steps"],
        whole["probes"],
    )


def test_a_run_that_is_stopped_has_no_end_yet(tmp_path: Path) -> None:
    assert lab_stops.train_until(2, tmp_path, config())["ended"] is None


def test_options() -> None:
    assert TrainConfig(until_fitted=0.99).budget == "99 % train accuracy, at most 200 epochs"
    assert TrainConfig(until_fitted=0.5, steps=70).budget == "50 % train accuracy, at most 70 steps"
    assert config().differences(config(until_fitted=0.8)) == ["until_fitted: 0.8 there, 0.9 now"]
    # Schedules go by the most updates that a run may take.
    assert set_up(config(method="legw", epochs=None, steps=90), small_data()).steps == 90
    for options, message in (
        (
            {"until_fitted": 1.5},
            "until_fitted: got 1.5, expected a finite number of at least 0 and at most 1",
        ),
        ({"patience": 0}, "patience: got 0, expected an integer of at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            config(**options)


def test_the_command_line() -> None:
    parsed = cli._parse_options("train", TrainConfig, ["--until-fitted", "--steps", "5"])
    assert (parsed.until_fitted, parsed.steps, parsed.epochs) == (0.99, 5, None)
    parsed = cli._parse_options("train", TrainConfig, ["--until-fitted", "0.8"])
    assert (parsed.until_fitted, parsed.epochs) == (0.8, 200)
    compared = cli._parse_options("compare", SweepConfig, ["--until-fitted"], cli._COMPARED, epochs=60)
    assert (compared.until_fitted, compared.epochs) == (0.99, 200)


def test_a_study_may_have_such_a_budget() -> None:
    plan = load_plan()
    experiment = plan.experiments[1]
    experiment.budgets["until fitted"] = {"steps": 500, "until_fitted": 0.95}
    made = experiment.sweep("until fitted", plan)
    assert (made.until_fitted, made.steps, made.epochs) == (0.95, 500, None)
    assert {run.until_fitted for run in made.runs()} == {0.95}


def test_the_table_of_a_sweep_says_how_runs_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bsgap_kernels.lab.setup.load_data", lambda *_, **__: small_data())
    options = {"batch_sizes": "16,full", "probe_size": 24, "every": None, "probe_every": None, "lr": 0.05}
    summaries = sweep(SweepConfig(**options, steps=60, until_fitted=TARGET), tmp_path)
    lines = format_table(summaries).splitlines()
    assert lines[0].split()[3:6] == ["steps", "ended", "train"]
    ends = {line.split()[0]: line.split()[3] for line in lines[2:4]}
    assert ends == {str(summary["batch_size"]): summary["ended"] for summary in summaries}
    assert ends["16"] == FITTED
    assert any(line.startswith("ended: ") for line in lines)
