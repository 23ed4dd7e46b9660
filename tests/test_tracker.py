"""RankTracker: which sites, which numbers, and that the model does not notice."""

import math
import os
import threading
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bsgap_kernels.tracking import RankTracker, reader
from bsgap_kernels.tracking.options import checked_question
from bsgap_kernels.tracking.reading import Reading, SiteHead
from bsgap_kernels.tracking.sites import NONLINEARITIES, select_modules, unfold_activation
from bsgap_kernels.tracking.sums import Sums

RTOL = 1e-2


class Reused(nn.Module):
    """One ReLU called twice, with a convolution before and a linear layer between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.fc = nn.Linear(3 * 6 * 6, 24)
        self.act = nn.ReLU()
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x))
        x = self.act(self.fc(x.flatten(1)))
        return self.head(x)


def count(activation: Tensor, rtol: float = RTOL, atol: float = 0.0, center: bool = False) -> int:
    """The near-rank by float64 singular values; the test is void if one lies at the threshold."""
    matrix = activation.double()
    if center:
        matrix = matrix - matrix.mean(0)
    sigma = torch.linalg.svdvals(matrix)
    tau = max(atol, rtol * float(sigma[0]))
    assert ((sigma / tau - 1).abs() > 1e-5).all(), (
        "a singular value lies at the threshold; choose another seed"
    )
    return int((sigma > tau).sum())


def test_sites_are_named_by_module_and_call_in_forward_order() -> None:
    model = Reused()
    with RankTracker(model, unfold="flatten") as tracker:
        assert tracker.sites() == []
        for _ in range(2):
            model(torch.randn(10, 1, 8, 8))
            records = tracker.collect()
    assert tracker.sites() == ["act#0", "act#1"]
    assert [records[site].shape for site in tracker.sites()] == [(10, 108), (10, 24)]


def test_a_name_given_twice_to_one_module_is_one_site() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    model.alias = model[1]
    assert list(select_modules(model)) == ["1"]
    assert list(select_modules(model, ["alias"])) == ["alias"]


def test_a_bare_nonlinearity_is_named_by_its_class() -> None:
    model = nn.ReLU()
    with RankTracker(model) as tracker:
        model(torch.randn(5, 4))
        assert list(tracker.collect()) == ["ReLU#0"]


@pytest.mark.parametrize("kind", [nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.Sigmoid, nn.LeakyReLU, nn.ELU])
def test_nonlinearities_are_read_by_default(kind: type[nn.Module]) -> None:
    assert kind in NONLINEARITIES
    assert list(select_modules(nn.Sequential(nn.Linear(3, 3), kind(), nn.Softmax(-1)))) == ["1"]


def test_records_equal_float64_singular_value_counts_step_by_step() -> None:
    torch.manual_seed(3)
    model = Reused()
    saved: list[Tensor] = []
    model.act.register_forward_hook(lambda module, args, output: saved.append(output.detach().clone()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with RankTracker(model, unfold="flatten", rtol=RTOL, certify=True, metrics="all") as tracker:
        for _ in range(4):
            saved.clear()
            loss = model(torch.randn(16, 1, 8, 8)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            records = tracker.collect()
            for site, activation in zip(("act#0", "act#1"), saved, strict=True):
                record, expected = records[site], count(activation.flatten(1))
                assert record.near_rank == expected
                assert record.lower <= expected <= record.upper
                assert record.ratio == expected / min(record.shape)
                sigma_max = float(torch.linalg.svdvals(activation.flatten(1).double())[0])
                assert record.summary["sigma_max"] == pytest.approx(sigma_max, rel=1e-5)
                assert record.seconds > 0


@pytest.mark.parametrize("options", [{"rtol": 0.1}, {"rtol": 0.0, "atol": 0.5}, {"center": True}])
def test_tolerances_and_centring_reach_the_op(options: dict[str, float]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 12), nn.ReLU())
    x = torch.randn(30, 20)
    with RankTracker(model, **options) as tracker:
        output = model(x).detach()
        record = tracker.collect()["1#0"]
    expected = {"rtol": RTOL, **options}
    assert record.near_rank == count(output, **expected)


def test_an_in_place_operation_that_follows_does_not_change_the_count() -> None:
    torch.manual_seed(1)
    linear = nn.Linear(16, 16)
    with torch.no_grad():
        linear.bias.fill_(-100.0)  # the in-place ReLU leaves zeros only
    model = nn.Sequential(linear, nn.ReLU(inplace=True))
    x = torch.randn(40, 16)
    expected = count(linear(x).detach(), rtol=1e-3)
    with RankTracker(model, layers=["0", "1"], rtol=1e-3) as tracker:
        model(x)
        records = tracker.collect()
    assert expected > 1
    assert (records["0#0"].near_rank, records["1#0"].near_rank) == (expected, 0)


def test_gradients_are_bit_identical_and_no_hook_stays() -> None:
    def gradients(tracked: bool) -> list[Tensor]:
        torch.manual_seed(5)
        model = Reused()
        x = torch.randn(8, 1, 8, 8)
        tracker = RankTracker(model) if tracked else None
        model(x).square().sum().backward()
        if tracker is not None:
            tracker.close()
            assert tracker.collect()["act#1"].near_rank >= 0
            for module in model.modules():
                assert not module._forward_hooks
                assert not module._forward_pre_hooks
        return [parameter.grad for parameter in model.parameters()]

    for plain, tracked in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, tracked)


def test_hooks_go_when_the_block_raises() -> None:
    model = Reused()
    with pytest.raises(KeyError), RankTracker(model):
        raise KeyError
    assert not model.act._forward_hooks


def test_a_step_that_ends_paused_takes_its_reads_with_it() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU())
    first, second = (torch.randn(rows, 6, generator=torch.Generator().manual_seed(rows)) for rows in (30, 40))
    with RankTracker(model, rtol=RTOL, verbose=False) as tracker:
        for _ in range(2):
            model(first)
            with tracker.paused():
                tracker.step()
            A = model(second)
            (record,) = tracker.collect().values()
            assert record.shape == (40, 5)
            assert record.near_rank == int(torch.linalg.matrix_rank(A.detach().double(), rtol=RTOL))


def test_views_are_kept_apart_and_paused_passes_leave_nothing() -> None:
    model = Reused()
    with RankTracker(model, unfold="flatten") as tracker:
        model(torch.randn(6, 1, 8, 8))
        with tracker.view("probe"):
            model(torch.randn(9, 1, 8, 8))
        with tracker.paused():
            model(torch.randn(5, 1, 8, 8))
        assert tracker.collect("probe")["act#0"].shape == (9, 108)
        assert tracker.collect()["act#0"].shape == (6, 108)
        assert tracker.collect() == {}
        with tracker.paused(when=False):
            model(torch.randn(7, 1, 8, 8))
        assert tracker.collect()["act#1"].shape == (7, 24)


def test_a_submodule_called_directly_keeps_its_site() -> None:
    model = Reused()
    with RankTracker(model) as tracker:
        for _ in range(3):
            model.act(torch.randn(6, 5))
            assert list(tracker.collect()) == ["act#0"]


def test_non_finite_activations_are_reported_as_minus_one() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    with RankTracker(model, metrics="all") as tracker:
        model(torch.full((6, 4), math.nan))
        record = tracker.collect()["1#0"]
    assert record.near_rank == -1
    assert math.isnan(record.ratio)
    assert math.isnan(record.summary["sigma_max"])


def operators(call: Callable[[], object]) -> Counter[str]:
    """How often each op was called."""
    with torch.autograd.profiler.profile() as profile:
        call()
    return Counter(event.name for event in profile.function_events)


def test_a_plain_step_is_one_op_a_site_and_one_for_all() -> None:
    # A GPU launches more; that has kernels of its own.
    if os.environ.get("BSGAP_VIRTUAL_GPU") == "1":
        pytest.skip("on the virtual GPU ops are those of CUDA")
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5), nn.Tanh())
    x = torch.randn(7, 2, 5, 5)
    untracked = operators(lambda: model(x))
    for metrics, centred in ((["near_rank", "stable_rank"], 0), (None, 2)):
        with RankTracker(model, metrics=metrics, verbose=False) as tracker:
            for _ in range(2):
                model(x)
                tracker.step()
            added = operators(lambda: (model(x), tracker.step())) - untracked
        for name in ("aten::empty", "aten::slice", "aten::as_strided"):  # of results; 2.11 names no empty
            added.pop(name, 0)
        expected = {"bsgap::_accumulate_gram_": 2, "bsgap::_gram_counts": 1}
        assert added == expected | ({"bsgap::_centred_gram": centred} if centred else {})


@pytest.mark.parametrize("shape", [(0, 5, 3, 3), (2, 5, 0, 3), (2, 5, 3, 0), (2, 0, 3, 3)])
def test_an_activation_without_values_adds_nothing(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.ReLU())
    with RankTracker(model, unfold="channel", features_dim=1, verbose=False) as tracker:
        if shape[1] > 0:
            model(torch.randn(2, 5, 3, 4))
            tracker.step()
        model(torch.randn(shape))
        (record,) = tracker.collect().values()
    assert record.near_rank == 0


class Event:
    """Stands for a CUDA event: waits without the interpreter's lock."""

    def __init__(self) -> None:
        self.happened = threading.Event()

    def synchronize(self) -> None:
        self.happened.wait(60)


