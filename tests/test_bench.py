"""The benchmark harness: what it measures is checked, what is wrong is flagged, the statistics are right."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bsgap_kernels.bench import CASES, BenchConfig, Case, command, main, measure, run, select_cases, tables
from bsgap_kernels.bench.contenders import (
    CONTENDERS,
    MATRIX_RANK,
    NEAR_RANK,
    PHASES,
    Contender,
    Result,
    taking_part,
)
from bsgap_kernels.bench.floors import Rates, floor
from bsgap_kernels.bench.measurements import MEASUREMENTS, Setting
from bsgap_kernels.bench.run import profile_rows
from bsgap_kernels.bench.truth import Truth, judge, truth

TINY = (
    Case("40x12", "tall", ((40, 12),), profile=True),
    Case("3x9x14", "a batch", ((3, 9, 14),)),
    Case("group", "a list", ((40, 12), (30, 5)), grouped=True),
    Case("8x8", "short", ((8, 8),), calls=3),
)


FAST_CEILINGS: dict[str, Any] = {"ceiling_seconds": 1e-3, "ceiling_bytes": 1 << 20}
ONLY_CASES = ["--rounds", "1", "--rtol", "0.01", "--measure"]


def quick_run(
    tmp_path: Path, cases: tuple[Case, ...], *contenders: Contender, **settings: Any
) -> dict[str, Any]:
    lines: list[str] = []
    options = {k: settings.pop(k) for k in ("measurements",) if k in settings}
    config = BenchConfig(
        json=tmp_path / "out.json", **{"rounds": 4, "budget": 60.0, "rtol": [0.01], "measure": [], **settings}
    )
    result = run(
        config, contenders=contenders or CONTENDERS, cases=cases, out=lines.append, **FAST_CEILINGS, **options
    )
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == result
    assert not (tmp_path / "out.json.partial").exists()
    return {**result, "printed": "\n".join(lines)}


@pytest.fixture(autouse=True)
def _no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emptying the cache and pausing cost more than all tiny cases together."""
    monkeypatch.setattr(measure.CacheFlush, "__call__", lambda self: None)
    monkeypatch.setattr(measure, "SETTLE_S", 0.0)


def test_a_run_has_every_contender_checked_and_the_documented_fields(tmp_path: Path) -> None:
    result = quick_run(tmp_path, TINY)
    assert result["complete"]
    assert {"cpu", "cores", "last_level_cache_mib", "instruction_set"} <= result["machine"].keys()
    assert {"python", "torch", "numpy", "bsgap_kernels"} <= result["versions"].keys()
    assert result["threads"]["torch"] == torch.get_num_threads()
    assert [case["name"] for case in result["cases"]] == [case.name for case in TINY]
    assert result["peers"]["torch"] == torch.backends.cpu.get_cpu_capability()
    assert min(result["ceilings"]["gemm_flops"].values()) > 1e8
    for tiny, case in zip(TINY, result["cases"], strict=True):
        (timed,) = taking_part(CONTENDERS, tiny, [0.01]).values()
        assert [c["name"] for c in case["contenders"]] == [c.name for c in timed]
        assert case["best_peer"] in {c.name for c in CONTENDERS if not c.ours}
        for c in case["contenders"]:
            assert c["check"]["wrong"] == 0, (case["name"], c)
            assert c["check"]["equal"] + c["check"]["near_tau"] == case["matrices"]
            assert len(c["times_ms"]) == c["rounds"] == 4
            assert 0 < c["lower_quartile_ms"] <= c["median_ms"] <= c["upper_quartile_ms"]
        by_name = {c["name"]: c for c in case["contenders"]}
        assert by_name["torch.linalg.matrix_rank"]["vs_matrix_rank"] == 1
        assert by_name[case["best_peer"]]["vs_best_peer"] == 1
        assert f"{case['name']} ({case['about']}), rtol 0.01" in result["printed"]


