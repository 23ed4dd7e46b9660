"""Rank regularisation and its control as methods: their gradient, the rank they leave, their runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_data import RecordProperty, small_data
from lab_smooth import ROWS, batch_of, flat, loss_of, rows_of, smooth
from lab_stops import assert_goes_on, values
from lab_two_ranks import on_two_ranks
from torch import Tensor, nn

from bsgap_kernels import cli
from bsgap_kernels.lab import loop, rank_penalty
from bsgap_kernels.lab.config import TrainConfig, UserError
from bsgap_kernels.lab.distributed import Ranks
from bsgap_kernels.lab.methods import REGISTRY, Course
from bsgap_kernels.lab.methods.rank_reg import RankReg, sign_of
from bsgap_kernels.lab.rank_penalty import METRICS, rank_ratio
from bsgap_kernels.lab.train import train

NAMES = ("rank-reg", "rank-control")


def method_of(model: nn.Module, name: str = "rank-reg", lr: float = 0.1, **hyper: Any) -> RankReg:
    kind = REGISTRY[name]
    found = kind(model, lr, kind.hyper_type(**hyper), Course(ROWS, 30, 1, 5, small_data()))
    assert isinstance(found, RankReg)
    return found


def config(method: str = "rank-reg", hyper: dict[str, Any] | None = None, **options: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "batch_size": 16, "steps": 4, "probe_size": 24, "every": None, "probe_every": None,
        "max_evaluations": 1, "checkpoint_seconds": None,
    }  # fmt: skip
    return TrainConfig(**{**settings, **options}, method=method, hyper={method: hyper or {}})


def hidden(model: nn.Module, part: slice = slice(None)) -> Tensor:
    """The one site of `smooth()`."""
    activation: Tensor = model.layers[:2](rows_of()[0][part])  # type: ignore[index]
    return activation


def gradients(model: nn.Module) -> Tensor:
    return flat(parameter.grad for parameter in model.parameters())


# -- an update


@pytest.mark.parametrize("metric", METRICS)
def test_the_gradient_is_that_of_loss_and_penalty(metric: str) -> None:
    """Each of three passes has the penalty of its own matrix, weighted by its rows."""
    for parts in (1, 3):
        model = smooth()
        method = method_of(model, strength=0.7, metric=metric)
        slices = [slice(0, ROWS)] if parts == 1 else [slice(0, 3), slice(3, 6), slice(6, 10)]
        penalty = torch.zeros((), dtype=torch.float64)
        for part in slices:
            loss = 0.7 * (1 - rank_ratio(hidden(model, part), metric))
            penalty = penalty + (part.stop - part.start) / ROWS * loss
        expected = flat(torch.autograd.grad(loss_of(model) + penalty, list(model.parameters())))
        plain = flat(torch.autograd.grad(loss_of(model), list(model.parameters())))
        before, loss = flat(model.parameters()), float(loss_of(model).detach())
        found = method.update(batch_of(model, parts=parts))
        assert torch.allclose(gradients(model), expected, rtol=1e-10, atol=1e-14)
        assert not torch.allclose(gradients(model), plain, rtol=1e-3)
        assert float(found[0]) == pytest.approx(loss, rel=1e-12)
        assert torch.allclose(flat(model.parameters()), before - 0.1 * expected, rtol=1e-12, atol=1e-15)
        assert method.log()["penalty"] == pytest.approx(float(penalty.detach()), rel=1e-12)
        assert method.log()["rank_ratio"] == pytest.approx(1 - float(penalty.detach()) / 0.7, rel=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_the_control_gives_each_activation_a_gradient_along_it(metric: str) -> None:
    """Over several updates, whose signs differ; the length is that of the rank penalty's."""
    model = smooth()
    method = method_of(model, "rank-control", lr=0.0, strength=0.7, metric=metric)
    signs = set()
    for step in range(4):
        A = hidden(model)
        X = A.detach().requires_grad_()
        (ours,) = torch.autograd.grad(rank_ratio(X, metric), X)
        sign = sign_of(5, step)
        signs.add(sign)
        pull = sign * 0.7 * ours.norm() * X.detach() / X.detach().norm()
        layer = model.layers[0]
        of_penalty = torch.autograd.grad(A, [layer.weight, layer.bias], pull)
        plain = torch.autograd.grad(loss_of(model), list(model.parameters()))
        expected = [plain[0] + of_penalty[0], plain[1] + of_penalty[1], *plain[2:]]
        batch = batch_of(model)
        batch.step = step
        method.update(batch)
        assert torch.allclose(gradients(model), flat(expected), rtol=1e-10, atol=1e-14)
        assert method.log()["rank_ratio"] == pytest.approx(float(rank_ratio(X.detach(), metric)), rel=1e-12)
    assert signs == {1, -1}


