"""One tracker, however the model is run: each record equals float64 singular values of that same step."""

from __future__ import annotations

import copy
import gc
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from tracker_models import RTOL, SITES, Net, Saved, assert_equal_to_svd, images, svd_count

from bsgap_kernels import RankTracker

STEPS = 4


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    """Code compiled for a model of an earlier test would serve this one's, without its hooks."""
    torch._dynamo.reset()
    torch.manual_seed(0)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 10), nn.Tanh(), nn.Linear(10, 2))


def rows(step: int = 0, count: int = 40) -> Tensor:
    return torch.randn(count, 12, generator=torch.Generator().manual_seed(step)) * torch.logspace(0, -1.5, 12)


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def watch(model: nn.Module, **options: Any) -> RankTracker:
    return RankTracker(model, rtol=RTOL, verbose=False, **options)


def plain(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return model


def in_place(model: nn.Module) -> Callable[[Tensor], Tensor]:
    model.compile(backend="aot_eager", fullgraph=True)
    return model


def regional(model: nn.Module) -> Callable[[Tensor], Tensor]:
    model.first.compile(backend="aot_eager", fullgraph=True)
    model.head = torch.compile(model.head, backend="aot_eager", fullgraph=True)
    return model


def compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def inside_checkpoint(reentrant: bool) -> Callable[[nn.Module], Callable[[Tensor], Tensor]]:
    return lambda model: lambda x: checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)


