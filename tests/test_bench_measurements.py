"""What is measured beside the cases, on tiny inputs."""

from __future__ import annotations

import dataclasses
import mmap
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bsgap_kernels.bench import CASES, Case, contenders, measure, measurements, memory
from bsgap_kernels.bench.contenders import CONTENDERS, MATRIX_RANK, NEAR_RANK, SVDVALS, taking_part
from bsgap_kernels.bench.measurements import MEASUREMENTS, Setting, Timed, interleaved, measured

SETTING = Setting(
    rounds=2,
    seconds=1.0,
    seed=0,
    rtols=[1e-2, 1e-3],
    cases=[],
    flush=lambda: None,
    progress=lambda text: None,
)
TIMES = {"rounds", "median_ms", "lower_quartile_ms", "upper_quartile_ms", "wrong"}
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SETTLE_S", 0.0)


def test_rows() -> None:
    found = measurements.rows(SETTING, sizes=(100, 400))
    assert [row["rows"] for row in found] == [100, 400]
    for row in found:
        assert row.keys() >= TIMES
        assert row["wrong"] == 0
        assert row["ns_per_row"] == pytest.approx(row["median_ms"] * 1e6 / row["rows"], abs=1e-3)


def test_dtypes() -> None:
    found = measurements.dtypes(SETTING, shapes=((90, 12), (3, 30, 6)))
    every = ["float32", "bfloat16", "float16", "float64"]
    assert [(row["matrix"], row["dtype"]) for row in found] == [
        (matrix, dtype) for matrix in ("90x12", "3x30x6") for dtype in every
    ]
    assert not any(row["wrong"] for row in found)


def test_overhead() -> None:
    found = measurements.overhead(SETTING, sides=(2,))
    assert [(row["matrix"], row["name"]) for row in found] == [("2x2", NEAR_RANK), ("2x2", MATRIX_RANK)]
    assert all(row["us_per_call"] == pytest.approx(row["median_ms"] * 1e3, abs=0.02) for row in found)


def test_fine_thresholds() -> None:
    found = measurements.fine_thresholds(SETTING, shapes=((90, 12),))
    kinds = [("float32", 1e-4), ("float32", 1e-6), ("float64", 90 * torch.finfo(torch.float64).eps)]
    assert [(row["dtype"], row["rtol"], row["name"]) for row in found] == [
        (*kind, name) for kind in kinds for name in (NEAR_RANK, SVDVALS)
    ]
    assert not any(row["wrong"] for row in found)


def test_the_rate_of_a_factorisation(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []

    def interleave(functions: dict[str, Any], **options: Any) -> dict[str, measure.Samples]:
        threads.append(torch.get_num_threads())
        for count, call in functions.items():
            assert call()[0].shape == (1, int(count))
        return {"8": measure.Samples([5.0]), "16": measure.Samples([9.0])}

    monkeypatch.setattr(measure, "interleave", interleave)
    before = torch.get_num_threads()
    found = measurements.ldlt(SETTING, side=90, threads=(1, 2))
    assert found == [{"side": 90, "threads": t, "gflops": 0.49} for t in (1, 2)]  # 8 · 90³/3 in 4 ms
    assert (threads, torch.get_num_threads()) == ([1, 2], before)


def test_a_wrong_count_and_a_failure_show() -> None:
    (A,) = Case("", "", ((30, 8),)).make()

    def wrong(A: torch.Tensor, rtol: float) -> torch.Tensor:
        return contenders.near_rank(A, rtol) + 5

    def fail(A: torch.Tensor, rtol: float) -> torch.Tensor:
        raise ValueError("no\nand more")

    entries = [
        Timed({"name": "liar"}, wrong, A, 1e-2),
        Timed({"name": "ours"}, contenders.near_rank, A, 1e-3),
    ]
    assert [row["wrong"] for row in interleaved(SETTING, entries)] == [1, 0]
    broken = partial(interleaved, entries=[Timed({"name": "broken"}, fail, A, 1e-2)])
    assert measured(broken, SETTING) == {"error": "RuntimeError: {'name': 'broken'}: ValueError: no"}
    assert list(measured(lambda setting: [{"rows": 1}], SETTING)["rows"]) == [{"rows": 1}]


def test_memory_is_measured_for_single_matrices_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(measurements, "extra_memory", lambda *request: asked.append(request) or [])
    cases = [
        Case("one", "", ((9, 4),)),
        Case("batch", "", ((2, 9, 4),)),
        Case("two", "", ((9, 4), (8, 2)), grouped=True),
    ]
    assert measurements.memory(dataclasses.replace(SETTING, cases=cases)) == []
    assert [(request[0].name, *request[1:]) for request in asked] == [("one", [1e-2, 1e-3], 0)]


@LINUX
def test_extra_bytes_see_what_a_call_takes_and_gives_back() -> None:
    def take() -> int:
        with mmap.mmap(-1, 40 << 20) as pages:  # not from what earlier tests have freed
            for first in range(0, len(pages), mmap.PAGESIZE):
                pages[first] = 1
            return len(pages)

    take()
    assert 39 << 20 <= memory.extra_bytes(take) < 60 << 20
    assert memory.extra_bytes(lambda: None) < 8 << 20  # threads of earlier tests make the counters coarse


@LINUX
def test_a_fresh_process_answers_for_every_op_and_threshold() -> None:
    (case,) = (c for c in CASES if c.name == "32x32")
    found = memory.extra_memory(case, [1e-2, 1e-3], 0)
    assert [(row["rtol"], row["name"]) for row in found] == [
        (rtol, c.name)
        for rtol, some in taking_part(CONTENDERS, case, [1e-2, 1e-3]).items()
        for c in some
        if c.ours
    ]
    for row in found:
        assert row["matrix"] == "32x32"
        assert 0 <= row["extra_bytes"] < row["promised_bytes"] == 4 * 8 * 32 * 32 + (64 << 20)
    with pytest.raises(RuntimeError, match="nothing: ValueError: no benchmark case matches 'nothing'"):
        memory.extra_memory(dataclasses.replace(case, name="nothing"), [1e-2], 0)


def test_a_status_without_the_peak_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: "Name:\tx\nVmRSS:\t  12 kB\n")
    assert memory.status_bytes("VmRSS") == 12 << 10
    with pytest.raises(RuntimeError, match="no VmHWM"):
        memory.status_bytes("VmHWM")


def test_the_names_that_the_command_takes() -> None:
    assert list(MEASUREMENTS) == ["rows", "dtypes", "memory", "overhead", "fine-thresholds", "ldlt"]
