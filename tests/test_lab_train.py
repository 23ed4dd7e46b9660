"""The training loop: determinism, cadence, budgets, counts, and what a stop leaves behind."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lab_data import small_data

import bsgap_kernels as bsgap
from bsgap_kernels.lab import loop as loop_module
from bsgap_kernels.lab import results
from bsgap_kernels.lab import setup as lab_setup
from bsgap_kernels.lab.config import TrainConfig, UserError
from bsgap_kernels.lab.models import LeNet5, build_model
from bsgap_kernels.lab.setup import learning_rate, set_up
from bsgap_kernels.lab.train import train
from bsgap_kernels.tracking import RankTracker

SITES = ["relu1#0", "relu2#0", "relu3#0", "relu4#0"]


def config(**options: Any) -> TrainConfig:
    return TrainConfig(**{"batch_size": 16, "probe_size": 24, "epochs": 2, **options})


def rows(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def steps_of(found: list[dict[str, Any]], metric: str, site: str = "") -> list[int]:
    return [row["step"] for row in found if row["metric"] == metric and row["site"] == site]


def names_of(found: list[dict[str, Any]], view: str) -> set[str]:
    """What was read of that view, of every site alike."""
    names: dict[str, set[str]] = {}
    for row in found:
        if row["metric"].startswith(f"{view}."):
            names.setdefault(row["site"], set()).add(row["metric"].removeprefix(f"{view}."))
    assert list(names) == SITES
    assert all(other == names[SITES[0]] for other in names.values())
    return names[SITES[0]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("run")
    return directory, train(config(), directory, data=small_data())


def test_rows_follow_the_schema(finished: tuple[Path, dict[str, Any]]) -> None:
    found = rows(finished[0])
    for row in found:
        assert list(row) == ["run", "attempt", "step", "site", "metric", "value"]
        assert (row["run"], row["attempt"]) == ("b16-s0", 0)
    keys = Counter((row["step"], row["site"], row["metric"]) for row in found)
    assert max(keys.values()) == 1
    assert names_of(found, "batch") == {"near_rank", "ratio"}
    assert names_of(found, "probe") == {"near_rank", "ratio", "lower", "upper", *bsgap.SUMMARY_COLUMNS}
    assert {row["metric"] for row in found if row["site"] == ""} == {
        "train.loss", "train.accuracy", "test.accuracy", "test.loss", "train_eval.accuracy",
        "train_eval.loss", "lr", "time.step_ms", "time.metric_ms", "time.probe_ms", "time.train_s",
    }  # fmt: skip


def test_all_that_the_probe_gives_may_be_asked_of_every_step(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """The counts are those of the float32 Gram matrices, and are proven."""
    train(config(metrics="all", certify=True), tmp_path / "all", data=small_data())
    found = rows(tmp_path / "all")
    assert names_of(found, "batch") == names_of(found, "probe")
    counts = [
        {(row["step"], row["site"]): row["value"] for row in read if row["metric"] == "batch.near_rank"}
        for read in (found, rows(finished[0]))
    ]
    assert counts[0] == counts[1]
    assert len(counts[0]) == 6 * len(SITES)
    train(config(metrics="stable_rank", steps=1, epochs=None), tmp_path / "one", data=small_data())
    assert names_of(rows(tmp_path / "one"), "batch") == {"near_rank", "ratio", "stable_rank"}
    with pytest.raises(UserError, match="metrics: got 'stable', expected names of .*nearest is stable_rank"):
        train(config(metrics="near_rank,stable"), tmp_path / "none", data=small_data())


def test_the_floor_is_half_a_gram_matrix_of_every_layer(finished: tuple[Path, dict[str, Any]]) -> None:
    summary = finished[1]
    flops = sum(max(shape) * min(shape) * (min(shape) + 1) for shape in batch_shapes(summary))
    assert summary["metric_floor_ms"] == pytest.approx(1e3 * flops / summary["float32_flops"])
    assert [summary[name] for name in ("probes", "steps")] == [7, 6]


def test_the_floor_is_the_mean_over_steps_that_are_not_read_too(tmp_path: Path) -> None:
    summary = train(config(every=4), tmp_path / "few", data=small_data())
    flops = sum(max(shape) * min(shape) * (min(shape) + 1) for shape in batch_shapes(summary))
    assert summary["metric_floor_ms"] == pytest.approx(1e3 * flops / summary["float32_flops"] * 2 / 6)
    summary = train(config(every=None), tmp_path / "none", data=small_data())
    assert summary["metric_floor_ms"] is summary["float32_flops"] is None


def batch_shapes(summary: dict[str, Any]) -> list[list[int]]:
    return [site["batch_shape"] for site in summary["sites"]]


def test_sites_are_in_forward_order(finished: tuple[Path, dict[str, Any]]) -> None:
    found = [
        row["site"] for row in rows(finished[0]) if row["metric"] == "probe.near_rank" and row["step"] == 0
    ]
    assert found == SITES == [site["site"] for site in finished[1]["sites"]]


def test_summary(finished: tuple[Path, dict[str, Any]]) -> None:
    directory, summary = finished
    assert json.loads((directory / "summary.json").read_text()) == summary
    assert summary["status"] == "finished"
    assert (summary["batch_size"], summary["steps"], summary["epochs"]) == (16, 6, 2.0)
    gap = summary["train_accuracy"] - summary["test_accuracy"]
    assert summary["generalization_gap"] == pytest.approx(gap, abs=1e-12)
    last = {(r["site"], r["metric"]): r["value"] for r in rows(directory) if r["step"] == 6}
    for site in summary["sites"]:
        assert site["near_rank"] == last[site["site"], "probe.near_rank"]
        assert site["lower"] <= site["near_rank"] <= site["upper"]
        assert site["ratio"] == site["near_rank"] / min(site["probe_shape"])
        assert site["batch_shape"][0] * 24 == site["probe_shape"][0] * 16
    assert [site["probe_shape"][0] // 24 for site in summary["sites"]] == [28 * 28, 10 * 10, 1, 1]
    # So many Gaussian rows or columns are nearly orthogonal: full rank.
    assert summary["sites"][0]["null_near_rank"] == 6
    assert summary["sites"][0]["null_ratio"] == 1.0


def test_resolved_config_gives_the_same_run_back(finished: tuple[Path, dict[str, Any]]) -> None:
    written = yaml.safe_load((finished[0] / "config.yaml").read_text())
    assert TrainConfig.from_mapping(written) == config()
    assert written["epochs"] == 2


def test_probe_counts_are_those_of_the_network_at_that_step(tmp_path: Path) -> None:
    data, settings = small_data(), config(steps=1, epochs=None, layers=["relu3"])
    train(settings, tmp_path, data=data)
    torch.manual_seed(0)
    model = build_model("lenet5", torch.Size((1, 28, 28)), 10)
    outputs = []
    model.relu3.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        model(data.probe(24))
    sigma = torch.linalg.svdvals(outputs[0].double())
    expected = int((sigma > 1e-2 * sigma[0]).sum())
    found = [r["value"] for r in rows(tmp_path) if r["metric"] == "probe.near_rank" and r["step"] == 0]
    assert found == [expected]


def test_same_seed_gives_bit_identical_values_and_another_seed_does_not(tmp_path: Path) -> None:
    def run(name: str, seed: int) -> list[tuple[Any, ...]]:
        torch.manual_seed(len(name))  # the caller's random state must not matter
        train(config(seed=seed), tmp_path / name, data=small_data())
        return [
            (r["step"], r["site"], r["metric"], r["value"])
            for r in rows(tmp_path / name)
            if not r["metric"].startswith("time.")
        ]

    first = run("first", 0)
    assert first == run("again", 0)
    assert first != run("other", 1)


def test_augmentation_changes_training_batches_alone(tmp_path: Path) -> None:
    """Evaluations and probes before the first update are those without; losses are not."""
    for name in ("none", "standard"):
        train(config(augment=name, steps=1, epochs=None), tmp_path / name, data=small_data())
    found = {
        name: {(r["step"], r["site"], r["metric"]): r["value"] for r in rows(tmp_path / name)}
        for name in ("none", "standard")
    }
    probe, loss = (0, "relu1#0", "probe.near_rank"), (0, "", "train.loss")
    assert found["none"][probe] == found["standard"][probe]
    assert found["none"][loss] != found["standard"][loss]


def test_each_step_has_an_augmentation_of_its_own() -> None:
    first, second = (set_up(config(augment="standard", seed=seed), small_data()) for seed in (0, 1))
    drawn = [setup.augmentation(step) for setup in (first, second) for step in (0, 1, 0)]
    parameters = [augmentation.parameters for augmentation in drawn if augmentation is not None]
    assert torch.equal(parameters[0], parameters[2])
    assert not torch.equal(parameters[0], parameters[1])
    assert not torch.equal(parameters[0], parameters[3])
    assert set_up(config(), small_data()).augmentation(0) is None


def test_the_callers_random_state_is_untouched(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    train(config(steps=2, epochs=None), tmp_path, data=small_data())
    assert torch.equal(before, torch.get_rng_state())


def test_probing_and_tracking_do_not_change_the_training(tmp_path: Path) -> None:
    def losses(name: str, **options: int) -> list[float]:
        train(config(**options), tmp_path / name, data=small_data())
        return [r["value"] for r in rows(tmp_path / name) if r["metric"] == "train.loss"]

    assert losses("often") == losses("seldom", every=5, probe_every=4, eval_every=2)


def test_training_that_is_not_read_has_no_hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe is read all the same, functional nonlinearities too."""
    hooks = []

    class Functional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = torch.nn.Linear(784, 20), torch.nn.Linear(20, 10)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if self.training:
                modules = list(self.modules())
                hooks.append(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules))
            return self.outer(self.inner(images.flatten(1)).relu())

    monkeypatch.setattr(lab_setup, "build_model", lambda *_: Functional())
    for every in (None, 1):
        train(config(every=every), tmp_path / str(every), data=small_data())
        (site,) = json.loads((tmp_path / str(every) / "summary.json").read_text())["sites"]
        assert site["site"] == "outer:input#0"
    assert set(hooks[:6]) == {0}
    assert 0 not in hooks[6:]
    probed = [
        {row["step"]: row["value"] for row in rows(tmp_path / name) if row["metric"] == "probe.near_rank"}
        for name in ("None", "1")
    ]
    assert probed[0] == probed[1]
    assert len(probed[0]) == 7


