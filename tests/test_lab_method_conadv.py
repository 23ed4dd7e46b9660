"""ConAdv, DisAdv and the random control: where perturbations come from, and which batch norm sees what."""

from __future__ import annotations

import copy
import dataclasses
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_data import RecordProperty, small_data
from lab_stops import assert_goes_on, values
from torch import Tensor, nn

from bsgap_kernels.lab import loop, saved, setup
from bsgap_kernels.lab.batch import Batch
from bsgap_kernels.lab.config import TrainConfig
from bsgap_kernels.lab.data import ImageData
from bsgap_kernels.lab.dual_batch_norm import (
    adversarial_branch,
    use_dual_batch_norm,
    use_main_batch_norm,
)
from bsgap_kernels.lab.methods.conadv import Conadv
from bsgap_kernels.lab.methods.dual_training import DualTraining
from bsgap_kernels.lab.models import build_model
from bsgap_kernels.lab.setup import set_up
from bsgap_kernels.lab.stop import Stop, StoppedError
from bsgap_kernels.lab.train import train

METHODS = ("conadv", "disadv", "random-sign")


def network(*arguments: Any) -> nn.Module:
    """Both kinds of batch norm, on 7×7 means."""
    return nn.Sequential(
        nn.AvgPool2d(4), nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(196, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10),
    )  # fmt: skip


@pytest.fixture
def normalised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs train the network with batch norm."""
    for module in (setup, saved):
        monkeypatch.setattr(module, "build_model", network)


def config(method: str = "conadv", hyper: dict[str, Any] | None = None, **options: Any) -> TrainConfig:
    """48 images: 3 updates an epoch."""
    return TrainConfig(
        **{"method": method, "batch_size": 16, "steps": 8, "probe_size": 24, "every": 3, "probe_every": 4,
           "checkpoint_seconds": None, "hyper": {method: hyper or {}}, **options}
    )  # fmt: skip


def with_range(data: ImageData) -> ImageData:
    return dataclasses.replace(data, mean=torch.full((1, 1, 1), 0.25), std=torch.full((1, 1, 1), 0.5))


@dataclasses.dataclass
class Seen:
    """An update: the network before it, its images, signs and perturbed images."""

    step: int
    model: nn.Module
    images: Tensor
    labels: Tensor
    signs: Tensor | None
    perturbed: Tensor | None = None


def watched(monkeypatch: pytest.MonkeyPatch, kind: type[DualTraining]) -> list[Seen]:
    """What updates of the runs from now on see."""
    seen: list[Seen] = []
    signs, perturbed = kind.signs, kind.perturbed

    def see_signs(self: DualTraining, batch: Batch) -> Tensor | None:
        model = copy.deepcopy(self._model)
        found = signs(self, batch)
        seen.append(Seen(batch.step, model, *batch.images(), None if found is None else found.clone()))
        return found

    def see_perturbed(self: DualTraining, batch: Batch, given: Tensor) -> Batch:
        moved = perturbed(self, batch, given)
        seen[-1].perturbed = moved.images()[0]
        return moved

    monkeypatch.setattr(kind, "signs", see_signs)
    monkeypatch.setattr(kind, "perturbed", see_perturbed)
    return seen


def attack_at(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The signs by the definition, on a copy."""
    model = copy.deepcopy(model).train()
    images = images.clone().requires_grad_()
    with adversarial_branch(model):
        nn.functional.cross_entropy(model(images), labels).backward()
    assert images.grad is not None
    return images.grad.sign().to(torch.int8)


# -- where the perturbation comes from


@pytest.mark.parametrize("tau", [1, 2, 7])
@pytest.mark.usefixtures("normalised")
def test_the_attack_is_that_at_the_stale_parameters(
    tau: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: RecordProperty
) -> None:
    """On the very images that come, augmented, from later epochs too (an epoch has 3 updates)."""
    seen = watched(monkeypatch, Conadv)
    train(config(hyper={"tau": tau}, augment="standard"), tmp_path, data=small_data())
    assert [update.step for update in seen] == list(range(8))
    assert all(update.signs is None for update in seen[:tau])
    for stale, update in zip(seen[:-tau], seen[tau:], strict=True):
        signs = attack_at(stale.model, update.images, update.labels)
        assert update.signs is not None
        assert torch.equal(update.signs, signs)
        assert update.perturbed is not None
        assert torch.equal(update.perturbed, update.images + 0.05 * signs)
        # At the parameters of the update itself it is another one.
        assert not torch.equal(signs, attack_at(update.model, update.images, update.labels))
    if tau == 1:
        count = sum(update.images.numel() for update in seen[1:])
        record_property(
            "mechanism conadv", f"x̂ is the attack of the update before: {count:,} of {count:,} pixels"
        )


