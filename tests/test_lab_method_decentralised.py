"""Decentralised methods: their weights, their bias, and the same iterates in one process and over ranks."""

from __future__ import annotations

import json
import math
import multiprocessing
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lab_data import RecordProperty, small_data
from test_lab_resume import config, digest, run_again, train_until, values
from torch import Tensor, nn

from bsgap_kernels.lab import loop
from bsgap_kernels.lab import setup as lab_setup
from bsgap_kernels.lab.batch import Batch, Gradients
from bsgap_kernels.lab.checks import UserError
from bsgap_kernels.lab.config import TrainConfig
from bsgap_kernels.lab.distributed import ALONE, Ranks
from bsgap_kernels.lab.methods import REGISTRY, Course
from bsgap_kernels.lab.methods.decentralised import Decentlam, Dmsgd, Dsgd, Pmsgd
from bsgap_kernels.lab.methods.mixing import Mixing
from bsgap_kernels.lab.methods.topology import topology_weights
from bsgap_kernels.lab.methods.workers import Workers
from bsgap_kernels.lab.results import NoWriter
from bsgap_kernels.lab.stop import Stop
from bsgap_kernels.lab.train import train

METHODS: list[type[Workers]] = [Decentlam, Dmsgd, Dsgd, Pmsgd]
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


# -- the update rules, on workers whose losses differ


class LeastSquares:
    """f_i(x) = |A_i x - b_i|² / 2 of n workers, each with a solution of its own."""

    def __init__(self, workers: int) -> None:
        generator = torch.Generator().manual_seed(3)
        a = torch.randn(workers, 20, 4, dtype=torch.float64, generator=generator) / 20**0.5
        own = torch.randn(workers, 4, 1, dtype=torch.float64, generator=generator)
        self.hessians = a.mT @ a
        self.right = (self.hessians @ own).squeeze(-1)
        self.minimum = torch.linalg.solve(self.hessians.sum(0), self.right.sum(0))

    def gradients(self, x: Tensor) -> Tensor:
        return (self.hessians @ x.unsqueeze(-1)).squeeze(-1) - self.right

    def run(
        self, method: type[Workers], weights: Tensor, lr: Callable[[int], float], steps: int, momentum: float
    ) -> Tensor:
        mix = Mixing(weights, ALONE).mix
        x = torch.zeros_like(self.right)
        m = torch.zeros_like(x)
        for step in range(steps):
            x, m = method.step(x, m, self.gradients(x), lr(step), momentum, mix)
        return x

    def after(self, method: type[Workers], weights: Tensor, lr: float, steps: int, momentum: float) -> Tensor:
        """x after many steps from 0: a step is affine in x and m, and so many are a power of its matrix."""
        mix = Mixing(weights, ALONE).mix
        size = self.right.numel()

        def step(state: Tensor) -> Tensor:
            x, m = (half.reshape(self.right.shape) for half in state.split(size))
            return torch.cat(
                [new.flatten() for new in method.step(x, m, self.gradients(x), lr, momentum, mix)]
            )

        constant = step(torch.zeros(2 * size, dtype=torch.float64))
        unit = torch.eye(2 * size, dtype=torch.float64)
        affine = torch.eye(2 * size + 1, dtype=torch.float64)
        affine[:-1] = torch.stack([*(step(row) - constant for row in unit), constant], dim=1)
        return torch.linalg.matrix_power(affine, steps)[:size, -1].reshape(self.right.shape)

    def bias(self, x: Tensor) -> float:
        """Mean squared distance of the workers from the minimum of their mean loss."""
        return float((x - self.minimum).square().sum(1).mean())


def test_decentlam_has_the_bias_of_dsgd_and_dmsgd_a_far_larger_one(record_property: RecordProperty) -> None:
    problem, ring = LeastSquares(8), topology_weights("ring", 8)
    bias = {method: problem.bias(problem.after(method, ring, 1e-3, 2**17, 0.9)) for method in METHODS[:3]}
    assert bias[Dsgd] > 1e-6
    assert bias[Decentlam] == pytest.approx(bias[Dsgd], rel=1e-9)
    assert bias[Dmsgd] >= 50 * bias[Decentlam]
    for method, value in bias.items():
        record_property(f"mechanism {method.name}", f"bias of a ring of 8, least squares: {value:.3g}")
    assert problem.bias(problem.run(Pmsgd, ring.new_full((8, 8), 1 / 8), lambda _: 0.1, 600, 0.9)) < 1e-20