def test_probe_leaves_buffers_mode_and_random_state(tmp_path: Path) -> None:
    setup = set_up(config(), small_data())
    setup.model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.BatchNorm1d(784), torch.nn.Dropout(0.5), torch.nn.ReLU()
    )
    state = {name: value.clone() for name, value in setup.model.state_dict().items()}
    with RankTracker(setup.model) as setup.tracker, RankTracker(setup.model) as setup.probe_tracker:
        loop = loop_module.Loop(setup)
        random_state = torch.get_rng_state()
        with results.MetricWriter(tmp_path / "metrics.jsonl", "r") as writer:
            loop._read_probe(writer)
            assert loop.probe_records["3#0"].shape == (24, 784)
            loop_module.evaluate(setup, setup.data.test, len(setup.data.test_labels))
        assert setup.tracker.collect() == {}
    assert torch.equal(random_state, torch.get_rng_state())
    assert setup.model.training
    for name, value in setup.model.state_dict().items():
        assert torch.equal(value, state[name])


def test_cadences(tmp_path: Path) -> None:
    settings = config(steps=7, epochs=None, every=3, probe_every=4, eval_every=2)
    train(settings, tmp_path, data=small_data())
    found = rows(tmp_path)
    assert steps_of(found, "train.loss") == list(range(7))
    assert steps_of(found, "batch.near_rank", "relu1#0") == steps_of(found, "time.metric_ms") == [0, 3, 6]
    assert steps_of(found, "probe.near_rank", "relu1#0") == steps_of(found, "time.probe_ms") == [0, 4, 7]
    assert steps_of(found, "test.accuracy") == [
        6,
        7,
    ]  # three steps an epoch: after two epochs, and at the end