def test_a_case_is_run_at_every_threshold_and_decomposed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []

    def counting(A: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(A.shape))
        return svdvals(A)

    svdvals = torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", counting)
    honest = [c for c in CONTENDERS if c.name == NEAR_RANK]
    result = quick_run(tmp_path, TINY[:2], *honest, rtol=[0.1, 1e-3])
    assert shapes == [(40, 12), (3, 9, 14)]
    assert [(c["name"], c["rtol"]) for c in result["cases"]] == [
        (case.name, rtol) for case in TINY[:2] for rtol in (0.1, 1e-3)
    ]
    coarse, fine = result["cases"][:2]
    assert coarse["counts"]["highest"] < fine["counts"]["highest"]
    assert not any(c["contenders"][0]["check"]["wrong"] for c in result["cases"])
    assert result["settings"]["rtol"] == [0.1, 1e-3]
    first, second = tables.markdown_tables(result).split("\n\nAt rtol 0.001:\n\n")
    assert "| 40×12, tall |" in first
    assert "| 40×12 |" in second
    assert "at rtol 0.1:" in first


def test_a_count_that_is_right_by_luck_is_marked(tmp_path: Path) -> None:
    peer = dataclasses.replace(off_by(0), name="peer", finest_rtol=0.05)
    printed = quick_run(tmp_path, TINY[:1], peer, rtol=[0.1, 0.01])["printed"]
    rows = [line for line in printed.splitlines() if line.startswith("  peer ")]
    assert [row.endswith("equal, not by construction") for row in rows] == [False, True]


def test_what_a_run_measures_unless_told() -> None:
    full, quick, part = BenchConfig(), BenchConfig(quick=True), BenchConfig(cases=["32x32"])
    assert [c.thresholds for c in (full, quick, part)] == [[1e-2, 1e-3], [1e-2], [1e-2, 1e-3]]
    assert BenchConfig(device="cuda").thresholds == [1e-2]
    assert full.other_measurements == list(MEASUREMENTS)
    assert quick.other_measurements == part.other_measurements == []
    assert BenchConfig(quick=True, measure=["rows"]).other_measurements == ["rows"]
    assert (quick.most_rounds, quick.seconds, full.most_rounds, full.seconds) == (5, 1.0, 15, 2.0)


def test_floors_are_recorded_and_printed_for_our_ops(tmp_path: Path) -> None:
    result = quick_run(tmp_path, TINY)
    assert "Measured on" in result["printed"]
    rates = Rates.of_ceilings(result["ceilings"])
    for case, record in zip(TINY, result["cases"], strict=True):
        (timed,) = taking_part(CONTENDERS, case, [0.01]).values()
        assert list(record["floors_ms"]) == [c.name for c in timed if c.ours]
        for c in record["contenders"]:
            if c["ours"]:
                shortest = floor(c["name"], case.shapes, case.dtype, 0.01, rates)
                assert shortest is not None
                assert record["floors_ms"][c["name"]]["total"] == pytest.approx(
                    shortest.total * 1e3, abs=1e-6
                )
                assert c["fraction_of_floor"] == pytest.approx(
                    shortest.total * 1e3 / c["median_ms"], abs=1e-4
                )
            else:
                assert "fraction_of_floor" not in c
    head = next(line for line in result["printed"].splitlines() if "median ms" in line)
    assert "floor ms  of floor" in head