@pytest.mark.parametrize("method", METHODS)
def test_many_steps_at_once_are_the_steps(method: type[Workers]) -> None:
    problem, ring = LeastSquares(8), topology_weights("ring", 8)
    found, expected = (
        problem.after(method, ring, 1e-2, 64, 0.9),
        problem.run(method, ring, lambda _: 1e-2, 64, 0.9),
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_decentlam_without_momentum_is_dsgd() -> None:
    problem, grid = LeastSquares(6), topology_weights("grid", 6)
    found, expected = (problem.run(m, grid, lambda _: 1e-3, 20, 0.0) for m in (Decentlam, Dsgd))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(problem.run(Dmsgd, grid, lambda _: 1e-3, 20, 0.0), expected, rtol=0, atol=0)


@pytest.mark.parametrize("method", [Decentlam, Dmsgd, Pmsgd])
def test_with_equal_weights_all_are_momentum_sgd_on_the_mean_loss(method: type[Workers]) -> None:
    problem = LeastSquares(5)
    found = problem.run(method, topology_weights("complete", 5), lambda _: 1e-3, 30, 0.9)
    x = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=1e-3, momentum=0.9)
    for _ in range(30):
        x.grad = problem.gradients(x.detach().expand(5, 4)).mean(0)
        optimizer.step()
    torch.testing.assert_close(found, x.detach().expand(5, 4), rtol=1e-12, atol=1e-13)