def test_two_threads_may_ask_for_the_records_of_a_step() -> None:
    sums = Sums.zeros(3, torch.device("cpu"))
    sums.add(torch.randn(8, 3))
    question = checked_question(1e-2, None, False, False, ("near_rank",))
    reading, event = Reading(0, "batch", [SiteHead("s", 3, "")], [0.0], [sums], question), Event()
    reading._events.append(event)  # type: ignore[arg-type]
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(len(reading.records()))) for _ in range(8)]
    for thread in threads:
        thread.start()
    event.happened.set()
    for thread in threads:
        thread.join()
    assert found == [1] * 8


class Stream:
    """Stands for a CUDA stream where there is none: notes what it was made to wait for."""

    def __init__(self) -> None:
        self.waited: list[Stream] = []

    def wait_stream(self, other: "Stream") -> None:
        self.waited.append(other)


def test_sums_of_another_stream_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, log = Stream(), Stream()
    current = forward
    monkeypatch.setattr(reader, "current_stream", lambda device: current)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU())
    with RankTracker(model) as tracker:
        model(torch.randn(30, 5))
        current = log
        assert tracker.collect()["1#0"].near_rank > 0
        assert (forward.waited, log.waited) == ([], [forward])
        current = forward
        model(torch.randn(30, 5))
        assert (forward.waited, log.waited) == ([log], [forward])
        tracker.collect()
        assert len(forward.waited) == 1