def test_signs_are_drawn_evenly_from_seed_and_step() -> None:
    signs = [[sign_of(seed, step) for step in range(1000)] for seed in (0, 1)]
    assert all(abs(sum(drawn)) < 130 for drawn in signs)  # four standard deviations
    agree = sum(a == b for a, b in zip(*signs, strict=True))
    assert abs(agree - 500) < 65
    assert signs[0] == [sign_of(0, step) for step in range(1000)]


@pytest.mark.parametrize("unfold", ["flatten", "channel", "pool"])
@pytest.mark.parametrize("metric", METRICS)
def test_the_matrices_are_the_trackers(metric: str, unfold: str, tmp_path: Path) -> None:
    """The logged ratio is what the tracker measures on the batch, at every step; and it reads its own."""
    layers = ["relu1", "relu2", "relu4"]
    column = f"batch.{metric.replace('-', '_')}"
    found = {}
    for method in ("sgd", *NAMES):
        hyper = {} if method == "sgd" else {"metric": metric, "unfold": unfold, "layers": layers}
        settings = config(method, hyper, every=1, metrics="all", layers=layers, unfold=unfold, steps=3)
        summary = train(settings, tmp_path / method, data=small_data())
        found[method] = values(tmp_path / method)
        if method == "sgd":
            continue
        assert summary["method_summary"] == {"layers": layers}
        for step in range(3):
            sites = {site for at, site, name in found[method] if at == step and name == column}
            assert sites == {f"{layer}#0" for layer in layers}
            shapes = {site["site"]: site["batch_shape"] for site in summary["sites"]}
            ratios = [found[method][step, site, column] / min(shapes[site]) for site in sites]
            expected = sum(ratios) / len(ratios)
            assert found[method][step, "", "method.rank_ratio"] == pytest.approx(expected, rel=1e-6)
        first = {key: value for key, value in found[method].items() if key[0] == 0 and key[1]}
        assert first == {key: found["sgd"][key] for key in first}


# -- what it does


@pytest.mark.parametrize(("metric", "strength"), [("effective-rank", 0.1), ("participation-ratio", 0.3)])
def test_it_raises_the_measured_rank(
    metric: str, strength: float, tmp_path: Path, record_property: RecordProperty
) -> None:
    """On the probe, from the same weights: at every site above SGD and above the control, which is near SGD.

    The near-rank, which has no gradient, follows: nowhere lower, at relu2 higher (at relu1 and relu4 it is
    at a bound of these few images, or at the number of classes). In so few updates the training loss is
    higher with the penalty, which leaves some rank by itself: this shows the effect, not its only cause.
    """
    rank, near = {}, {}
    for method in ("sgd", *NAMES):
        hyper = {} if method == "sgd" else {"metric": metric, "strength": strength}
        settings = config(method, hyper, batch_size=32, steps=30, probe_size=64, unfold="flatten")
        summary = train(settings, tmp_path / method, data=small_data(64))
        rows = values(tmp_path / method)
        sites = [site["site"] for site in summary["sites"]]
        rank[method] = [rows[30, site, f"probe.{metric.replace('-', '_')}"] for site in sites]
        near[method] = [rows[30, site, "probe.near_rank"] for site in sites]
    assert len(sites) == 4
    for ours, control, sgd in zip(rank["rank-reg"], rank["rank-control"], rank["sgd"], strict=True):
        assert ours > 1.03 * max(sgd, control)
        assert control == pytest.approx(sgd, rel=0.08)
    assert all(ours >= sgd for ours, sgd in zip(near["rank-reg"], near["sgd"], strict=True))
    assert near["rank-reg"][1] >= near["sgd"][1] + 10 >= near["rank-control"][1]
    if metric == "effective-rank":
        for method in NAMES:
            shares = [found / sgd for found, sgd in zip(rank[method], rank["sgd"], strict=True)]
            told = f"effective rank after 30 updates {min(shares):.2f} to {max(shares):.2f} of plain SGD's"
            record_property(f"mechanism {method}", told)


