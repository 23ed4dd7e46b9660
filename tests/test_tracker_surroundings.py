"""The tracker among other uses of the model: traces, transforms, tensors without numbers, odd dtypes."""

from __future__ import annotations

import gc
import subprocess
import sys
import tracemalloc
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from tracker_models import RTOL, assert_equal_to_svd

from bsgap_kernels import RankTracker
from bsgap_kernels.tracking import hooks


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 10), nn.Tanh(), nn.Linear(10, 2))


def watch(model: nn.Module, **options: Any) -> RankTracker:
    return RankTracker(model, rtol=RTOL, verbose=False, **options)


X = torch.randn(40, 12, generator=torch.Generator().manual_seed(1))


def assert_tracks(model: nn.Module, tracker: RankTracker, x: Tensor = X) -> None:
    """One step from here on is read as it should be."""
    tracker.collect()
    model(x)
    with torch.no_grad():
        h = model[0](x).relu()
        saved = {"1#0": h, "3#0": model[2](h).tanh()}
    assert_equal_to_svd(tracker.collect(), saved)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_is_without_the_tracker(strict: bool) -> None:
    model = mlp()
    with watch(model) as tracker:
        program = torch.export.export(model, (X,), strict=strict)
        assert not [node for node in program.graph.nodes if "bsgap" in str(node.target)]
        torch.testing.assert_close(program.module()(X), model(X))
        assert_tracks(model, tracker)


def test_a_trace_is_without_the_tracker() -> None:
    model = mlp()
    with watch(model) as tracker:
        traced = torch.jit.trace(model, X)
        assert tracker.collect() == {}
        assert "bsgap" not in str(traced.inlined_graph)
        assert_tracks(model, tracker)


def test_modules_that_hooks_do_not_reach_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated
        scripted = torch.jit.script(mlp())
    with pytest.raises(
        TypeError, match="model: got RecursiveScriptModule, expected the module before torch.jit"
    ):
        watch(scripted)
    with pytest.raises(TypeError, match="model: got DataParallel, .* expected DistributedDataParallel"):
        watch(nn.DataParallel(mlp()))
    wrapper = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = torch.compile(mlp())
    with pytest.raises(ValueError, match="before torch.compile wraps it"):
        watch(wrapper)
    model = mlp()
    with watch(model), pytest.raises(RuntimeError, match="as a replica of DataParallel"):
        model._replicate_for_data_parallel()(X)