def test_max_probes_spreads_the_probes(tmp_path: Path) -> None:
    train(config(steps=7, epochs=None, max_probes=2), tmp_path, data=small_data())
    assert steps_of(rows(tmp_path), "time.probe_ms") == [0, 4, 7]


def test_max_evaluations_spreads_the_evaluations(tmp_path: Path) -> None:
    train(config(steps=14, epochs=None, max_evaluations=3, probe_every=None), tmp_path, data=small_data())
    # Three steps an epoch: every second epoch, and at the end.
    assert steps_of(rows(tmp_path), "test.accuracy") == [6, 12, 14]


def test_full_batch_takes_every_image_once_an_epoch() -> None:
    setup = set_up(config(batch_size="full", epochs=3), small_data())
    assert (setup.batch_size, setup.steps_per_epoch, setup.steps) == (48, 1, 3)


def test_left_over_rows_are_dropped() -> None:
    setup = set_up(config(batch_size=20, epochs=3), small_data())
    assert (setup.steps_per_epoch, setup.steps) == (2, 6)


@pytest.mark.parametrize(("rule", "expected"), [("fixed", 0.1), ("linear", 0.4), ("sqrt", 0.2)])
def test_learning_rate_rules(rule: str, expected: float) -> None:
    assert learning_rate(0.1, rule, 512, 128) == pytest.approx(expected)


