"""CUDA ops inside graphs, on side streams, compiled, repeated: nothing waits, changes or mixes."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from gpu_support import DEVICE, cuda_only, random
from torch import Tensor
from tracker_models import RTOL, Net, Saved, assert_equal_to_svd, images, svd_count

import bsgap_kernels as bsgap
from bsgap_kernels import reference

pytestmark = pytest.mark.gpu
Outputs = Tensor | tuple[Tensor, ...]


def _accumulate(As: list[Tensor]) -> Outputs:
    n = As[0].shape[-1]
    state = torch.zeros(n + 1, n + 1, dtype=torch.float64, device=As[0].device)
    return bsgap.gram_accumulate_(state, As[0], torch.zeros(n, dtype=torch.float64, device=As[0].device))


def _thresholds(As: list[Tensor]) -> Outputs:
    # Made on the device: a copy from the host waits.
    thresholds = torch.linspace(0.05, 0.3, 3, dtype=torch.float64, device=As[0].device)
    return bsgap.singular_value_counts(As[0], thresholds)


CALLS: dict[str, Callable[[list[Tensor]], Outputs]] = {
    "near_rank": lambda As: bsgap.near_rank(As[0], rtol=0.1),
    "near_rank centred": lambda As: bsgap.near_rank(As[0], rtol=0.1, center=True),
    "near_rank atol": lambda As: bsgap.near_rank(As[0], atol=3.0),
    "near_rank rtol on the CPU": lambda As: bsgap.near_rank(As[0], rtol=torch.tensor(0.1)),
    "near_rank_ratio": lambda As: bsgap.near_rank_ratio(As[0], rtol=0.1),
    "near_rank_interval": lambda As: tuple(bsgap.near_rank_interval(As[0], rtol=0.1)),
    "near_rank_interval probed": lambda As: tuple(bsgap.near_rank_interval(As[0], rtol=0.1, mode="probed")),
    "near_rank_grouped": lambda As: bsgap.near_rank_grouped(As, rtol=0.1),
    "singular_value_counts": _thresholds,
    "spectral_summary": lambda As: bsgap.spectral_summary(As[0]),
    "gram": lambda As: bsgap.gram(As[0]),
    "covariance": lambda As: bsgap.covariance(As[0]),
    "gram_accumulate_": _accumulate,
}
SIDES = [24, 100, 150, 600]


def inputs(k: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Matrices whose counts depend on the seed: entries of decaying columns."""
    decay = torch.logspace(0, -2 - 0.3 * seed, k, dtype=torch.float64).to(DEVICE)
    return [
        (random(m, k, seed=seed + i).double() * decay).to(dtype) for i, m in enumerate((2 * k, k // 2, 3 * k))
    ]


def as_tuple(found: Outputs) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def same(a: Outputs, b: Outputs) -> bool:
    """Bitwise, NaN equal to NaN."""
    return all(
        torch.equal(x.nan_to_num(-7.0), y.nan_to_num(-7.0))
        for x, y in zip(as_tuple(a), as_tuple(b), strict=True)
    )


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@cuda_only
@pytest.mark.parametrize("k", SIDES)
@pytest.mark.parametrize("name", CALLS)
def test_a_captured_call_follows_its_input(name: str, k: int) -> None:
    call, static = CALLS[name], inputs(k, 0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(static)
    for seed in (1, 2, 1):
        fresh = inputs(k, seed)
        for target, source in zip(static, fresh, strict=True):
            target.copy_(source)
        graph.replay()
        assert same(captured, call(fresh)), seed


@cuda_only
@pytest.mark.parametrize("k", SIDES)
@pytest.mark.parametrize("name", CALLS)
def test_no_call_synchronises(name: str, k: int) -> None:
    call, As = CALLS[name], inputs(k)
    expected = call(As)  # compiles and loads, which may wait
    with no_synchronisation():
        found = call(As)
    assert same(found, expected)


@cuda_only
def test_the_guard_against_synchronisation_bites() -> None:
    with pytest.raises(RuntimeError), no_synchronisation():
        random(3, 3).sum().item()


@cuda_only
@pytest.mark.parametrize("name", CALLS)
def test_a_side_stream_is_used(name: str) -> None:
    call = CALLS[name]
    expected = call(inputs(100, 1))
    side = torch.cuda.Stream()
    ballast = torch.randn(4096, 4096, device=DEVICE)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # The input is ready only when the side stream has worked through the ballast: a kernel that was
        # launched on the default stream would read zeros.
        As = [torch.zeros_like(A) for A in inputs(100, 1)]
        torch.cuda.current_stream().synchronize()
        for _ in range(20):
            ballast = ballast @ ballast
            ballast /= ballast.norm()
        for A, source in zip(As, inputs(100, 1), strict=True):
            A.copy_(source)
        found = call(As)
    torch.cuda.current_stream().wait_stream(side)
    assert same(found, expected)


@pytest.mark.parametrize("k", SIDES)
@pytest.mark.parametrize("name", CALLS)
def test_repeats_are_bitwise_equal(name: str, k: int) -> None:
    As = inputs(k)
    first = CALLS[name](As)
    for _ in range(3):
        assert same(CALLS[name](As), first)


@pytest.mark.parametrize("name", [*CALLS])
def test_compiled_once_for_twenty_steps(name: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter: Any = CompileCounterWithBackend("aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(CALLS[name], backend=counter, fullgraph=True)
        for step in range(20):
            As = inputs(32, step % 3)
            assert same(compiled(As), CALLS[name](As))
    assert counter.frame_count == 1


def test_inductor_compiles_a_step_with_the_metric_inside() -> None:
    torch._dynamo.reset()

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(x @ x.mT)
        return hidden.sum(), bsgap.near_rank(hidden, rtol=0.1)

    compiled = torch.compile(
        step, fullgraph=True, backend="inductor" if DEVICE.type == "cuda" else "aot_eager"
    )
    x = random(48, 20)
    assert int(compiled(x)[1]) == int(step(x)[1])


@pytest.mark.parametrize(
    "name", ["near_rank", "near_rank_interval", "gram", "covariance", "spectral_summary"]
)
def test_opcheck(name: str) -> None:
    A = random(2, 40, 20, dtype=torch.float64)  # with fewer columns alpha_req is NaN, which opcheck compares
    arguments: dict[str, Any] = {"rtol": 0.1} if name.startswith("near_rank") else {}
    torch.library.opcheck(getattr(torch.ops.bsgap, name).default, (A,), arguments)


@cuda_only
def test_mixed_devices_are_refused() -> None:
    A = random(8, 4)
    with pytest.raises(ValueError, match=r"As\[1\] must be on the device of As\[0\] \(cuda:0\), got cpu"):
        bsgap.near_rank_grouped([A, A.cpu()], rtol=0.1)
    with pytest.raises(ValueError, match="thresholds must be on the device of A"):
        bsgap.singular_value_counts(A, torch.ones(2))
    with pytest.raises(ValueError, match="state must be on the device of A"):
        bsgap.gram_accumulate_(torch.zeros(5, 5, dtype=torch.float64), A, torch.zeros(4, dtype=torch.float64))


@cuda_only
def test_singular_values_under_capture_are_a_clear_error() -> None:
    A = random(20, 8, dtype=torch.float64)
    assert int(bsgap.near_rank(A)) == int(reference.near_rank(A.cpu()))
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="rtol"), torch.cuda.graph(graph):
        bsgap.near_rank(A)
    torch.cuda.synchronize()
    assert int(bsgap.near_rank(A, rtol=0.1)) == int(reference.near_rank(A.cpu(), rtol=0.1))


def watch(model: torch.nn.Module, **options: Any) -> bsgap.RankTracker:
    return bsgap.RankTracker(model, rtol=RTOL, verbose=False, **options)


def steps(
    run: Callable[[Tensor], Tensor],
    tracker: bsgap.RankTracker,
    saved: Saved,
    twin: torch.nn.Module | None,
    count: int,
) -> None:
    """Training steps whose records equal singular values, of a twin's activations if there is one."""
    for step in range(count):
        x = images(step).to(DEVICE)
        if twin is not None:
            twin(x)
        run(x).square().mean().backward()
        assert_equal_to_svd(tracker.collect(), saved.take())


@pytest.mark.parametrize("options", [{}, {"metrics": "all"}, {"certify": True, "center": False}])
def test_the_tracker_on_a_gpu(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Net().to(DEVICE)
    saved = Saved(model, ["act", "head.1"])
    with watch(model, **options) as tracker:
        steps(model, tracker, saved, None, 4)


def test_a_mask_and_autocast_on_a_gpu() -> None:
    torch.manual_seed(0)
    up = torch.nn.Linear(6, 20)

    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act = up, torch.nn.GELU()

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.act(self.up(x))

    model = Masked().to(DEVICE)
    mask = torch.arange(7, device=DEVICE)[None, :] < torch.tensor([7, 2, 5, 1], device=DEVICE)[:, None]
    x = random(4, 7, 6)
    x[~mask] = torch.nan
    with watch(model, mask="attention_mask") as tracker:
        for enabled in (False, True):
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=enabled):
                hidden = model(x, attention_mask=mask).detach()
                record = tracker.collect()["act#0"]
            assert record.shape == (15, 20)
            assert record.near_rank == svd_count(hidden[mask].cpu())


@cuda_only
def test_a_step_of_the_tracker_does_not_synchronise() -> None:
    rows: list[Any] = []

    class Kept:
        def write(self, more: Any) -> None:
            rows.extend(more)

        def flush(self) -> None:
            pass

        def close(self) -> None:
            pass

    torch.manual_seed(0)
    model = Net().to(DEVICE)
    batches = [images(step).to(DEVICE) for step in range(8)]
    with watch(model, sinks=[Kept()], max_overhead=0.9) as tracker:
        for x in batches[:3]:  # compiles and loads, and meets the sites
            model(x).square().mean().backward()
            tracker.step()
        torch.cuda.synchronize()
        with no_synchronisation():
            for x in batches[3:]:
                model(x).square().mean().backward()
                tracker.step()
    assert {row.step for row in rows} >= {0, 3}


@cuda_only
def test_replays_of_a_captured_step_add_up() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(30, 24), torch.nn.ReLU(), torch.nn.Linear(24, 3)).to(DEVICE)
    batches = [random(100, 30, seed=seed) * torch.logspace(0, -1.5, 30, device=DEVICE) for seed in range(4)]
    static = batches[0].clone()

    def expected(*xs: Tensor) -> int:
        return svd_count(
            torch.cat([torch.relu(x @ model[0].weight.T + model[0].bias) for x in xs]).detach().cpu()
        )

    with watch(model) as tracker:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # the sites have to be there before the capture
                model(static).square().mean().backward()
                tracker.step()
        torch.cuda.current_stream().wait_stream(side)
        for parameter in model.parameters():
            parameter.grad = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(static).square().mean().backward()
        for x in batches:
            static.copy_(x)
            graph.replay()
            record = tracker.collect()["1#0"]
            assert (record.shape, record.near_rank) == ((100, 24), expected(x))
        for x in batches[:3]:
            static.copy_(x)
            graph.replay()
        record = tracker.collect()["1#0"]
        assert (record.shape, record.near_rank) == ((300, 24), expected(*batches[:3]))


@cuda_only
def test_a_thread_waits_for_records_while_another_captures() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(30, 24), torch.nn.ReLU()).to(DEVICE)
    ballast = torch.randn(4096, 4096, device=DEVICE)
    found: list[int] = []
    with watch(model) as tracker:
        for _ in range(2):  # compiled and loaded
            model(random(100, 30, seed=1))
            tracker.collect()
        for _ in range(20):
            ballast @ ballast  # so that there is something to wait for
        model(random(100, 30, seed=2))
        reading = tracker._end_step()
        assert reading is not None
        thread = threading.Thread(target=lambda: found.append(reading.records()["1#0"].near_rank))
        graph, static = torch.cuda.CUDAGraph(), torch.ones(8, device=DEVICE)
        with torch.cuda.graph(graph, capture_error_mode="global"):
            thread.start()
            thread.join()
            static += 1
        graph.replay()
        assert len(found) == 1
        assert float(static[0]) == 2


@cuda_only
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_on_a_gpu(mode: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(30, 24), torch.nn.ReLU(), torch.nn.Linear(24, 3)).to(DEVICE)
    twin = copy.deepcopy(model)
    saved = Saved(twin, ["1"])
    with watch(model) as tracker:
        model(random(100, 30, seed=9)).sum().backward()  # the sites have to be there before a capture
        tracker.step()
        run = torch.compile(model, fullgraph=True, mode=mode)
        for step in range(6):
            torch.compiler.cudagraph_mark_step_begin()
            x = random(100, 30, seed=step) * torch.logspace(0, -1.5, 30, device=DEVICE)
            twin(x)
            run(x).square().mean().backward()
            assert_equal_to_svd(tracker.collect(), saved.take())


@cuda_only
def test_a_model_that_moves_after_the_tracker_was_attached() -> None:
    torch.manual_seed(0)
    model = Net()
    saved = Saved(model, ["act", "head.1"])
    with watch(model, metrics="all") as tracker:
        for device in ("cpu", DEVICE, "cpu", DEVICE):
            model.to(device)
            model(images(1).to(device)).sum().backward()
            model.zero_grad()
            activations = saved.take()
            assert all(x.device.type == torch.device(device).type for x in activations.values())
            assert_equal_to_svd(tracker.collect(), activations)


@cuda_only
def test_the_tracker_collects_on_another_stream_than_the_forward_pass() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(200, 200), torch.nn.ReLU()).to(DEVICE)
    xs = [random(400, 200, seed=seed) for seed in range(4)]
    ballast = torch.randn(4096, 4096, device=DEVICE)
    side = torch.cuda.Stream()
    with bsgap.RankTracker(model, rtol=1e-1) as tracker:
        model(xs[0])
        tracker.collect()  # compiles and loads
        for x in xs:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(20):
                    ballast = ballast @ ballast
                    ballast /= ballast.norm()
                hidden = model(x)
            (record,) = tracker.collect().values()
            wanted = int(reference.near_rank(hidden.detach().cpu(), rtol=1e-1))
            assert record.near_rank == wanted