def test_decentlam_is_the_published_update_at_a_constant_learning_rate() -> None:
    """g̃ = (x - W (x - γ g)) / γ; m ← β m + g̃; x ← x - γ m."""
    problem, weights, lr = LeastSquares(8), topology_weights("exponential", 8), 2e-3
    x = torch.zeros(8, 4, dtype=torch.float64)
    m = torch.zeros_like(x)
    for _ in range(25):
        m = 0.8 * m + (x - weights @ (x - lr * problem.gradients(x))) / lr
        x = x - lr * m
    found = problem.run(Decentlam, weights, lambda _: lr, 25, 0.8)
    torch.testing.assert_close(found, x, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("method", METHODS)
def test_a_warm_up_may_start_at_0(method: type[Workers]) -> None:
    problem, weights = LeastSquares(8), topology_weights("complete" if method is Pmsgd else "ring", 8)
    assert problem.run(method, weights, lambda _: 0.0, 3, 0.9).count_nonzero() == 0
    warm = problem.run(method, weights, lambda step: min(1.0, step / 10) * 0.05, 1000, 0.9)
    constant = problem.run(method, weights, lambda _: 0.05, 1000, 0.9)
    torch.testing.assert_close(warm, constant, rtol=1e-9, atol=1e-12)


# -- in one process and over ranks


def network() -> nn.Module:
    """Small, float64, with batch norm; the same weights each time."""
    torch.manual_seed(2)
    layers = [nn.Flatten(), nn.Linear(784, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 10)]
    return nn.Sequential(*layers).double()


def iterate(method: type[Workers], ranks: Ranks, micro_batch: int | None, **hyper: Any) -> dict[str, Any]:
    """Four updates on uneven shares in float64: the state, the model's, and the last values."""
    data, model, parameters = small_data(), network(), method.hyper_type(workers=4, **hyper)  # type: ignore[call-arg]
    images = data.train(slice(None))[0].double()
    course = Course(22, 4, 4, 0, data, ranks)
    parts = method.parts(parameters, 22, micro_batch, ranks)
    trained = method(model, 0.1, parameters, course)
    gradients = Gradients(model, ranks, apart=True)
    for step in range(4):

        def read(rows: slice, first: int = 8 * step) -> tuple[Tensor, Tensor]:
            part = slice(first + rows.start, first + rows.stop)
            return images[part], data.train_labels[part]

        trained.lr = 0.05 * step  # the first is 0
        loss, right = trained.update(Batch(step, slice(0, 22), read, gradients, parts))
    return {
        "state": {name: value for name, value in trained.state_dict().items() if name != "lr"},
        "model": {name: value for name, value in model.state_dict().items() if "num_batches" not in name},
        "values": torch.stack([loss.double(), right.double()]),
        "log": torch.tensor(trained.log()["consensus_distance"]),
        "images": gradients.images,
    }


CASES: list[tuple[type[Workers], int | None, dict[str, Any]]] = [
    (Decentlam, None, {"topology": "ring", "weight_decay": 0.01}),
    (Decentlam, 3, {"topology": "grid"}),
    (Dmsgd, None, {"topology": "star"}),
    (Dsgd, 4, {"topology": "star"}),
    (Dmsgd, None, {"weights": torch.eye(4).tolist()}),
    (Pmsgd, None, {}),
]
"""Method, rows of a pass, hyper-parameters."""


def over_ranks(world: int, folder: Path, work: Callable[[Ranks], None]) -> None:
    """Do some work on ranks that are forks of this process."""

    def rank_of(rank: int) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
        work(Ranks(rank, world, dist.new_group()))
        dist.destroy_process_group()

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=rank_of, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        if process.exitcode is None:
            process.kill()
    assert [process.exitcode for process in processes] == [0] * world
    (folder / "meet").unlink(missing_ok=True)


def worst(found: Any, expected: Any) -> float:
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        return max((worst(found[name], expected[name]) for name in expected), default=0.0)
    if isinstance(expected, int):
        assert found == expected
        return 0.0
    assert found.shape == expected.shape
    return float((found - expected).abs().max()) if found.numel() else 0.0


def test_one_process_and_four_ranks_give_the_same_iterates(
    tmp_path: Path, record_property: RecordProperty
) -> None:
    def work(ranks: Ranks) -> None:
        found = [iterate(method, ranks, rows, **hyper) for method, rows, hyper in CASES]
        torch.save(found, tmp_path / f"{ranks.rank}.pt")

    over_ranks(4, tmp_path, work)
    expected = [iterate(method, ALONE, rows, **hyper) for method, rows, hyper in CASES]
    assert [case["images"] for case in expected] == [88] * len(CASES)
    assert min(float(case["state"]["x"].std(0).max()) for case in expected[:5]) > 1e-4
    apart = 0.0
    for rank in range(4):
        found = torch.load(tmp_path / f"{rank}.pt")
        for case, one in zip(found, expected, strict=True):
            assert worst(case, one) < 1e-12
            apart = max(apart, worst(case, one))
    told = f"one process against four by gloo: {apart:.0e} apart at most (float64)"
    record_property("mechanism decentlam dmsgd dsgd pmsgd", told)


# -- runs of the lab


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_goes_on_exactly(method: type[Workers], tmp_path: Path) -> None:
    settings = config(
        method=method.name, unfold="channel", steps=4, micro_batch=3, hyper={method.name: {"workers": 3}}
    )
    run_again(tmp_path / "whole", settings)
    for step in (4, 7):  # gradients of three workers a step, in two passes each
        assert train_until(step, tmp_path / str(step), settings, Stop())["status"] == "stopped"
        run_again(tmp_path / str(step), settings)
        assert values(tmp_path / str(step)) == values(tmp_path / "whole")
        assert digest(tmp_path / str(step)) == digest(tmp_path / "whole")


def test_micro_batches_divide_the_rows_of_a_worker(tmp_path: Path) -> None:
    """Each pass has at most so many rows, and the numbers are those of one pass a worker."""
    read: list[int] = []

    class Watched(Gradients):
        def _add_pass(self, images: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
            read.append(len(images))
            return super()._add_pass(images, *arguments)

    common: dict[str, Any] = {
        "method": "dmsgd",
        "unfold": "channel",
        "steps": 2,
        "hyper": {"dmsgd": {"workers": 3}},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Gradients", Watched)
        for name, rows in (("whole", None), ("parts", 3)):
            run_again(tmp_path / name, config(**common, micro_batch=rows))
    assert read == 2 * [5, 5, 6] + 2 * [2, 3, 2, 3, 3, 3]
    expected = values(tmp_path / "whole")
    for key, value in values(tmp_path / "parts").items():
        assert value == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key


def summary_of(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "summary.json").read_text()))


def test_a_run_says_how_far_workers_are_apart_and_what_it_cost(tmp_path: Path) -> None:
    settings = config(method="decentlam", unfold="channel", steps=3, hyper={"decentlam": {"workers": 4}})
    train(settings, tmp_path / "ring", data=small_data())
    summary = summary_of(tmp_path / "ring")
    assert summary["method_summary"] == {"spectral_gap": pytest.approx(2 / 3)}
    assert summary["gradient_images"] == 3 * 16
    apart = [
        value for key, value in values(tmp_path / "ring").items() if key[2] == "method.consensus_distance"
    ]
    assert len(apart) == 3
    assert min(apart) > 0
    settings = config(method="pmsgd", unfold="channel", steps=3, hyper={"pmsgd": {"workers": 4}})
    train(settings, tmp_path / "equal", data=small_data())
    apart = [
        value for key, value in values(tmp_path / "equal").items() if key[2] == "method.consensus_distance"
    ]
    assert max(apart) < 1e-6  # the mean is rounded


def test_equal_workers_train_as_sgd_does(tmp_path: Path) -> None:
    common: dict[str, Any] = {"unfold": "channel", "steps": 5, "lr": 0.05}
    run_again(tmp_path / "sgd", config(**common))
    for name, hyper in (
        ("pmsgd", {"workers": 4}),
        ("decentlam", {"workers": 4, "topology": "complete"}),
        ("dmsgd", {"workers": 1}),
    ):
        run_again(tmp_path / name, config(**common, method=name, hyper={name: hyper}))
        expected = values(tmp_path / "sgd")
        found = {key: v for key, v in values(tmp_path / name).items() if not key[2].startswith("method.")}
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-6), (name, key)