def test_other_measurements_are_recorded_printed_and_may_fail(tmp_path: Path) -> None:
    def good(setting: Setting) -> list[dict[str, Any]]:
        return [{"matrix": "9x9", "rounds": 3, "median_ms": 1.5, "extra_bytes": 3 << 20, "wrong": 0}]

    def bad(setting: Setting) -> list[dict[str, Any]]:
        raise MemoryError("no room\nand more")

    result = quick_run(
        tmp_path,
        TINY[:1],
        CONTENDERS[0],
        measure=["overhead", "memory"],
        measurements={"overhead": good, "memory": bad},
    )
    assert result["complete"]
    assert result["measurements"]["overhead"]["rows"] == good(None)  # type: ignore[arg-type]
    assert result["measurements"]["memory"]["error"] == "MemoryError: no room"
    assert re.search(r"^memory.*: FAILED \(MemoryError: no room\)$", result["printed"], re.MULTILINE)
    assert "matrix  median_ms  extra_bytes  wrong\n9x9          1.50      3.0 MiB  0" in result["printed"]
    assert command.failures(result) == ["the measurement memory"]
    result["measurements"] = {"rows": {"rows": [{"wrong": 0}, {"wrong": 2}]}}
    assert command.failures(result) == ["the measurement rows"]
    assert result["targets"]
    assert "Targets that were not measured: " in result["printed"]


def test_phases_of_an_op_add_up_to_it(tmp_path: Path) -> None:
    result = quick_run(tmp_path, TINY[:1], CONTENDERS[0])
    rows = result["cases"][0]["profile"]
    assert [(r["op"], r["phase"]) for r in rows] == [(p.op, p.name) for p in PHASES]
    for op in {r["op"] for r in rows}:
        assert sum(r["share"] for r in rows if r["op"] == op) == pytest.approx(1, abs=1e-3)
    times = {"_gram_of_near_rank": 5.0, "near_rank": 4.0, "_gram64": 6.0, "interval_rigorous": 8.0}
    known = profile_rows({name: measure.Samples([t]) for name, t in times.items()})
    assert [r["median_ms"] for r in known] == [5, -1, 6, 2]
    assert [r["share"] for r in known] == [1, 0, 0.75, 0.25]
    assert "profile" not in quick_run(tmp_path, TINY[1:2], CONTENDERS[0])["cases"][0]


def off_by(amount: int, *, ours: bool = False, name: str = "liar") -> Contender:
    def count(A: torch.Tensor, rtol: float) -> Result:
        return torch.linalg.matrix_rank(A, rtol=rtol) + amount

    return Contender(name, ours, count)


def test_a_wrong_contender_is_flagged_and_is_not_the_best_peer(tmp_path: Path) -> None:
    honest = [c for c in CONTENDERS if c.name in (NEAR_RANK, MATRIX_RANK)]
    case = quick_run(tmp_path, TINY[1:2], *honest, off_by(5))
    (record,) = case["cases"]
    liar = record["contenders"][-1]
    assert liar["check"] == {
        "equal": 0,
        "near_tau": 0,
        "wrong": 3,
        "proven": None,
        "widest": None,
        "verdict": "WRONG",
    }
    assert record["best_peer"] == MATRIX_RANK
    assert "WRONG: 3 of 3" in case["printed"]
    assert "liar counted 3 of 3 wrong on 3x9x14 at rtol 0.01" in tables.markdown_tables(
        {k: case[k] for k in case if k != "printed"}
    )


def test_a_contender_that_raises_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    def fail(A: torch.Tensor, rtol: float) -> Result:
        raise RuntimeError("did not converge\nand more")

    result = quick_run(tmp_path, TINY[:1], Contender("broken", False, fail), CONTENDERS[0])
    broken, ours = result["cases"][0]["contenders"]
    assert broken == {"name": "broken", "ours": False, "error": "RuntimeError: did not converge"}
    assert ours["check"]["verdict"] == "equal"
    assert "FAILED (RuntimeError: did not converge)" in result["printed"]


def test_the_command_fails_when_one_of_ours_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    for liar, code in ((off_by(0, ours=True), 0), (off_by(1, ours=True), 1), (off_by(1), 0)):
        tiny = functools.partial(run, contenders=[liar], cases=TINY[:1], **FAST_CEILINGS)
        monkeypatch.setattr(command, "run_on_cpu", tiny)
        assert main(ONLY_CASES) == code


