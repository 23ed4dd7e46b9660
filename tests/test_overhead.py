"""What tracking costs a step: ways in turns, hooks that leave no trace, counts that are compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_data import small_data
from torch import nn

from bsgap_kernels import build_info
from bsgap_kernels.bench import measure, overhead
from bsgap_kernels.bench.overhead import measure_overhead
from bsgap_kernels.bench.overhead_command import main
from bsgap_kernels.bench.overhead_hooks import HookClock, HookSet
from bsgap_kernels.bench.overhead_report import bar, layers_table, steps_table, text_report
from bsgap_kernels.bench.overhead_result import OverheadResult, SiteCount, WayTimes
from bsgap_kernels.bench.overhead_subjects import Subject
from bsgap_kernels.bench.overhead_ways import DELVE, NAIVE, NONE, OURS, STEP_END, Ours

SITES = ["1#0", "3#0"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SETTLE_S", 0.0)


def small() -> tuple[nn.Module, Callable[[], None]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Tanh())
    images = torch.randn(8, 2, 7, 7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step() -> None:
        loss = model(images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return model, step


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# -- hooks


def test_hooks_go_on_and_off_and_leave_what_was_there() -> None:
    model, _ = small()
    heard: list[str] = []
    model[1].register_forward_hook(lambda *_: heard.append("user"))

    def attach() -> None:
        model[1].register_forward_hook(lambda *_: heard.append("ours"))
        model[2].register_forward_pre_hook(lambda m, args, kwargs: heard.append("before"), with_kwargs=True)
        model[0].note = 1

    hooks = HookSet(model, attach)
    x = torch.randn(1, 2, 7, 7)
    for expected in (["user", "ours", "before"], ["user"], ["user", "ours", "before"]):
        heard.clear()
        model(x)
        assert heard == expected
        (hooks.off if "ours" in expected else hooks.on)()
    hooks.forget()
    assert hooks_of(model) == 1
    assert not model[2]._forward_pre_hooks_with_kwargs
    assert not hasattr(model[0], "note")


def test_the_clock_times_each_call_of_a_module() -> None:
    model = nn.Sequential(nn.Identity())
    shared = model[0]
    hooks = HookSet(model, lambda: shared.register_forward_hook(lambda *_: None))
    clock = HookClock(CPU)
    with hooks.timed(clock):
        shared(torch.ones(1))
        shared(torch.ones(1))
        begin = clock.now()
        clock.add("end", begin)
    found = clock.read()
    assert list(found) == ["0#0", "0#1", "end#0"]
    assert all(spent >= 0 for spent in found.values())
    assert clock.read() == {}
    assert hooks_of(model) == 0


# -- measuring


def test_ways_take_turns_and_the_model_is_left_alone() -> None:
    model, step = small()
    seen: list[int] = []

    def watched() -> None:
        seen.append(hooks_of(model))
        step()

    result = measure_overhead(model, watched, rounds=4, ways=[NONE, NAIVE, OURS])
    assert [way.name for way in result.ways] == [NONE, NAIVE, OURS]
    assert all(way.rounds == 4 and way.error is None for way in result.ways)
    assert hooks_of(model) == 0
    # Without tracking no hook is on the model; naive hooks are one a site; ours has one more at the root.
    timed = seen[7 : 7 + 12]  # after a step that finds the sites, and two warm-up calls of each
    assert set(timed) == {0, 2, 3}
    assert [sorted(timed[i : i + 3]) for i in range(0, 12, 3)] == [[0, 2, 3]] * 4
    for way in (NAIVE, OURS):
        assert {*SITES, f"{STEP_END}#0"} <= set(result.way(way).sites_ms)
    assert result.way(NONE).cost_ms is None
    assert [count.site for count in result.counts] == SITES
    assert [count.shape for count in result.counts] == [(8 * 25, 4), (8 * 9, 6)]
    assert result.wrong == []
    assert result.equal == 2


def test_cost_is_never_in_our_favour() -> None:
    samples = measure.Samples([9.0, 10.0, 11.0])
    hidden = overhead._times(OURS, samples, 8.0, {"a#0": 0.5, "b#0": 0.25}, 1)
    assert (hidden.added_ms, hidden.inside_ms, hidden.cost_ms, hidden.percent) == (2.0, 0.75, 2.0, 25.0)
    noisy = overhead._times(OURS, samples, 10.5, {"a#0": 0.75}, 1)
    assert (noisy.added_ms, noisy.cost_ms) == (-0.5, 0.75)
    assert overhead._times(NAIVE, samples, 8.0, {"a#0": 0.5, "b#0": 0.25}, 1).cost_ms == 0.75


def test_a_builder_gives_every_way_a_model_of_its_own_with_hooks_before_the_first_step() -> None:
    built: list[nn.Module] = []
    first: dict[int, int] = {}

    def build() -> tuple[nn.Module, Callable[[], None]]:
        model, step = small()
        built.append(model)

        def watched() -> None:
            first.setdefault(id(model), hooks_of(model))
            step()

        return model, watched

    result = measure_overhead(build, rounds=3, ways=[NONE, NAIVE, OURS])
    # One finds the sites, one each for the ways, one for the check; ours looks for functional sites at first.
    assert [first[id(model)] for model in built] == [5, 0, 2, 5, 7]
    assert result.way(OURS).sites_ms == {}
    assert result.way(OURS).cost_ms == result.way(OURS).added_ms
    assert result.equal == 2


def test_hooks_are_called_in_compiled_models_that_share_their_code() -> None:
    def build() -> tuple[nn.Module, Callable[[], None]]:
        model, _ = small()
        forward = torch.compile(model, backend="eager")
        return model, lambda: forward(torch.ones(8, 2, 7, 7)).sum().backward()

    result = measure_overhead(build, rounds=3, budget_s=0.1, ways=[NAIVE, OURS])
    assert [way.error for way in result.ways] == [None] * 3
    assert [count.site for count in result.counts] == SITES


def test_hooks_that_are_not_called_are_an_error_of_the_way() -> None:
    model, _ = small()
    _, step = small()
    result = measure_overhead(model, step, rounds=3, budget_s=0, ways=[NAIVE, OURS])
    assert result.way(NAIVE).error == "no hook was called"
    assert "no forward pass was seen" in (result.way(OURS).error or "")
    assert result.counts == ()


def test_a_way_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, model: nn.Module) -> None:
        model[0].note = 1
        raise ImportError("no delve\nfor this torch")

    monkeypatch.setattr("bsgap_kernels.bench.overhead_ways.Delve.attach", broken)
    result = measure_overhead(*small(), rounds=3, ways=[DELVE], check=False)
    assert result.way(DELVE).error == "ImportError: no delve for this torch"
    assert "FAILED (ImportError: no delve for this torch)" in steps_table(result)
    assert result.way(NONE).median_ms


def test_our_own_failure_is_an_error() -> None:
    with pytest.raises(ValueError, match="matches no module"):
        measure_overhead(*small(), layers=["nothing"], ways=[OURS])


def test_delve_is_measured_where_it_runs() -> None:
    pytest.importorskip("delve")
    model, step = small()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    result = measure_overhead(model, step, rounds=3, ways=[DELVE], check=False)
    assert result.way(DELVE).error is None
    assert {"0#0", "2#0"} <= set(result.way(DELVE).sites_ms)
    assert hooks_of(model) == 0
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ways": ["ourz"]}, ValueError, "ways: got 'ourz', expected some of no tracking"),
        ({"rounds": 0}, ValueError, "rounds, budget_s: got 0"),
        ({"step": None}, TypeError, "step: expected a callable with a module"),
    ],
)
def test_senseless_settings(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model, step = small()
    with pytest.raises(error, match=message):
        measure_overhead(model, **{"step": step, **options})


def test_a_functional_nonlinearity_is_read_at_the_same_place() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.relu(self.first(x)))

    model, x = Functional(), torch.randn(9, 5)
    result = measure_overhead(model, lambda: model(x).sum().backward(), rounds=3, ways=[NAIVE, OURS])
    assert [(c.site, c.shape, c.verdict) for c in result.counts] == [("second:input#0", (9, 7), "equal")]
    assert all(way.error is None for way in result.ways)
    assert hooks_of(model) == 0


# -- counts


def test_counts_are_those_of_matrix_rank_on_the_same_unfolding() -> None:
    model, step = small()
    outputs: list[torch.Tensor] = []
    model[1].register_forward_hook(lambda module, args, output: outputs.append(output.detach()))
    result = measure_overhead(model, step, rounds=1, budget_s=0, ways=[OURS], unfold="flatten", rtol=0.4)
    matrix = outputs[-1].flatten(1)
    assert result.counts[0].shape == tuple(matrix.shape)
    assert result.counts[0].naive == int(torch.linalg.matrix_rank(matrix, rtol=0.4)) < 8


def test_a_wrong_count_is_told_from_one_near_the_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    # Singular values 1, 0.5, 0.1003: the last one within 1 % of the threshold 0.1.
    matrix = torch.diag(torch.tensor([1.0, 0.5, 0.1003])).requires_grad_()
    model = nn.Sequential(nn.ReLU())
    for ours, verdict in ((3, "equal"), (2, "near tau"), (1, "WRONG"), (4, "WRONG")):
        monkeypatch.setattr(Ours, "counts", lambda self, n=ours: {"0#0": n})
        found = measure_overhead(
            model, lambda: model(matrix).sum().backward(), rtol=0.1, ways=[OURS], rounds=1, budget_s=0
        )
        assert [(c.ours, c.naive, c.expected, c.verdict) for c in found.counts] == [(ours, 3, 3, verdict)]
        assert (found.equal, found.wrong) == (int(ours == 3), ["0#0"] if verdict == "WRONG" else [])


# -- report


def result_by_hand() -> OverheadResult:
    ways = (
        WayTimes(NONE, 5, 100.0, 99.0, 101.0),
        WayTimes(NAIVE, 3, 160.0, 150.0, 170.0, 60.0, 58.0, 60.0, 60.0, sites_ms={"a#0": 40.0, "b#0": 18.0}),
        WayTimes(
            OURS, 5, 104.0, 103.0, 105.0, 4.0, 5.0, 5.0, 5.0, sites_ms={"a#0": 4.0, f"{STEP_END}#0": 1.0}
        ),
    )
    counts = (
        SiteCount("a#0", (64, 8), 7, 7, 7, "equal"),
        SiteCount("b#0", (64, 4), 3, 4, 3, "near tau"),
    )
    return OverheadResult(ways, counts, 0.0)


def test_targets() -> None:
    rows = result_by_hand().targets("m")
    assert [(row["value"], row["limit"], row["met"]) for row in rows] == [
        (5.0, 5.0, True),
        (12.0, 10.0, True),
    ]
    assert [row["met"] for row in OverheadResult((), ()).targets("m")] == [None, None]


def test_tables() -> None:
    result = result_by_hand()
    assert [line.split()[:3] for line in layers_table(result).splitlines()[1:]] == [
        ["a#0", "64", "x"],
        ["(end", "of", "step)"],
    ]
    assert "10.0" in layers_table(result).splitlines()[1]
    text = text_report("m", result)
    assert "1 of 2 sites equal those of matrix_rank; b#0 3, naive 4, float64 3: near tau." in text
    assert "   met  m: naive hooks over ours: 12 (at least 10 times)" in text
    assert (bar(1.0, 1.0), bar(0.0, 1.0), bar(1.0, 0.0)) == ("█" * 30, "", "")
    assert len(bar(0.5, 1.0)) == 15


# -- command


def test_command_writes_json_and_chart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bokeh")
    json_file, chart = tmp_path / f"out-{build_info()['instruction_set']}.json", tmp_path / "out.html"
    arguments = ["--model", "lenet5", "--data", "random", "--batch", "6", "--rounds", "3", "--budget", "0.2"]
    assert main([*arguments, "--json", str(tmp_path / "out-{isa}.json"), "--chart", str(chart)]) == 0
    record = json.loads(json_file.read_text(encoding="utf-8"))
    assert record["complete"]
    assert record["versions"]["torch"] == torch.__version__
    assert len(record["targets"]) == 2
    (model,) = record["models"]
    assert model["name"] == "lenet5, batch 6, random, cpu"
    assert model["counts"]["equal"] == model["counts"]["sites"] == 4
    by_name = {way["name"]: way for way in model["ways"]}
    assert {NONE, NAIVE, OURS} <= set(by_name)
    assert "relu4#0" in by_name[OURS]["sites_ms"]
    printed = capsys.readouterr().out
    assert "Counts of one step: 4 of 4 sites equal those of matrix_rank." in printed
    page = chart.read_text(encoding="utf-8")
    assert "time in the hooks of every layer" in page
    assert '<script src="' not in page
    assert "<link" not in page


def test_command_fails_on_wrong_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Ours, "counts", lambda self: {"relu1#0": 1})
    arguments = ["--model", "lenet5", "--data", "random", "--batch", "4", "--rounds", "1", "--budget", "0"]
    assert main(arguments) == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--model vgg", "model: got 'vgg', expected one of lenet5, cnn, mlp, lstm, vgg16"),
        ("--batch 0", "batch: got 0, expected an integer of at least 1"),
        ("--rtol 2", "rtol: got 2.0, expected a number between 0 and 1"),
        ("--max-overhead 0", "max-overhead: got 0.0, expected a number between 0 and 1"),
        ("--unfold token", "unfold: got 'token', expected one of channel, flatten, pool"),
        ("--data cats", "data: got 'cats', expected one of digits, random"),
        ("--json /no/such/folder/x.json", "json: got /no/such/folder/x.json, expected a file in an existing"),
        ("--bogus", "unrecognized arguments: --bogus"),
    ],
)
def test_mistakes(arguments: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"bsgap overhead: {sentence}")
    assert len(error.splitlines()) == 1


def test_lenet5_is_fed_digits_and_no_more_than_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bsgap_kernels.bench.overhead_subjects.load_data", lambda name, root: small_data())
    arguments = ["--model", "lenet5", "--rounds", "1", "--budget", "0"]
    assert main([*arguments, "--batch", "49"]) == 2
    assert "batch: got 49, expected at most the 48 images of digits" in capsys.readouterr().err
    assert main([*arguments, "--batch", "48"]) == 0
    assert "lenet5, batch 48, digits, cpu" in capsys.readouterr().out


@pytest.mark.parametrize(("model", "shape"), [("cnn", (8, 3, 32, 32)), ("lenet5", (8, 1, 28, 28))])
def test_every_model_of_the_lab_has_images(model: str, shape: tuple[int, ...]) -> None:
    images, labels, classes = Subject(model, batch=2, data="random").images()
    assert (images.shape, len(labels), classes) == (shape, 8, 10)


def test_models_but_lenet5_are_fed_random_images() -> None:
    assert [Subject(name, 2).feed for name in ("lenet5", "resnet56", "vgg16")] == [
        "digits",
        "random",
        "random",
    ]