def normalising(*arguments: Any) -> nn.Module:
    layers = [nn.Flatten(), nn.Linear(784, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10)]
    return nn.Sequential(*layers)


def test_ranks_give_the_run_of_one_process_and_go_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab_setup, "build_model", normalising)
    settings = config(
        method="decentlam", batch_size=15, steps=5, lr=0.05, layers=None, hyper={"decentlam": {"workers": 3}}
    )

    def work(ranks: Ranks) -> None:
        train(settings, tmp_path / "ranks", data=small_data(), ranks=ranks)
        with pytest.MonkeyPatch.context() as patch:
            stop = Stop()
            patch.setattr(Gradients, "compute", asking(stop, 2 if ranks.rank == 1 else 99))
            found = train(settings, tmp_path / "stopped", data=small_data(), ranks=ranks, stop=stop)
            assert (found["status"], found["steps"]) == ("stopped", 2)
        if ranks.main:
            shutil.copytree(tmp_path / "stopped", tmp_path / "alone")
        train(settings, tmp_path / "stopped", data=small_data(), ranks=ranks)
        other = config(method="decentlam", steps=1, hyper={"decentlam": {"workers": 2}})
        with pytest.raises(UserError, match=r"decentlam\.workers: got 2 and 3 processes, expected as many"):
            train(other, tmp_path / "other", data=small_data(), ranks=ranks)
        few = config(method="decentlam", batch_size=5, layers=None, hyper={"decentlam": {"workers": 3}})
        with pytest.raises(
            UserError, match="decentlam.workers: got passes of 1 row, expected at least 2 for batch norm"
        ):
            train(few, tmp_path / "few", data=small_data(), ranks=ranks)

    over_ranks(3, tmp_path, work)
    run_again(tmp_path / "one", settings)
    run_again(tmp_path / "alone", settings)
    assert values(tmp_path / "stopped") == values(tmp_path / "ranks")
    assert digest(tmp_path / "stopped") == digest(tmp_path / "ranks")
    expected = values(tmp_path / "one")
    for name in ("ranks", "alone"):
        found = values(tmp_path / name)
        assert list(found) == list(expected)
        for key, value in expected.items():
            # Float32 sums in another order.
            assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-6), (name, key)


def asking(stop: Stop, call: int) -> Callable[..., Any]:
    """`Gradients.compute` that asks to stop in its call of this number."""
    calls = iter(range(1, 1000))
    original = Gradients.compute

    def compute(self: Gradients, *arguments: Any) -> Any:
        if next(calls) == call:
            stop.ask(signal.SIGTERM)
        return original(self, *arguments)

    return compute


def test_each_worker_has_its_own_batch_norm_and_the_model_their_mean() -> None:
    """Running statistics after one update at learning rate 0: those of each worker's rows alone."""
    data, model = small_data(), network()
    hyper = REGISTRY["dsgd"].hyper_type(workers=4)  # type: ignore[call-arg]
    trained = Dsgd(model, 1.0, hyper, Course(12, 1, 4, 0, data))
    trained.lr = 0.0
    images = data.train(slice(0, 12))[0].double()

    def read(rows: slice) -> tuple[Tensor, Tensor]:
        return images[rows], data.train_labels[rows]

    trained.update(Batch(0, slice(0, 12), read, Gradients(model, ALONE, apart=True), 4))
    expected = []
    for worker in range(4):
        alone = network()
        alone(images[3 * worker : 3 * worker + 3])
        expected.append(torch.cat([alone[2].running_mean, alone[2].running_var]))
    torch.testing.assert_close(trained.state_dict()["statistics"], torch.stack(expected))
    found = torch.cat([model[2].running_mean, model[2].running_var])
    torch.testing.assert_close(found, torch.stack(expected).mean(0))


