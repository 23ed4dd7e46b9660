"""The study: its plan, effects on runs whose effect is known, verdicts that follow from intervals alone."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import study_page
import yaml
from lab_data import quick_sharpness

from bsgap_kernels.lab.checks import UserError
from bsgap_kernels.lab.stop import Stop, StoppedError
from bsgap_kernels.lab.study import command
from bsgap_kernels.lab.study import run as run_module
from bsgap_kernels.lab.study.analysis import (
    NONE,
    OPPOSITE,
    SHOWN,
    SMALL,
    UNKNOWN,
    effects,
    judge,
    mean_interval,
    measures_of,
    slope_per_doubling,
    training_spread,
    verdict,
)  # fmt: skip
from bsgap_kernels.lab.study.command import main
from bsgap_kernels.lab.study.page import layers, outcomes, verdicts
from bsgap_kernels.lab.study.plan import PLAN, Hypothesis, Plan, load_plan
from bsgap_kernels.lab.study.run import cells, run_study, write_result

stats = pytest.importorskip("scipy.stats")
SIZES = (8, 32, 128, 512, 2048)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return load_plan()


def hypothesis(**options: Any) -> Hypothesis:
    given = {"direction": "falls", "margin": 0.01, "primary": True, "measure": "test_accuracy", **options}
    return Hypothesis(name="h", claim="c", source="s", **given)


def runs_with(slope: float, noise: float = 0.0, seeds: int = 5, **more: Any) -> list[dict[str, Any]]:
    """Runs whose test accuracy has this slope a doubling, and whose near-rank has twice as much."""
    chooser = random.Random(1)
    return [
        {
            "experiment": "e", "budget": "b", "batch_size": size, "seed": seed,
            "measures": {
                "test_accuracy": 0.8 + slope * math.log2(size) + noise * chooser.gauss(0, 1),
                "near_rank_ratio": 0.5 + 2 * slope * math.log2(size),
                "train_accuracy": 0.9,
                **more,
            },
        }
        for seed in range(seeds) for size in SIZES
    ]  # fmt: skip


# -- the plan


def test_the_plan_is_what_the_issue_asks_for(plan: Plan) -> None:
    assert len(plan.seeds) >= 5
    assert {experiment.options["model"] for experiment in plan.experiments} == {"cnn", "lenet5"}
    for experiment in plan.experiments:
        assert len(experiment.batch_sizes) == 5
        kinds = [tuple(budget) for budget in experiment.budgets.values()]
        assert kinds == [("epochs",), ("steps",)]
    procedural = plan.experiments[0].options["procedural"]
    assert procedural["train"] >= 10_000
    assert procedural["test"] >= 20_000
    assert plan.primary_tests == 12
    assert [plan.level(h) for h in plan.hypotheses if h.primary] == [pytest.approx(1 - 0.05 / 12)] * 3
    assert len(list(cells(plan))) == 4


def damaged(change: Any, tmp_path: Path) -> Path:
    content = yaml.safe_load(PLAN.read_text(encoding="utf-8"))
    change(content)
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda plan: plan.pop("alpha"), "lacks 'alpha'"),
        (lambda plan: plan.update(alpha=1.5), "alpha: got 1.5, expected"),
        (lambda plan: plan.update(alpha=0), "alpha: got 0, expected"),
        (lambda plan: plan["hypotheses"][0].update(direction="sinks"), "direction: got 'sinks', expected"),
        (lambda plan: plan["hypotheses"][0].update(measure="luck"), "measure: got 'luck', expected one of"),
        (lambda plan: plan["experiments"][0].update(lr=-1), "lr: got -1, expected"),
        (lambda plan: plan["experiments"][0].update(modle="cnn"), "modle: unknown option"),
        (lambda plan: plan["experiments"][0].pop("budgets"), "lacks 'budgets'"),
        (lambda plan: plan.update(experiments=3), "is not of the form of a plan"),
    ],
)
def test_a_damaged_plan_is_named(change: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        load_plan(damaged(change, tmp_path))
    assert main(["--plan", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_a_missing_plan_and_mistakes_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["--plan", str(tmp_path / "none")], ["--jobs", "0"], ["--bogus"]):
        assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "looked at" in lines[0]
    assert "jobs: got 0, expected an integer of at least 1" in lines[1]
    assert "unrecognized arguments: --bogus" in lines[2]


def test_a_missing_plotting_library_shows_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "bokeh" or ".lab.report" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bokeh", None)
    assert main(["--out", str(tmp_path / "out")]) == 2
    assert "bsgap study: bokeh is not installed; install it by" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_second_interrupt_ends_the_study_quietly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*given: Any, **options: Any) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(command, "run_study", interrupted)
    assert main(["--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "bsgap study: stopped; what was measured until then is kept\n"


def test_a_run_that_is_stopped_from_outside_stops_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*given: Any, **options: Any) -> None:
        raise StoppedError("1 of 4 runs stopped")

    monkeypatch.setattr(run_module, "sweep", stopped)
    assert main(["--out", str(tmp_path / "out")]) == 143
    assert capsys.readouterr().err == "bsgap study: 1 of 4 runs stopped\n"


def test_one_process_runs_the_study(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([]) == 2
    assert "one process runs this command" in capsys.readouterr().err


# -- effects


def test_the_slope_is_per_doubling() -> None:
    assert slope_per_doubling([(8, 3.0), (16, 5.0), (64, 9.0)]) == pytest.approx(2.0)
    sizes, values = np.array([16, 64, 256, 1437]), np.array([0.3, 0.1, 0.4, 0.2])
    expected = np.polyfit(np.log2(sizes), values, 1)[0]
    assert slope_per_doubling(list(zip(sizes.tolist(), values.tolist(), strict=True))) == pytest.approx(
        expected
    )


@pytest.mark.parametrize("level", [0.95, 0.9958])
def test_the_interval_covers_as_often_as_it_says(level: float) -> None:
    generator = np.random.default_rng(3)
    samples = generator.normal(2.0, 3.0, size=(4000, 5))
    covered = 0
    for row in samples[:400]:
        _, lower, upper = mean_interval(row.tolist(), level)
        expected = stats.t.interval(level, 4, loc=row.mean(), scale=row.std(ddof=1) / math.sqrt(5))
        assert (lower, upper) == pytest.approx(expected)
        covered += lower <= 2.0 <= upper
    # Three standard deviations of a binomial of 400.
    assert covered / 400 >= level - 3 * math.sqrt(level * (1 - level) / 400)


def test_one_seed_has_no_interval() -> None:
    assert mean_interval([1.0], 0.95) == (1.0, -math.inf, math.inf)


def test_effects_are_those_that_the_runs_were_made_with() -> None:
    found, problems = effects(hypothesis(), runs_with(-0.02))
    assert found == pytest.approx(dict.fromkeys(range(5), -0.02))
    assert problems == []
    found, _ = effects(hypothesis(measure="near_rank_ratio", against="test_accuracy"), runs_with(-0.02))
    assert found == pytest.approx(dict.fromkeys(range(5), 1.0))


def test_a_seed_without_every_batch_size_is_left_out_and_named() -> None:
    runs = runs_with(-0.02)
    runs[2]["measures"]["test_accuracy"] = None
    del runs[-1]
    found, problems = effects(hypothesis(), runs)
    assert sorted(found) == [1, 2, 3]
    assert problems == [
        "seed 0 has no test_accuracy at batch 128", "seed 4 has no test_accuracy at batch 2048",
    ]  # fmt: skip


def test_a_correlation_with_what_does_not_vary_is_no_effect() -> None:
    found, problems = effects(hypothesis(against="train_accuracy"), runs_with(-0.02))
    assert found == {}
    assert len(problems) == 5
    assert problems[0] == "seed 0: test_accuracy or train_accuracy does not vary"


@pytest.mark.parametrize(
    ("direction", "lower", "upper", "expected"),
    [
        ("falls", -0.05, -0.02, SHOWN), ("falls", -0.05, -0.005, SMALL), ("falls", -0.05, 0.01, NONE),
        ("falls", 0.001, 0.01, OPPOSITE), ("rises", 0.02, 0.05, SHOWN), ("rises", 0.005, 0.05, SMALL),
        ("rises", -0.01, 0.05, NONE), ("rises", -0.05, -0.01, OPPOSITE),
        ("rises", -math.inf, math.inf, NONE), ("falls", -0.05, -0.01, SMALL), ("falls", -1.0, 0.0, NONE),
    ],
)  # fmt: skip
def test_verdicts_follow_from_the_interval(direction: str, lower: float, upper: float, expected: str) -> None:
    assert verdict(hypothesis(direction=direction), lower, upper) == expected


def test_measures_of_a_run() -> None:
    run = {
        "summary": {
            "sites": [{"near_rank": 5, "ratio": 0.5}, {"near_rank": 0, "ratio": 0.0}],
            "test_accuracy": 0.7, "train_accuracy": 0.9, "generalization_gap": 0.2,
        },
        "sharpness": {
            "sharpness": [
                {"space": "full", "epsilon": 1e-3, "phi": 100.0},
                {"space": "full", "epsilon": 5e-4, "phi": 7.0},
                {"space": "subspace", "epsilon": 1e-3, "phi": None},
            ],
            "hessian": {"max_eigenvalue": 10.0},
        },
    }  # fmt: skip
    found = measures_of(run)
    assert found["near_rank_ratio"] == 0.25
    assert (found["log10_sharpness_full"], found["log10_sharpness_subspace"]) == (2.0, None)
    assert found["log10_hessian"] == 1.0
    run["summary"]["sites"][0]["near_rank"] = -1  # activations that are not finite
    assert measures_of(run)["near_rank_ratio"] is None
    assert measures_of({"summary": run["summary"]})["log10_hessian"] is None


def small_plan(plan: Plan) -> Plan:
    """One experiment under one budget, named as in `runs_with`."""
    experiment = copy.copy(plan.experiments[1])
    object.__setattr__(experiment, "name", "e")
    object.__setattr__(experiment, "budgets", {"b": {"steps": 3}})
    small = copy.copy(plan)
    object.__setattr__(small, "experiments", [experiment])
    return small


def test_judging_uses_the_declared_level_and_says_what_qualifies(plan: Plan) -> None:
    small = small_plan(plan)
    judged = {entry["hypothesis"]: entry for entry in judge(small, runs_with(-0.02, noise=1e-4))}
    assert judged["accuracy"]["verdict"] == SHOWN
    assert judged["accuracy"]["level"] == pytest.approx(1 - 0.05 / 3)
    assert judged["accuracy"]["equally_trained"] is True
    assert judged["near-rank with accuracy"]["verdict"] == SHOWN
    assert judged["sharpness"]["verdict"] == UNKNOWN
    assert judged["sharpness"]["effect"] is None
    values = list(judged["accuracy"]["effects"].values())
    expected = mean_interval(values, 1 - 0.05 / 3)
    assert (
        judged["accuracy"]["effect"],
        judged["accuracy"]["lower"],
        judged["accuracy"]["upper"],
    ) == expected
    uneven = runs_with(-0.02)
    for run in uneven:
        run["measures"]["train_accuracy"] = 0.9 if run["batch_size"] < 2048 else 0.8
    assert training_spread(uneven) == pytest.approx(0.1)
    assert not judge(small, uneven)[0]["equally_trained"]


# -- the run


@pytest.mark.slow
def test_a_small_study_runs_stops_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shrink(content: dict[str, Any]) -> None:
        content["seeds"] = [0, 1]
        procedural, digits = content["experiments"]
        procedural.update(batch_sizes=[16, 64], procedural={"train": 96, "test": 64}, probe_size=32)
        procedural.update(sharpness_images=32, budgets={"equal steps": {"steps": 2}})
        digits.update(batch_sizes=[64, "full"], probe_size=32, sharpness_images=32)
        digits.update(budgets={"equal epochs": {"epochs": 1}})

    quick_sharpness(monkeypatch)
    path = damaged(shrink, tmp_path)
    arguments = ["--plan", str(path), "--out", str(tmp_path / "out"), "--jobs", "1"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert "2 of 2: lenet5-digits at equal epochs (1 epochs), 4 runs" in first
    result = json.loads((tmp_path / "out" / "study.json").read_text())
    plan = load_plan(path)
    assert result["plan_sha256"] == plan.sha256
    assert len(result["runs"]) == 8
    for run in result["runs"]:
        assert {(entry["space"], entry["epsilon"]) for entry in run["sharpness"]} == {
            ("full", 1e-3), ("full", 5e-4), ("subspace", 1e-3), ("subspace", 5e-4),
        }  # fmt: skip
        assert run["hessian"]["max_eigenvalue"] is not None
    assert len(result["hypotheses"]) == 2 * len(plan.hypotheses)
    table = verdicts(plan, result)
    assert table in first
    assert table.count("\n") == 1 + len(result["hypotheses"])
    assert outcomes(plan, result).count("\n") == 1 + 4
    assert "| equal epochs | 1437 |" in layers(plan, result)
    for name in ("cnn-procedural-equal-steps", "lenet5-digits-equal-epochs"):
        assert (tmp_path / "out" / name / "report.html").is_file()
    assert main(arguments) == 0
    again = capsys.readouterr().out
    assert again.count("done already") == 8
    written = json.loads((tmp_path / "out" / "study.json").read_text())
    for key in ("runs", "hypotheses"):
        assert written[key] == result[key]


def test_a_study_that_is_stopped_has_no_result(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = Stop()
    asked = []

    def sweep(config: Any, directory: Path, *, stop: Stop) -> None:
        asked.append(directory.name)
        if len(asked) == 2:
            stop.ask(15)

    monkeypatch.setattr(run_module, "sweep", sweep)
    assert run_study(plan, tmp_path, stop=stop) is None
    assert asked == ["cnn-procedural-equal-epochs", "cnn-procedural-equal-steps"]


def test_one_seed_or_one_size_is_judged_and_written_as_json(plan: Plan, tmp_path: Path) -> None:
    """JSON has no Infinity and no NaN."""
    small = small_plan(plan)
    runs = runs_with(-0.02, seeds=1)
    judged = judge(small, runs)
    accuracy = next(entry for entry in judged if entry["hypothesis"] == "accuracy")
    assert (accuracy["lower"], accuracy["upper"], accuracy["verdict"]) == (None, None, NONE)
    assert accuracy["effect"] == pytest.approx(-0.02)
    assert accuracy["problems"] == ["one seed has no interval"]
    result = {"runs": [{"loss": math.inf}], "hypotheses": judged, "other": math.nan}
    write_result(tmp_path / "study.json", result)

    def refuse(name: str) -> None:
        raise ValueError(name)

    written = json.loads((tmp_path / "study.json").read_text(), parse_constant=refuse)
    assert (written["runs"], written["other"]) == ([{"loss": None}], None)
    assert verdicts(small, written) == verdicts(small, {"hypotheses": judged})
    one_size = judge(small, [run for run in runs_with(-0.02) if run["batch_size"] == 8])
    assert {entry["verdict"] for entry in one_size} == {UNKNOWN}
    assert one_size[0]["problems"] == ["batch 8 is the only size"]


def test_a_result_is_written_one_run_a_line(tmp_path: Path) -> None:
    result = {"schema": 1, "runs": [{"a": 1}, {"a": 2}], "hypotheses": []}
    write_result(tmp_path / "new" / "study.json", result)
    text = (tmp_path / "new" / "study.json").read_text()
    assert json.loads(text) == result
    assert '\n  {"a": 1},\n  {"a": 2}\n' in text


# -- the committed study


def test_the_pages_are_those_of_the_committed_result() -> None:
    result = json.loads(study_page.RESULT.read_text(encoding="utf-8"))
    pages = {path: path.read_text(encoding="utf-8") for path in (study_page.PAGE, study_page.README)}
    assert study_page.written(result) == pages
    result["runs"][0]["test_accuracy"] /= 2
    changed = study_page.written(result)
    assert all(changed[path] != text for path, text in pages.items())
    with pytest.raises(ValueError, match=r"of the plan 0, plan\.yaml is"):
        study_page.written({**result, "plan_sha256": "0"})


def test_the_committed_verdicts_follow_from_the_runs(plan: Plan) -> None:
    result = json.loads(study_page.RESULT.read_text(encoding="utf-8"))
    for run in result["runs"]:
        sharpness = {"sharpness": run["sharpness"], "hessian": run["hessian"]}
        run["measures"] = measures_of({"summary": run, "sharpness": sharpness})
    again = json.loads(json.dumps(judge(plan, result["runs"])))
    assert len(again) == len(result["hypotheses"])
    for found, expected in zip(again, result["hypotheses"], strict=True):
        assert found["effects"] == pytest.approx(expected["effects"])
        for key in ("experiment", "budget", "hypothesis", "verdict", "seeds", "equally_trained"):
            assert found[key] == expected[key]


def test_the_committed_study_is_of_the_declared_size(plan: Plan) -> None:
    result = json.loads(study_page.RESULT.read_text(encoding="utf-8"))
    assert not result["modified"]
    assert result["seconds"] <= 100 * 60
    groups: dict[tuple[str, str], dict[int, set[int]]] = {}
    for run in result["runs"]:
        sizes = groups.setdefault((run["experiment"], run["budget"]), {})
        sizes.setdefault(run["batch_size"], set()).add(run["seed"])
    assert len(groups) == 4
    for sizes in groups.values():
        assert list(sizes.values()) == 5 * [set(plan.seeds)]
    small = [run["test_accuracy"] for run in result["runs"] if run["experiment"].startswith("cnn")
             and run["budget"] == "equal epochs" and run["batch_size"] == 16]  # fmt: skip
    assert 0.7 < sum(small) / len(small) < 0.9