def test_unfolds() -> None:
    x = torch.randn(5, 3, 4, 2)
    assert unfold_activation(x, "flatten").shape == (5, 24)
    assert torch.equal(unfold_activation(x, "channel"), x.permute(0, 2, 3, 1).reshape(-1, 3))
    torch.testing.assert_close(unfold_activation(x, "pool"), x.mean((2, 3)))
    assert unfold_activation(x.bfloat16(), "pool").dtype == torch.float32
    assert unfold_activation(torch.randn(5)).shape == (5, 1)
    flat, last = unfold_activation(x), x.contiguous(memory_format=torch.channels_last)
    assert flat.data_ptr() == x.data_ptr()
    assert unfold_activation(last, "channel").data_ptr() == last.data_ptr()
    for unfold in ("flatten", "channel", "pool"):
        assert unfold_activation(torch.randn(5, 7), unfold).shape == (5, 7)


def test_the_first_tensor_of_a_tuple_is_read() -> None:
    model = nn.Sequential(nn.LSTM(3, 4, batch_first=True))
    with RankTracker(model, layers=["0"]) as tracker:
        model(torch.randn(5, 6, 3))
        assert tracker.collect()["0#0"].shape == (30, 4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": ["cnov"]}, ValueError, r"'cnov' matches no module; the nearest names are .*conv"),
        (
            {"layers": ["zzzz"]},
            ValueError,
            r"'zzzz' matches no module; the model has Reused, conv, fc, act, head",
        ),
        ({"layers": []}, ValueError, "got an empty list"),
        ({"layers": "act"}, TypeError, r"got the string 'act', expected a list"),
        ({"rtol": -1.0}, ValueError, r"rtol: got -1.0, expected a finite number of at least 0"),
        ({"atol": math.nan}, ValueError, r"atol: got nan, expected"),
        (
            {"unfold": "rows"},
            ValueError,
            r"unfold: got 'rows', expected one of auto, flatten, channel, pool, token",
        ),
    ],
)
def test_bad_options(options: dict[str, object], error: type[Exception], message: str) -> None:
    model = Reused()
    with pytest.raises(error, match=message):
        RankTracker(model, **options)
    assert not model._forward_pre_hooks


def test_models_that_cannot_be_tracked() -> None:
    with pytest.raises(TypeError, match="expected a torch.nn.Module"):
        RankTracker(lambda x: x)
    with pytest.raises(ValueError, match="no nonlinearity to read by default"):
        RankTracker(nn.LSTM(3, 3))
    with pytest.raises(ValueError, match="before torch.compile wraps it"):
        RankTracker(torch.compile(Reused()))


def test_an_output_that_is_no_activation_names_the_site() -> None:
    class Bad(nn.Module):
        def forward(self, x: Tensor) -> object:
            return {"x": 3} if x.ndim else x

    model = Bad()
    with RankTracker(model, layers=["Bad"]):
        with pytest.raises(TypeError, match="Bad: the module returned dict, expected a tensor"):
            model(torch.randn(3))
        with pytest.raises(ValueError, match="Bad: the module returned a scalar"):
            model(torch.tensor(1.0))


def test_collect_after_step_gives_the_records_of_that_step() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh())
    with RankTracker(model, verbose=False) as tracker:
        for rows in (30, 3):
            model(torch.randn(rows, 6))
            tracker.step()
            for _ in range(2):  # asking twice changes nothing
                assert tracker.collect()["1#0"].shape == (rows, 5)
        assert tracker.state_dict()["step"] == 2
        model(torch.randn(7, 6))
        assert tracker.collect()["1#0"].shape == (7, 5)
        assert tracker.collect() == {}
        assert tracker.state_dict()["step"] == 4


def test_a_star_stops_at_a_dot() -> None:
    model = nn.Sequential(nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU())), nn.ReLU())

    def chosen(*patterns: str) -> list[str]:
        return list(select_modules(model, list(patterns)))

    assert chosen("?") == ["0", "1"]
    assert chosen("0.*") == ["0.0", "0.1"]
    assert chosen("**.0") == ["0", "0.0", "0.1.0"]
    assert chosen("0.**") == ["0.0", "0.1", "0.1.0"]
    assert chosen("[!0]", "0.?.0") == ["0.1.0", "1"]
    with pytest.raises(ValueError, match=r"'0\.0' matches|\* stops at a dot; '\*\*1\.0' matches 0\.1\.0"):
        chosen("*1.0")