@pytest.mark.parametrize("name", ["dsgd", "dmsgd", "decentlam", "pmsgd"])
def test_a_frozen_parameter_stays(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[nn.Module] = []

    def frozen(*arguments: Any) -> nn.Module:
        built.append(nn.Sequential(nn.Flatten(), nn.Linear(784, 6), nn.ReLU(), nn.Linear(6, 10)))
        built[0][1].weight.requires_grad_(False)
        return built[-1]

    monkeypatch.setattr(lab_setup, "build_model", frozen)
    hyper = {name: {"workers": 4, "weight_decay": 0.1}}
    made = lab_setup.set_up(config(method=name, layers=None, hyper=hyper), small_data())
    before = [parameter.detach().clone() for parameter in made.model.parameters()]
    with made.probe_tracker.detached():
        loop.Loop(made)._update(NoWriter())
    made.close()
    moved = [not torch.equal(a, b) for a, b in zip(before, made.model.parameters(), strict=True)]
    assert moved == [False, True, True, True]


# -- mistakes


@pytest.mark.parametrize(
    ("hyper", "sentence"),
    [
        ({"workers": 0}, "decentlam.workers: got 0, expected an integer of at least 1"),
        ({"topology": "tree"}, "decentlam.topology: got 'tree', expected one of ring, grid, star"),
        ({"momentum": 1.0}, "decentlam.momentum: got 1.0, expected a finite number"),
        ({"weight_decay": -1.0}, "decentlam.weight_decay: got -1.0, expected"),
        ({"weights": [[0.5, 0.5], [0.5, 0.5]]}, "decentlam.weights: got 2 rows, expected one for each"),
        ({"workers": 2, "weights": [[0.5, 0.6], [0.5, 0.4]]}, "got row 0 with the sum 1.1, expected a"),
        (
            {"workers": 3, "weights": [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.5, 0.0, 0.5]]},
            "decentlam.weights: got 0.5 from 0 to 1 and 0.0 back, expected a symmetric matrix",
        ),
        ({"workers": 2, "weights": [[1.5, -0.5], [-0.5, 1.5]]}, "got 1.5 in row 0, expected numbers of at"),
        ({"workers": 2, "weights": [[math.nan, 1.0], [1.0, 0.0]]}, "decentlam.weights: got nan in row 0"),
        ({"workers": 2, "weights": [[1.0], [0.0, 1.0]]}, "decentlam.weights: got [1.0] as row 0, expected 2"),
        ({"workers": 2, "weights": "ring"}, "decentlam.weights: got 'ring', expected rows of"),
    ],
)  # fmt: skip
def test_bad_hyper_parameters(hyper: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        TrainConfig(method="decentlam", hyper={"decentlam": hyper})
    assert sentence in str(error.value)


@pytest.mark.parametrize("name", ["dsgd", "dmsgd", "pmsgd"])
def test_mistakes_name_the_method(name: str) -> None:
    with pytest.raises(UserError, match=rf"{name}\.workers: got -1"):
        TrainConfig(method=name, hyper={name: {"workers": -1}})


def test_what_does_not_fit_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lr: got 0\.0, expected a positive number"):
        train(config(method="decentlam", lr=0.0, unfold="channel"), tmp_path, data=small_data())
    with pytest.raises(UserError, match=r"batch_size: got 7, expected at least a row for each of the 8"):
        train(config(method="dsgd", batch_size=7), tmp_path, data=small_data())


def test_a_worker_with_one_row_has_no_batch_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab_setup, "build_model", normalising)
    options = {"method": "dsgd", "batch_size": 10, "layers": None}
    with pytest.raises(
        UserError, match="dsgd.workers: got passes of 1 row, expected at least 2 for batch norm"
    ):
        train(config(**options), tmp_path, data=small_data())
    hyper = {"dsgd": {"workers": 2}}
    with pytest.raises(UserError, match="micro_batch: got passes of 1 row, expected at least 2"):
        train(config(**options, micro_batch=1, hyper=hyper), tmp_path, data=small_data())