@pytest.mark.usefixtures("normalised")
def test_an_attack_raises_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bsgap_kernels.lab.methods.conadv import Disadv

    seen = watched(monkeypatch, Disadv)
    train(config("disadv", {"step_size": 0.01}), tmp_path, data=small_data())
    for update in seen:
        assert update.perturbed is not None
        with torch.no_grad(), adversarial_branch(update.model.train()):
            clean, moved = (
                nn.functional.cross_entropy(update.model(images), update.labels)
                for images in (update.images, update.perturbed)
            )
        assert moved > clean


@pytest.mark.usefixtures("normalised")
def test_without_delay_it_is_sequential(tmp_path: Path, record_property: RecordProperty) -> None:
    options: dict[str, Any] = {"augment": "standard", "micro_batch": 7, "unfold": "channel"}
    weights = [
        train(config(method, hyper, **options), tmp_path / method, data=small_data())["weights_sha256"]
        for method, hyper in (("conadv", {"tau": 0}), ("disadv", {}))
    ]
    assert weights[0] == weights[1]
    assert values(tmp_path / "conadv") == values(tmp_path / "disadv")
    told = f"conadv with τ = 0 is disadv: SHA-256 of the weights {weights[0][:8]}… and {weights[1][:8]}…"
    record_property("mechanism conadv disadv", told)


@pytest.mark.usefixtures("normalised")
def test_the_control_moves_every_pixel_by_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: RecordProperty
) -> None:
    from bsgap_kernels.lab.methods.conadv import RandomSign

    seen = watched(monkeypatch, RandomSign)
    train(config("random-sign", {"step_size": 0.125}), tmp_path / "a", data=small_data())
    drawn = [update.signs for update in seen]
    for update in seen:
        assert update.signs is not None
        assert update.perturbed is not None
        assert update.signs.shape == update.images.shape
        assert set(update.signs.unique().tolist()) == {-1, 1}
        assert torch.equal(update.perturbed, update.images + 0.125 * update.signs)
        # 12544 signs: five deviations of their mean.
        assert abs(float(update.signs.float().mean())) < 5 / math.sqrt(update.signs.numel())
    seen.clear()
    train(config("random-sign", {"step_size": 0.125}), tmp_path / "b", data=small_data())
    pairs = [(a, b.signs) for a, b in zip(drawn, seen, strict=True)]
    assert all(torch.equal(a, b) for a, b in pairs if a is not None and b is not None)
    assert len({signs.numpy().tobytes() for signs in drawn if signs is not None}) == 8
    count = sum(signs.numel() for signs in drawn if signs is not None)
    record_property(
        "mechanism random-sign",
        f"{count:,} of {count:,} pixels moved by the step exactly, where nothing is clipped",
    )