def test_an_interrupted_run_keeps_the_finished_cases_and_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(A: torch.Tensor, rtol: float) -> Result:
        if A.shape == (8, 8):
            raise KeyboardInterrupt
        return torch.linalg.matrix_rank(A, rtol=rtol)

    two = functools.partial(
        run, contenders=[Contender("c", False, interrupt)], cases=[TINY[1], TINY[3]], **FAST_CEILINGS
    )
    monkeypatch.setattr(command, "run_on_cpu", two)
    target = tmp_path / "cpu.json"
    target.write_text("old")
    assert main([*ONLY_CASES, "--json", str(target)]) == 130
    assert target.read_text() == "old"
    kept = json.loads((tmp_path / "cpu.json.partial").read_text(encoding="utf-8"))
    assert [case["name"] for case in kept["cases"]] == ["3x9x14"]
    assert kept["complete"] is False
    assert "cpu.json.partial" in capsys.readouterr().err


def test_verdicts_on_known_spectra() -> None:
    # rtol 0.1: one value 0.5 % above tau, one 0.5 % below; 1 and 0.5 far above.
    A = torch.diag(torch.tensor([1.0, 0.5, 0.1005, 0.0995, 0.01], dtype=torch.float64))
    expected = truth([A], 0.1)
    assert (int(expected.counts), int(expected.band[0]), int(expected.band[1])) == (3, 2, 4)
    words = [judge(torch.tensor([n]), expected).word for n in (-1, 1, 2, 3, 4, 5)]
    assert words == ["WRONG", "WRONG", "near tau", "equal", "near tau", "WRONG"]
    assert judge(torch.tensor([3, 3]), expected).wrong == 1


@pytest.mark.parametrize(
    ("lower", "upper", "wrong", "proven"),
    [(3, 3, 0, 1), (2, 4, 0, 0), (4, 5, 1, 0), (0, 2, 1, 0), (-1, -1, 1, 0)],
)
def test_verdicts_on_intervals(lower: int, upper: int, wrong: int, proven: int) -> None:
    three = torch.tensor([3])
    verdict = judge(
        (torch.tensor([lower]), torch.tensor([upper])), Truth(three, (three, three), (three, three))
    )
    assert (verdict.wrong, verdict.proven, verdict.widest) == (wrong, proven, upper - lower)
    said = tables.verdict(dataclasses.asdict(verdict), 1)
    assert said == ("WRONG: 1" if wrong else "proven" if proven else "hold, 0 of 1 proven, widest 2")


def test_quartiles() -> None:
    assert measure.quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == (2, 3, 4)
    assert measure.quartiles([1.0, 2.0, 3.0, 10.0]) == (1.75, 2.5, 4.75)
    assert measure.quartiles([7.0]) == (7, 7, 7)