MODES: dict[str, tuple[Callable[[nn.Module], Callable[[Tensor], Tensor]], bool | None]] = {
    "eager": (plain, None),
    "compiled": (compiled, None),
    "compiled in place": (in_place, None),
    "compiled in regions": (regional, None),
    "checkpointed": (plain, False),
    "checkpointed, reentrant": (plain, True),
    "inside checkpoint": (inside_checkpoint(False), None),
    "inside reentrant checkpoint": (inside_checkpoint(True), None),
    "compiled, checkpointed": (compiled, False),
    "compiled inside checkpoint": (
        lambda model: torch.compile(inside_checkpoint(False)(model), backend="aot_eager"),
        None,
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_each_step_equals_singular_values(mode: str) -> None:
    run_as, checkpointed = MODES[mode]
    model = Net(checkpointed)
    # Compiled code saves nothing for anybody: a twin with the same parameters runs eagerly beside it.
    twin = Net(checkpointed) if "compiled" in mode else model
    saved = Saved(twin, ["act", "head.1"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with watch(model) as tracker:
        run = run_as(model)
        for step in range(STEPS):
            x = images(step)
            if twin is not model:
                values = [*model.parameters(), *model.buffers()]
                for target, value in zip([*twin.parameters(), *twin.buffers()], values, strict=True):
                    target.data.copy_(value)
                twin(x.clone().requires_grad_(x.requires_grad))
            optimizer.zero_grad()
            run(x).square().mean().backward()
            optimizer.step()
            counts = assert_equal_to_svd(tracker.collect(), saved.take())
            assert 1 < counts[-1] < 8
    assert tracker.sites() == (SITES if mode != "compiled in regions" else tracker.sites())


@pytest.mark.slow
def test_inductor() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    saved = Saved(twin, ["1", "3"])
    with watch(model) as tracker:
        run = torch.compile(model, fullgraph=True)
        for step in range(STEPS):
            twin(rows(step))
            run(rows(step)).sum().backward()
            assert_equal_to_svd(tracker.collect(), saved.take())


def test_nothing_recompiles_in_100_steps() -> None:
    model = Net()
    counter = CompileCounterWithBackend("aot_eager")
    counts = []
    with watch(model, every=3) as tracker:
        run = torch.compile(model, backend=counter, fullgraph=True)
        for step in range(100):
            with tracker.paused(step % 10 == 6):
                run(images(step)).sum().backward()
            if step % 20 == 19:
                with tracker.view("probe"):
                    run(images(step))
                assert len(tracker.collect("probe")) == len(SITES)
            counts.append(len(tracker.collect()))
            if step == 0:
                graphs = counter.frame_count
    assert counter.frame_count == graphs
    assert counts == [len(SITES) if s % 3 == 0 and s % 10 != 6 else 0 for s in range(100)]


def test_micro_batches_add_up() -> None:
    model = Net()
    saved = Saved(model, ["act", "head.1"])
    with watch(model, micro_batches=3) as tracker:
        for step in range(2):
            for part in images(step, 15).split(5):
                model(part).sum().backward()
            records = tracker.collect()
            assert_equal_to_svd(records, saved.take())
            assert records["head.1#0"].shape == (15, 24)


def test_a_wide_site_refuses_what_does_not_add_up() -> None:
    model = Net()
    with watch(model) as tracker:
        model(images(0))
        with pytest.raises(RuntimeError, match=r"head.1#0: read a second time .* say micro_batches="):
            model(images(1))
        # Sites that are tall have added up, and the next step is as any other.
        assert tracker.collect()["act#0"].shape == (400, 6)
        saved = Saved(model, ["act", "head.1"])
        model(images(2))
        assert_equal_to_svd(tracker.collect(), saved.take())


@pytest.mark.parametrize("compiling", [False, True])
def test_autocast(compiling: bool) -> None:
    model = Net()
    saved = Saved(model, [] if compiling else ["act", "head.1"])
    with watch(model) as tracker:
        run = compiled(model) if compiling else model
        with torch.autocast("cpu", torch.bfloat16):
            run(images(0)).float().sum().backward()
            records = tracker.collect()
        assert list(records) == SITES
        activations = saved.take()
        assert all(x.dtype == torch.bfloat16 for x in activations.values())
        if not compiling:
            assert_equal_to_svd(records, activations)


def test_a_sketch_is_not_cast_by_autocast() -> None:
    model = nn.Sequential(nn.Linear(12, 30), nn.ReLU())
    records = []
    for enabled in (False, True):
        hidden = torch.relu(model[0](rows())).detach()
        with watch(
            model[1], max_features=20, sketch=15, micro_batches=2, metrics=["frobenius_norm"]
        ) as tracker:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                model[1](hidden)
            records.append(tracker.collect()["ReLU#0"].summary["frobenius_norm"])
    assert records[0] == records[1]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, None])
@pytest.mark.parametrize("compiling", [False, True])
def test_passes_that_do_not_train_are_read_in_views_only(context: Any, compiling: bool) -> None:
    model = mlp()
    with watch(model) as tracker:
        run = torch.compile(model, backend="eager") if compiling else model

        def aside(x: Tensor) -> None:
            model.train(context is not None)
            with torch.enable_grad() if context is None else context():
                run(x)
            model.train()

        run(rows(0)).sum().backward()
        aside(rows(1, 7))
        assert tracker.collect()["1#0"].shape == (40, 16)
        aside(rows(1, 7))
        assert tracker.collect() == {}
        with tracker.view("probe"):
            aside(rows(1, 7))
        assert tracker.collect("probe")["3#0"].shape == (7, 10)
        run(rows(2, 9))
        assert tracker.collect()["1#0"].shape == (9, 16)


def test_several_models_and_trackers_keep_to_themselves() -> None:
    first, second = mlp(), mlp()
    one, two, again = watch(first), watch(second), watch(first, layers=["3"])
    run_first, run_second = compiled(first), compiled(second)
    for step in range(2):
        run_first(rows(step))
        run_second(rows(step + 5, 31))
        expected = svd_count(torch.relu(first[0](rows(step))).detach())
        assert one.collect()["1#0"].near_rank == expected
        assert {site: r.shape for site, r in two.collect().items()} == {"1#0": (31, 16), "3#0": (31, 10)}
        assert {site: r.shape for site, r in again.collect().items()} == {"3#0": (40, 10)}


def test_a_closed_tracker_leaves_the_compiled_model_usable() -> None:
    model = mlp()
    tracker = watch(model)
    run = compiled(model)
    run(rows())
    assert len(tracker.collect()) == 2
    tracker.close()
    assert hooks_of(model) == 0
    torch.testing.assert_close(run(rows(1)), model(rows(1)))
    tracker.step()
    tracker.close()
    assert tracker.collect() == {}
    with watch(model) as later:
        run(rows(1))
        with pytest.raises(RuntimeError, match="attach the tracker before the first compiled call"):
            later.step()


def test_attaching_after_the_first_compiled_call_is_refused() -> None:
    model = mlp()
    run = compiled(model)
    run(rows())
    with pytest.raises(ValueError, match="before torch.compile wraps it"):
        watch(run)
    with watch(model) as tracker:
        run(rows())
        with pytest.raises(RuntimeError, match=r"before the first compiled call .*torch.compiler.reset\(\)"):
            tracker.step()
        torch.compiler.reset()  # as the message says
        run(rows())
        assert list(tracker.collect()) == ["1#0", "3#0"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_region_compiled_before_is_refused_by_name(wrapped: bool) -> None:
    inner = nn.Sequential(nn.Linear(12, 16), nn.ReLU())
    if wrapped:
        model = nn.Sequential(torch.compile(inner, backend="aot_eager"), nn.Linear(16, 4), nn.Tanh())
    else:
        inner.compile(backend="aot_eager")
        model = nn.Sequential(inner, nn.Linear(16, 4), nn.Tanh())
    model(rows())
    with watch(model, layers=["0.**1", "2"]) as tracker:
        model(rows())
        message = ""
        try:
            tracker.step()
        except RuntimeError as error:
            message = str(error)
    if wrapped or message:  # compiled in place, torch 2.11 compiles it again, with its hook
        assert re.search(r"no activation came from 0\.\S*1, inside the compiled module 0:", message)
    else:
        assert tracker.sites() == ["0.1#0", "2#0"]
    with watch(model, layers=["2"]) as tracker:
        model(rows())
        assert list(tracker.collect()) == ["2#0"]


def test_a_module_that_compiled_code_does_not_call_is_no_error() -> None:
    model = mlp()
    model.unused = nn.ReLU()
    model.forward = lambda x: model[1](model[0](x))
    with watch(model) as tracker:
        torch.compile(model, backend="eager")(rows())
        tracker.step()
        assert tracker.sites() == ["1#0"]


def test_dropping_the_tracker_takes_it_off() -> None:
    for make in (mlp, Functional):
        model = make()
        tracker = watch(model)
        model(rows())
        tracker.step()
        assert hooks_of(model) == 3
        del tracker
        gc.collect()
        assert hooks_of(model) == 0


def test_an_exception_inside_a_block_restores_recording() -> None:
    model = mlp()
    with watch(model) as tracker:
        for block in (tracker.paused(), tracker.view("probe")):
            with pytest.raises(KeyError), block:
                raise KeyError
        model(rows())
        assert len(tracker.collect()) == 2


@pytest.mark.parametrize("functional", [False, True])
def test_a_detached_tracker_has_hooks_in_views_alone(functional: bool) -> None:
    """And in them it reads what it reads attached."""
    model: nn.Module = Functional() if functional else mlp()
    with watch(model, example=rows()) as tracker:
        attached = hooks_of(model)
        counts = {}
        for detached in (False, True):
            with tracker.detached(detached), tracker.detached(False):
                assert hooks_of(model) == (0 if detached else attached)
                with tracker.view("probe"):
                    assert hooks_of(model) == attached
                    with tracker.view("inner"):
                        pass
                    assert hooks_of(model) == attached
                    model(rows())
                assert hooks_of(model) == (0 if detached else attached)
                found = tracker.collect("probe")
                counts[detached] = {site: record.near_rank for site, record in found.items()}
            assert hooks_of(model) == attached
        assert counts[True] == counts[False]
        assert len(counts[True]) == 2
        model(rows())
        assert {site: record.near_rank for site, record in tracker.collect().items()} == counts[True]
        with pytest.raises(KeyError), tracker.detached():
            raise KeyError
        assert hooks_of(model) == attached
        with tracker.detached():
            tracker.close()
        assert hooks_of(model) == 0


class Functional(nn.Module):
    """Nonlinearities that are no modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 16), nn.Linear(16, 10), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.relu(self.a(x)))))


def test_a_compiled_model_with_functional_nonlinearities() -> None:
    model = Functional()
    with watch(model) as tracker:
        compiled(model)(rows())
        with pytest.raises(RuntimeError, match="functional ones are not seen .* give example="):
            tracker.step()
    state = torch.random.get_rng_state()
    with watch(model, example=rows()) as tracker:
        assert torch.equal(torch.random.get_rng_state(), state)
        assert model.training
        counter = CompileCounterWithBackend("aot_eager")
        run = torch.compile(model, backend=counter, fullgraph=True)
        for step in range(STEPS):
            run(rows(step)).sum().backward()
            records = tracker.collect()
            with tracker.paused():
                hidden = torch.relu(model.a(rows(step))).detach()
                saved = {"b:input#0": hidden, "c:input#0": torch.tanh(model.b(hidden)).detach()}
            assert_equal_to_svd(records, saved)