def test_the_loss_falls(tmp_path: Path) -> None:
    summary = train(config(epochs=25, lr=0.05, probe_every=100, every=100), tmp_path, data=small_data())
    assert summary["train_accuracy"] > 0.9


def test_divergence_is_written_as_null_and_minus_one(tmp_path: Path) -> None:
    summary = train(config(lr=1e30, steps=3, epochs=None), tmp_path, data=small_data())
    last = {(r["site"], r["metric"]): r["value"] for r in rows(tmp_path) if r["step"] == 3}
    assert last["relu4#0", "probe.near_rank"] == -1
    assert last["relu4#0", "probe.ratio"] is None
    assert last["", "test.loss"] is None
    assert json.loads((tmp_path / "summary.json").read_text())["sites"][3]["ratio"] is None
    assert math.isnan(summary["sites"][3]["ratio"])


def test_a_stop_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = loop_module.Loop._update

    def update(self: Any, *arguments: Any) -> Any:
        if self.done == 4:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(loop_module.Loop, "_update", update)
    with pytest.raises(KeyboardInterrupt):
        train(config(), tmp_path, data=small_data())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("stopped", 4)
    assert summary["test_accuracy"] is not None  # evaluated after the first epoch
    assert steps_of(rows(tmp_path), "train.loss") == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 49}, "batch_size: got 49, expected at most the 48 images of digits, or full"),
        ({"probe_size": 49}, "probe_size: got 49, expected at most the 48 training images"),
        ({"layers": ["rleu2"]}, "'rleu2' matches no module; the nearest names are .*relu2"),
        ({"batch_size": 1, "model": "keskar-f1"}, "batch_size: got passes of 1 row, expected at least 2"),
        ({"micro_batch": 1, "model": "keskar-f1"}, "micro_batch: got passes of 1 row, expected at least 2"),
        ({"device": "tpu"}, "device: got 'tpu', expected one that torch can use here"),
        ({"device": "meta"}, "device: got 'meta', expected cpu or cuda: the ops have no meta kernels"),
    ],
)
def test_what_does_not_fit_is_said_before_a_file_is_written(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train(config(**options), tmp_path / "run", data=small_data())
    assert not (tmp_path / "run").exists()


def test_lenet5_shapes() -> None:
    for channels, size, classes in ((1, 28, 10), (3, 32, 100)):
        model = LeNet5(channels, size, classes)
        with RankTracker(model, unfold="flatten") as tracker:
            assert model(torch.randn(5, channels, size, size)).shape == (5, classes)
            shapes = [record.shape for record in tracker.collect().values()]
        assert shapes == [(5, 6 * 28 * 28), (5, 16 * 10 * 10), (5, 120), (5, 84)]
    with pytest.raises(UserError, match="28×28 or 32×32, got 8×8"):
        LeNet5(1, 8)
    with pytest.raises(UserError, match="square images, got 28×32"):
        build_model("lenet5", torch.Size((1, 28, 32)), 10)