class FakeClock:
    """A clock that only the functions under test move on."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_rounds_are_interleaved_and_slow_functions_get_few(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = FakeClock(), []
    monkeypatch.setattr(measure, "time", clock)

    def function(name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            log.append(name)
            clock.sleep(seconds)

        return call

    seconds = {"a": 0.25, "b": 0.125, "slow": 2.0}
    samples = measure.interleave({k: function(k, s) for k, s in seconds.items()}, rounds=12, budget_s=6.0)
    assert [samples[k].quartiles for k in seconds] == [(s * 1e3,) * 3 for s in seconds.values()]
    assert [len(samples[k].times_ms) for k in seconds] == [12, 12, 3]
    timed = log[-27:]
    pairs = [name for name in timed if name != "slow"]
    assert {tuple(pairs[i : i + 2]) for i in range(0, 24, 2)} == {("a", "b"), ("b", "a")}
    first, second, third = (i for i, name in enumerate(timed) if name == "slow")
    assert second - first >= 8
    assert third - second >= 8


def test_a_sample_of_several_calls_is_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    monkeypatch.setattr(measure, "time", clock)
    seconds = iter([0.125, 0.125, *[0.25, 0.75] * 3])
    samples = measure.interleave({"f": lambda: clock.sleep(next(seconds))}, rounds=3, budget_s=9.0, calls=2)
    assert samples["f"].times_ms == [500, 500, 500]


def test_a_warm_up_that_outlasts_the_budget_is_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    monkeypatch.setattr(measure, "time", clock)
    seconds = iter([8.0, 4.0, 6.0])
    samples = measure.interleave({"f": lambda: clock.sleep(next(seconds))}, rounds=12, budget_s=2.0)
    assert samples["f"].times_ms == [8000, 4000, 6000]


def test_rounds_of_a_slow_function_are_spread_over_the_whole_run() -> None:
    chosen = [i for i in range(20) if measure.takes_part(i, 3, 20)]
    assert len(chosen) == 3
    assert max(b - a for a, b in itertools.pairwise(chosen)) <= 7
    assert all(measure.takes_part(i, 20, 20) for i in range(20))


@pytest.mark.parametrize("shape", [(60, 20), (20, 60), (24, 24), (4, 30, 8)])
def test_inputs_decay_over_decades_and_repeat_under_a_seed(shape: tuple[int, ...]) -> None:
    case = Case("c", "", (shape,))
    (A,) = case.make(3)
    assert A.shape == shape
    assert A.dtype == torch.float32
    assert A.is_contiguous()
    assert torch.equal(A, case.make(3)[0])
    assert not torch.equal(A, case.make(4)[0])
    sigma = torch.linalg.svdvals(A.double())
    ratio = sigma[..., -1] / sigma[..., 0]
    assert bool(((ratio > 1e-8) & (ratio < 1e-1)).all())
    counts = truth([A], 1e-2).counts
    assert bool(((counts > 1) & (counts < min(shape[-2:]))).all())
    assert counts.numel() == 1 or counts.unique().numel() > 1


def test_the_55_convolutions_of_resnet56() -> None:
    (case,) = select_cases(["resnet56*"])
    assert case.matrices == 55
    assert {shape[1] for shape in case.shapes} == {16, 32, 64}
    assert case.shapes[0] == (65536, 16)
    assert case.shapes[-1] == (4096, 64)


def test_selecting_cases() -> None:
    assert select_cases() == list(CASES)
    assert not any(case.slow for case in select_cases(quick=True))
    assert [c.name for c in select_cases(["2048x8192", "65536*"], quick=True)] == [
        "65536x64",
        "65536x512",
        "2048x8192",
    ]
    assert len({case.name for case in CASES}) == len(CASES)
    with pytest.raises(ValueError, match="no benchmark case matches '7x7'; the cases are 32x32, "):
        select_cases(["7x7"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cases", "nothing*"], "no benchmark case matches 'nothing*'"),
        (["--rounds", "0"], "rounds must be at least 1"),
        (["--budget", "-1"], "budget must be"),
        (["--budget", "nan"], "budget must be"),
        (["--rtol", "0"], "rtol must lie between"),
        (["--rtol", "0.1", "2"], "rtol must lie between 0 and 1, got 2.0"),
        (["--rtol", "0.1", "0.1"], "rtol must be different numbers, got [0.1, 0.1]"),
        (["--measure", "rows", "columns"], "measure must be some of rows, dtypes, memory,"),
        (["--threads", "0"], "threads must be"),
        (["--seed", "-3"], "seed must lie"),
        (["--json", "no/such/folder/x.json"], "json must name a file"),
        (["--isa", "mmx"], "isa must be one of all, "),
        (["--isa", "avx2", "--device", "cuda"], "isa is an option of the device cpu, got 'cuda'"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_contenders_have_distinct_names_and_the_config_is_frozen() -> None:
    assert len({c.name for c in CONTENDERS}) == len(CONTENDERS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        BenchConfig().rounds = 3  # type: ignore[misc]