@pytest.mark.parametrize("method", NAMES)
def test_without_strength_it_is_sgd(method: str, tmp_path: Path) -> None:
    shared = {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1}
    weights = [
        train(config(name, {**shared, **extra}, micro_batch=7), tmp_path / name, data=small_data())[
            "weights_sha256"
        ]
        for name, extra in (("sgd", {}), (method, {"strength": 0}))
    ]
    assert weights[0] == weights[1]
    assert values(tmp_path / method)[3, "", "method.penalty"] == 0
    assert 0 < values(tmp_path / method)[3, "", "method.rank_ratio"] < 1


# -- runs


@pytest.mark.parametrize("method", NAMES)
def test_a_stopped_run_goes_on(method: str, tmp_path: Path) -> None:
    settings = config(
        method, {"nesterov": True}, micro_batch=9, every=1, unfold="channel", checkpoint_seconds=0.0
    )
    assert_goes_on(settings, (1, 2, 3), tmp_path)


@pytest.mark.parametrize("method", NAMES)
def test_two_ranks_are_two_micro_batches(method: str, tmp_path: Path) -> None:
    """Each pass has the matrix of its own rows: those of a rank are those of a micro-batch of that size."""
    settings = {"hyper": {"strength": 0.5}, "every": 2, "unfold": "pool", "steps": 3}
    train(config(method, micro_batch=8, **settings), tmp_path / "parts", data=small_data())
    train(config(method, **settings), tmp_path / "whole", data=small_data())

    def work(ranks: Ranks) -> None:
        train(config(method, **settings), tmp_path / "ranks", data=small_data(), ranks=ranks)

    on_two_ranks(work, tmp_path)
    expected, found = values(tmp_path / "parts"), values(tmp_path / "ranks")
    assert list(found) == list(expected)
    for key, value in expected.items():
        same = found[key] is None if value is None else found[key] == pytest.approx(value, rel=1e-3, abs=1e-4)
        assert same, key
    whole = values(tmp_path / "whole")
    assert abs(whole[0, "", "method.rank_ratio"] - expected[0, "", "method.rank_ratio"]) > 0.01