@pytest.mark.parametrize("clip", [True, False])
def test_pixels_stay_in_range_where_the_data_has_one(
    clip: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Black is -0.5 and white 1.5 at mean 0.25 and standard deviation 0.5."""
    from bsgap_kernels.lab.methods.conadv import Disadv

    data = small_data()
    data = with_range(dataclasses.replace(data, train_images=data.train_images.clamp(-0.5, 1.5)))
    seen = watched(monkeypatch, Disadv)
    train(config("disadv", {"clip": clip}, layers=["relu3"], steps=2), tmp_path, data=data)
    for update in seen:
        assert update.perturbed is not None
        assert update.signs is not None
        moved = update.images + 0.05 * update.signs
        assert float(moved.max()) > 1.5
        assert float(moved.min()) < -0.5
        assert torch.equal(update.perturbed, moved.clamp(-0.5, 1.5) if clip else moved)


# -- the two batch norms


def test_the_main_branch_keeps_its_names() -> None:
    torch.manual_seed(0)
    plain = build_model("resnet56", torch.Size((1, 28, 28)), 10)
    dual = copy.deepcopy(plain)
    use_dual_batch_norm(dual)
    names = list(plain.state_dict())
    assert [name for name in dual.state_dict() if ".adversarial." not in name] == names
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    assert len(dual.state_dict()) == len(names) + 5 * norms
    with torch.no_grad():
        for module in dual.modules():
            if isinstance(module, nn.BatchNorm2d) and hasattr(module, "adversarial"):
                module.adversarial.weight.fill_(math.nan)
    images = torch.randn(3, 1, 28, 28)
    assert torch.equal(plain.train()(images), dual.train()(images))
    assert torch.equal(plain.eval()(images), dual.eval()(images))
    with adversarial_branch(dual):
        assert dual(images).isnan().all()
    use_main_batch_norm(dual)
    assert str(dual) == str(plain)
    assert torch.equal(plain(images), dual(images))


@pytest.mark.usefixtures("normalised")
def test_the_clean_half_is_sgds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With weight 0: main weights and statistics, every value and near-rank are those of SGD, bit by bit."""
    built: list[nn.Module] = []
    original = setup.build_model

    def build(*arguments: Any) -> nn.Module:
        built.append(original(*arguments))
        return built[-1]

    monkeypatch.setattr(setup, "build_model", build)
    options: dict[str, Any] = {"every": 1, "lr": 0.05}
    train(config("sgd", {"momentum": 0.9}, **options), tmp_path / "sgd", data=small_data())
    hyper = {"weight": 0.0, "tau": 2}
    summary = train(config(hyper=hyper, **options), tmp_path / "conadv", data=small_data())
    found = values(tmp_path / "conadv")
    assert {key: value for key, value in found.items() if not key[2].startswith("method.")} == values(
        tmp_path / "sgd"
    )
    plain, dual = (model.state_dict() for model in built)
    for name, value in plain.items():
        assert torch.equal(dual[name], value), name
    # Statistics of the two sets of images; attacks leave no trace in either.
    for layer in ("2", "6"):
        assert dual[f"{layer}.num_batches_tracked"] == 8
        assert dual[f"{layer}.adversarial.num_batches_tracked"] == 6
        assert not torch.equal(dual[f"{layer}.adversarial.running_mean"], dual[f"{layer}.running_mean"])
    half = [step for step, _, metric in found if metric == "method.adversarial_loss"]
    assert half == list(range(2, 8))
    # 8 clean halves, 6 perturbed ones and as many attacks.
    assert summary["gradient_images"] == (8 + 6 + 6) * 16


@pytest.mark.usefixtures("normalised")
def test_the_two_halves_add_up() -> None:
    """The step of one update without momentum, against the two losses by hand."""
    built = set_up(config("disadv", {"weight": 0.5, "momentum": 0.0}), small_data())
    model, data = built.model, built.data
    images, labels = data.train(slice(0, 16))
    by_hand = network()
    use_dual_batch_norm(by_hand)
    by_hand.load_state_dict(model.state_dict())
    moved = images + 0.05 * attack_at(by_hand, images, labels)
    loss = nn.functional.cross_entropy(by_hand(images), labels)
    with adversarial_branch(by_hand):
        loss = loss + 0.5 * nn.functional.cross_entropy(by_hand(moved), labels)
    loss.backward()
    gradients = loop.Gradients(model.train(), built.ranks)
    with built.tracker.paused(), built.probe_tracker.detached():
        built.method.update(Batch(0, slice(0, 16), lambda rows: data.train(rows), gradients))
    for name, parameter in by_hand.named_parameters():
        assert parameter.grad is not None
        expected = parameter.detach() - built.lr * parameter.grad
        torch.testing.assert_close(model.get_parameter(name), expected, rtol=1e-6, atol=1e-8)
    # The adversarial statistics are of the perturbed images, once.
    for name, buffer in by_hand.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name


@pytest.mark.usefixtures("normalised")
def test_evaluation_and_the_network_that_is_left_are_the_main_branch(tmp_path: Path) -> None:
    built = set_up(config(), small_data())
    before = loop.evaluate(built, built.data.test, 20)
    with torch.no_grad():
        for name, value in built.model.state_dict().items():
            if ".adversarial." in name and value.is_floating_point():
                value.fill_(math.nan)
    assert loop.evaluate(built, built.data.test, 20) == before
    summary = train(config(), tmp_path, data=small_data())
    run = saved.load_run(tmp_path, small_data())
    assert list(run.model.state_dict()) == list(network().state_dict())
    assert [type(module) for module in run.model] == [type(module) for module in network()]
    images, labels = run.data.test(slice(None))
    with torch.no_grad():
        accuracy = float((run.model(images).argmax(1) == labels).double().mean())
    assert accuracy == summary["test_accuracy"]


# -- batches ahead, and runs that are stopped


@pytest.mark.parametrize("batch_size", [16, "full", 20])
def test_batches_ahead_are_those_that_come(batch_size: int | str) -> None:
    """With their augmentation, parts of them too, and none past the end."""
    data = small_data()
    built = set_up(config("sgd", batch_size=batch_size, augment="standard", steps=6), data)
    running = loop.Loop(built)
    ahead: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    come = []
    for step in range(6):
        running.done = step
        batch = running._batch(running._rows())
        state = running._shuffle.get_state()
        come.append(batch.images())
        for steps in range(8):
            later = batch.ahead(steps)
            assert (later is None) == (step + steps >= 6)
            if later is None:
                continue
            assert (later.step, len(later)) == (step + steps, len(batch))
            ahead[step, step + steps] = later.images()
            parts = [part.ahead(steps) for part in batch.split(3)]
            images = torch.cat([part.images()[0] for part in parts if part is not None])
            assert torch.equal(images, ahead[step, step + steps][0])
            again = batch.ahead(1)
            if steps and again is not None:
                once_more = again.ahead(steps - 1)
                assert once_more is not None
                assert torch.equal(once_more.images()[0], images)
        assert torch.equal(running._shuffle.get_state(), state)
    assert len(ahead) == 21
    for (_, step), (images, labels) in ahead.items():
        assert torch.equal(images, come[step][0])
        assert torch.equal(labels, come[step][1])
    assert not torch.equal(come[0][0], come[1][0])


RUNS: dict[str, dict[str, Any]] = {
    "conadv": {"hyper": {"tau": 1}},
    "conadv far ahead": {"hyper": {"tau": 4}, "micro_batch": 7, "unfold": "channel"},
    "disadv": {},
    "random-sign": {},
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.usefixtures("normalised")
def test_a_stopped_run_goes_on(run: str, tmp_path: Path) -> None:
    """In mid-epoch and at an epoch's border (3 and 6), with augmentation."""
    settings = config(run.split()[0], augment="standard", **RUNS[run])
    assert_goes_on(settings, (1, 2, 3, 5, 6), tmp_path)


@pytest.mark.parametrize("step", [2, 3, 5, 6])
@pytest.mark.usefixtures("normalised")
def test_a_killed_run_goes_on(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost at the end of an update: it begins at the checkpoint before it."""
    settings = config(augment="standard", checkpoint_seconds=0.0)
    whole = train(settings, tmp_path / "whole", data=small_data())
    update = Conadv.update

    def lost(self: Conadv, batch: Batch) -> Any:
        found = update(self, batch)
        if batch.step == step:
            raise KeyboardInterrupt
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Conadv, "update", lost)
        with pytest.raises(KeyboardInterrupt):
            train(settings, tmp_path / "run", data=small_data())
    again = train(settings, tmp_path / "run", data=small_data())
    assert again["weights_sha256"] == whole["weights_sha256"]
    assert again["gradient_images"] == whole["gradient_images"]
    assert values(tmp_path / "run") == values(tmp_path / "whole")


@pytest.mark.parametrize("step", [2, 3])
def test_an_update_that_is_left_is_made_again(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it looked ahead: the order of the coming epoch is drawn as if it had not."""
    settings = config(augment="standard", layers=["relu3"])
    whole = train(settings, tmp_path / "whole", data=small_data())
    stop, signs = Stop(), Conadv.signs

    def leave(self: Conadv, batch: Batch) -> Any:
        if batch.step == step:
            later = batch.ahead(1)
            assert later is not None
            self.attack(later)
            stop.ask(signal.SIGTERM)
            raise StoppedError
        return signs(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Conadv, "signs", leave)
        stopped = train(settings, tmp_path / "run", data=small_data(), stop=stop)
    assert (stopped["status"], stopped["steps"]) == ("stopped", step)
    again = train(settings, tmp_path / "run", data=small_data())
    assert again["weights_sha256"] == whole["weights_sha256"]
    assert again["gradient_images"] == whole["gradient_images"]
    assert values(tmp_path / "run") == values(tmp_path / "whole")