def test_transforms_of_functions() -> None:
    model = mlp()
    parameters = dict(model.named_parameters())

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (x,)).sum()

    def per_example(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return loss(values, x[None])

    with watch(model) as tracker:
        torch.func.grad(loss)(parameters, X)
        assert tracker.collect()["1#0"].shape == (40, 16)
        gradients = torch.func.vmap(torch.func.grad(per_example), in_dims=(None, 0))
        with pytest.raises(RuntimeError, match=r"1: called inside torch.func.vmap.*paused\(\)"):
            gradients(parameters, X)
        with tracker.paused():
            gradients(parameters, X)
        assert_tracks(model, tracker)


def test_tensors_without_numbers_are_passed_over() -> None:
    model = mlp()
    with watch(model) as tracker:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            model(mode.from_tensor(X))
        tracker.step()
        assert_tracks(model, tracker)
    with torch.device("meta"):
        model = mlp()
    with watch(model) as tracker:
        model(X.to("meta"))
        tracker.step()
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        assert_tracks(model, tracker)
        torch.compile(model, backend="aot_eager", fullgraph=True)(X)
        assert len(tracker.collect()) == 2


class Made(nn.Module):
    """Gives what a function makes of its input."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda x: x.to(torch.complex64),
            "Made: got torch.complex64, torch.strided, expected a dense tensor",
        ),
        (lambda x: x > 0, "Made: got torch.bool"),
        (lambda x: (x * 9).long(), "Made: got torch.int64"),
        (lambda x: x.to(torch.float8_e4m3fn), "Made: got torch.float8_e4m3fn"),
        (lambda x: x.to_sparse(), "Made: got torch.float32, torch.sparse_coo"),
        (
            lambda x: torch.nested.nested_tensor([x, x[:3]], layout=torch.jagged),
            "Made: got a nested tensor, expected a dense tensor of float64",
        ),
        (lambda x: 3, "Made: the module returned int, expected a tensor"),
    ],
    ids=["complex", "bool", "integer", "float8", "sparse", "nested", "number"],
)
def test_what_is_no_matrix_of_real_numbers_is_named(make: Any, message: str) -> None:
    model = Made(make)
    with watch(model, layers=["Made"]) as tracker:
        with pytest.raises(TypeError, match=message):
            model(X)
        model.make = torch.relu
        model(X)
        assert tracker.collect()["Made#0"].shape == (40, 12)


def test_a_model_that_changes_its_dtype() -> None:
    model = mlp()
    with watch(model) as tracker:
        assert_tracks(model, tracker)
        for dtype in (torch.float64, torch.bfloat16, torch.float32):
            model.to(dtype)
            assert_tracks(model, tracker, X.to(dtype))


def test_the_default_device_is_of_no_account() -> None:
    torch.set_default_device("meta")  # whatever is made there without a device named cannot be counted
    try:
        with torch.device("cpu"):
            model = mlp()
        for options in (
            {"metrics": "all", "certify": True},
            {"metrics": ["saturation", "dormant_units"], "center": True},
            {"sketch": 5, "max_features": 8, "micro_batches": 2},
        ):
            with watch(model, **options) as tracker:
                model(X)
                assert tracker.collect()["1#0"].near_rank > 0
    finally:
        torch.set_default_device(None)


def test_an_empty_batch() -> None:
    model = mlp()
    with watch(model, metrics="all") as tracker:
        for rows in (0, 7, 0):
            model(X[:rows])
            record = tracker.collect()["1#0"]
            assert record.shape == (rows, 16)
            assert (record.near_rank > 0) == (rows > 0)
        assert_tracks(model, tracker)


def test_parts_that_are_called_by_themselves() -> None:
    model = nn.ModuleDict({"actor": mlp(), "critic": mlp()})
    with watch(model) as tracker:
        model["actor"](X)
        model["critic"](X)
        tracker.step()
        assert tracker.sites() == ["actor.1#0", "actor.3#0", "critic.1#0", "critic.3#0"]


def test_a_pause_from_the_first_step_on() -> None:
    model = mlp()
    with watch(model) as tracker:
        for step in range(4):
            with tracker.paused(step < 2):
                model(X)
            tracker.step()
        assert tracker.sites() == ["1#0", "3#0"]
    with watch(model) as tracker:
        model.eval()
        model(X)
        with pytest.raises(RuntimeError, match="Call the model in training mode and with gradients"):
            tracker.step()
        model.train()
        assert_tracks(model, tracker)


def test_an_example_that_fails_leaves_nothing() -> None:
    model = mlp()
    model.eval()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        watch(model, example=torch.randn(3, 5))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(m.training for m in model.modules())


def test_compiled_code_that_was_not_searched_is_mentioned(capsys: pytest.CaptureFixture[str]) -> None:
    for example in (None, X):
        model = mlp()
        with RankTracker(model, example=example) as tracker:
            torch.compile(model, backend="eager")(X)
            tracker.step()
        said = capsys.readouterr().err
        assert said.startswith("RankTracker: 2 sites, ")
        assert ("found by example= only" in said) == (example is None)


def test_numbers_of_trackers_are_not_given_twice() -> None:
    model = mlp()
    first = watch(model)
    reader, number = weakref.ref(first._reader), first._reader._number
    first.close()
    assert number not in hooks._READERS
    del first
    gc.collect()
    assert reader() is None
    with watch(model) as second:
        assert second._reader._number > number
        torch.ops.bsgap._observe_(torch.zeros(1), X, number, 0)  # of code that outlived its tracker
        assert second.collect() == {}


@pytest.mark.slow
def test_10_000_steps_hold_no_more_than_1000() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    x = torch.randn(6, 4)
    with watch(model, max_overhead=0.5) as tracker:
        held = []
        for step in range(10_001):
            model(x)
            tracker.step()
            if step == 1000:
                tracemalloc.start()
            if step in (2000, 10_000):
                gc.collect()
                held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    # The log of cadences has at most an entry in five tracked steps, and settles.
    assert held[1] - held[0] < 20_000


FRESH = """
import sys
import torch
from bsgap_kernels import RankTracker

model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
with RankTracker(model, verbose=False) as tracker:
    model(torch.ones(2, 3)).sum().backward()
    print(list(tracker.collect()), "torch._dynamo" in sys.modules)
"""


def test_a_tracker_does_without_the_compiler() -> None:
    # Its import takes seconds.
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["['1#0']", "False"]


def test_the_token_is_marked_as_the_compiler_marks_static_addresses() -> None:
    marked = torch.zeros(1)
    torch._dynamo.mark_static_address(marked)
    with watch(mlp()) as tracker:
        assert vars(tracker._reader._token) == vars(marked) != {}