def test_a_rank_without_rows_has_no_say(tmp_path: Path) -> None:
    settings = config(batch_size=1, steps=2, hyper={"strength": 0.5}, unfold="pool")

    def work(ranks: Ranks) -> None:
        train(settings, tmp_path / "ranks", data=small_data(), ranks=ranks)

    on_two_ranks(work, tmp_path)
    train(settings, tmp_path / "alone", data=small_data())
    expected, found = values(tmp_path / "alone"), values(tmp_path / "ranks")
    for step in range(2):
        for name in ("train.loss", "method.rank_ratio", "method.penalty"):
            assert found[step, "", name] == pytest.approx(expected[step, "", name], rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("method", NAMES)
def test_only_passes_of_updates_are_held(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hooks come and go with an update: none in an evaluation or a reading of the probe, none at the end."""
    live: list[rank_penalty.LiveActivations] = []
    passes: list[bool] = []
    original = rank_penalty.LiveActivations._keep
    evaluate, probe = loop.evaluate, loop.Loop._read_probe

    def keep(self: Any, name: str, module: nn.Module, args: Any, output: Any) -> None:
        live.append(self)
        passes.append(module.training and torch.is_grad_enabled())
        original(self, name, module, args, output)

    def without(work: Any) -> Any:
        def checked(*arguments: Any) -> Any:
            count = len(passes)
            found = work(*arguments)
            assert len(passes) == count
            return found

        return checked

    monkeypatch.setattr(rank_penalty.LiveActivations, "_keep", keep)
    monkeypatch.setattr(loop, "evaluate", without(evaluate))
    monkeypatch.setattr(loop.Loop, "_read_probe", without(probe))
    settings = config(method, {"layers": ["relu3"]}, micro_batch=8, every=2, probe_every=1, unfold="channel")
    train(settings, tmp_path, data=small_data())
    assert passes == [True] * 8
    model = live[0]._model
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0
    assert not live[0]._kept


def test_hooks_go_when_an_update_fails() -> None:
    model = smooth()
    method = method_of(model)

    def fail(*arguments: Any) -> Any:
        model(rows_of()[0])
        raise ZeroDivisionError

    batch = batch_of(model)
    batch.gradient = fail  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        method.update(batch)
    assert not model._forward_pre_hooks
    assert not model.layers[1]._forward_hooks
    assert not method._live._kept


@pytest.mark.parametrize("method", NAMES)
def test_dead_and_non_finite_layers_leave_weights_finite(method: str) -> None:
    model = smooth()
    found = method_of(model, method, strength=10)
    with torch.no_grad():
        model.layers[0].weight.zero_()
        model.layers[0].bias.zero_()
    found.update(batch_of(model))
    assert found.log()["rank_ratio"] == 0
    assert all(p.isfinite().all() for p in model.parameters())

    class Spoiling(nn.Module):
        """A site of which one value is not finite, and which the loss does not see."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, torch.full_like(x[:, :1], torch.inf)], 1)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.spoil = smooth().layers, Spoiling()

        def forward(self, x: Tensor) -> Tensor:
            h = self.layers[:2](x)
            self.spoil(h)
            logits: Tensor = self.layers[2:](h)
            return logits

    net = Net()
    found = method_of(net, method, strength=10, layers=["spoil"])
    found.update(batch_of(net))
    assert math.isnan(found.log()["rank_ratio"])
    assert all(p.isfinite().all() for p in net.parameters())


def test_other_models_and_precision(tmp_path: Path) -> None:
    for index, options in enumerate(
        [{"model": "resnet56", "hyper": {"unfold": "channel", "layers": "**relu1"}, "unfold": "channel"},
         {"model": "lstm"}, {"precision": "bfloat16", "hyper": {"metric": "participation-ratio"}}]
    ):  # fmt: skip
        for method in NAMES:
            directory = tmp_path / f"{index}-{method}"
            summary = train(config(method, steps=1, **options), directory, data=small_data())
            assert math.isfinite(summary["train_loss"])
            assert 0 < values(directory)[0, "", "method.rank_ratio"] < 1


# -- options


def test_a_pattern_that_matches_no_layer(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"rank-reg.layers: the pattern 'gelu\*' matches no module; .*its nonlinearities are relu1, "
        "relu2, relu3, relu4$",
    ):
        train(config(hyper={"layers": "relu1, gelu*"}), tmp_path / "run", data=small_data())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -1}, "strength: got -1, expected a finite number of at least 0"),
        ({"strength": math.inf}, "strength: got inf, expected a finite number"),
        ({"metric": "rank"}, "metric: got 'rank', expected one of effective-rank, participation-ratio"),
        ({"unfold": "auto"}, "unfold: got 'auto', expected one of flatten, channel, pool"),
        ({"layers": ""}, "layers: got '', expected patterns such as relu"),
        ({"layers": [3]}, r"layers: got \[3\], expected patterns"),
        ({"momentum": 1.0}, "momentum: got 1.0, expected a finite number of at least 0 and below 1"),
        ({"nesterov": 1}, "nesterov: got 1, expected true or false"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov: got true with momentum 0, expected a positive"),
        ({"weight_decay": -0.1}, "weight_decay: got -0.1"),
    ],
)
def test_bad_hyper_parameters(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"{method}.{message}"):
        config(method, options)


def test_options_of_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse")
    given = ["--method", "rank-control", "--rank-control.layers", "relu3,relu4", "--rank-control.nesterov"]
    options = cli._parse_options("train", TrainConfig, [*given, "--rank-control.metric=participation-ratio"])
    again = TrainConfig.from_mapping(json.loads(json.dumps(options.mapping())))
    for found in (options, again):
        hyper = found.hyper["rank-control"]
        assert hyper["layers"] == ["relu3", "relu4"]
        assert (hyper["nesterov"], hyper["metric"]) == (True, "participation-ratio")
