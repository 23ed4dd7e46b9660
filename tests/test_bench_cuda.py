"""The GPU benchmark, run on the CPU: cases, checks, ceilings, targets, late contenders and the time limit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bsgap_kernels.bench import BenchConfig, Case, command, main, select_cases
from bsgap_kernels.bench.contenders import MATRIX_RANK, SVDVALS, TRACKER, Contender, Result
from bsgap_kernels.bench.cuda import GPU_CASES, run
from bsgap_kernels.bench.cuda import cases as names
from bsgap_kernels.bench.cuda import contenders as gpu_contenders
from bsgap_kernels.bench.cuda.clock import Clock, launches
from bsgap_kernels.bench.cuda.contenders import (
    GPU_CONTENDERS,
    HOOK,
    GpuContender,
    gram32,
    stacked_eigenvalues,
)
from bsgap_kernels.bench.cuda.hook import hook_path
from bsgap_kernels.bench.cuda.targets import targets
from bsgap_kernels.bench.truth import truth, truth_of_grams

HALVES = torch.bfloat16
TINY = (
    Case("40x12", "tall", ((40, 12),)),
    Case("3x9x14", "a batch, halves", ((3, 9, 14),), dtype=HALVES),
    Case("model", "a model", ((36, 4), (16, 8), (16, 4)), grouped=True, dtype=HALVES, image_batch=4),
)
ON_CPU: dict[str, Any] = {"device": "cpu", "ceiling_bytes": 1 << 16, "ceiling_side": 16}


def tiny_run(tmp_path: Path, cases: tuple[Case, ...] = TINY, **settings: Any) -> dict[str, Any]:
    lines: list[str] = []
    contenders = settings.pop("contenders", GPU_CONTENDERS)
    config = BenchConfig(json=tmp_path / "out.json", rounds=3, **settings)
    result = run(config, cases=cases, contenders=contenders, out=lines.append, **ON_CPU)
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == result
    return {**result, "printed": "\n".join(lines)}


def test_every_contender_is_checked_on_every_case_it_serves(tmp_path: Path) -> None:
    result = tiny_run(tmp_path)
    assert result["complete"]
    assert result["kind"] == "cuda"
    assert {"gpu", "driver"} <= result["machine"].keys()
    assert {"cuda", "triton", "torch"} <= result["versions"].keys()
    for case, record in zip(TINY, result["cases"], strict=True):
        assert record["dtype"] == str(case.dtype).removeprefix("torch.")
        assert [c["name"] for c in record["contenders"]] == [c.name for c in GPU_CONTENDERS if c.serves(case)]
        for c in record["contenders"]:
            assert "error" not in c, (case.name, c)
            assert c["check"]["wrong"] == 0, (case.name, c)
            assert c["check"]["equal"] + c["check"]["near_tau"] == case.matrices
            assert ("host_us" in c) == c["ours"]
        assert f"{case.name} ({case.about})" in result["printed"]
    assert "near_rank_grouped, NCHW" in [c["name"] for c in result["cases"][2]["contenders"]]
    hooks = [c["name"] for c in result["cases"][2]["contenders"] if c["name"].startswith(HOOK)]
    assert hooks == [f"{HOOK}, channels_last", f"{HOOK}, NCHW"]


def test_ceilings_come_first_and_give_the_floor_where_they_suffice(tmp_path: Path) -> None:
    result = tiny_run(tmp_path, TINY[:1])
    measured = result["ceilings"]
    for name in ("copy_bytes_per_s", "read_bytes_per_s", "bf16_flops", "tf32_flops", "fp64_flops"):
        assert measured[name] > 0
    assert result["rates"]["bandwidth"] == measured["read_bytes_per_s"]
    (record,) = result["cases"]
    parts = record["floor_ms"]
    assert parts["read"] == pytest.approx(
        40 * 12 * 4 / measured["read_bytes_per_s"] * 1e3, rel=1e-3, abs=1e-6
    )
    for c in record["contenders"]:
        assert c["fraction_of_floor"] == pytest.approx(parts["total"] / c["median_ms"], rel=0.01, abs=1e-4)
    assert "Measured: copy" in result["printed"]


def answering(amount: int, name: str, ours: bool) -> GpuContender:
    def prepare(case: Case, inputs: list[torch.Tensor], rtol: float) -> Any:
        return lambda: torch.linalg.matrix_rank(inputs[0].double(), rtol=rtol) + amount

    return GpuContender(name, ours, prepare)


def refusing(name: str) -> GpuContender:
    def prepare(case: Case, inputs: list[torch.Tensor], rtol: float) -> Any:
        raise RuntimeError("not on this device\nand more")

    return GpuContender(name, True, prepare)


def test_wrong_counts_and_failures_are_recorded_and_end_in_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contenders = (answering(1, "liar", True), refusing("broken"), answering(0, "honest", False))
    result = tiny_run(tmp_path, TINY[1:2], contenders=contenders)
    liar, broken, honest = result["cases"][0]["contenders"]
    assert liar["check"]["wrong"] == 3
    assert broken["error"] == "RuntimeError: not on this device"
    assert honest["vs_best_peer"] == 1
    assert "WRONG: 3 of 3" in result["printed"]
    for good, code in ((answering(1, "ours", True), 1), (answering(0, "ours", True), 0)):

        def instead(config: BenchConfig, good: GpuContender = good) -> dict[str, Any]:
            return run(config, cases=TINY[:1], contenders=(good,), out=lambda _: None, **ON_CPU)

        monkeypatch.setattr(command, "run_on_gpu", instead)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert main(["--device", "cuda", "--rounds", "1"]) == code


def test_decompositions_of_large_matrices_are_called_once_after_all_cases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_contenders, "LATE_VALUES", 100)
    result = tiny_run(tmp_path, TINY[:2])
    for record in result["cases"]:
        late = record["contenders"][-2:]
        assert [c["name"] for c in late] == [MATRIX_RANK, SVDVALS]
        assert all(c["late"] and c["rounds"] == 1 and c["check"]["wrong"] == 0 for c in late)
        assert late[0]["vs_matrix_rank"] == 1
    lines = [line for line in result["printed"].splitlines() if "one call" in line]
    assert [line.split(":")[0] for line in lines] == ["3x9x14", "40x12", "3x9x14", "40x12"]


def test_quick_leaves_them_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_contenders, "LATE_VALUES", 100)
    (record,) = tiny_run(tmp_path, TINY[:1], quick=True)["cases"]
    assert not {MATRIX_RANK, SVDVALS} & {c["name"] for c in record["contenders"]}


def test_past_the_time_limit_nothing_new_is_begun(tmp_path: Path) -> None:
    result = tiny_run(tmp_path, TINY[:2], time_limit=1e-9)
    assert result["complete"]
    assert [case["error"] for case in result["cases"]] == ["not reached in time"] * 2
    assert "FAILED (not reached in time)" in result["printed"]


def test_truth_from_gram_matrices_is_the_truth() -> None:
    for case in TINY:
        inputs = case.make(1)
        for centred in (False, True):
            direct, grams = (
                truth(inputs, 0.01, centred=centred),
                truth_of_grams(inputs, 0.01, centred=centred),
            )
            assert torch.equal(direct.counts, grams.counts)
            assert all(map(torch.equal, direct.band, grams.band))
            assert all(map(torch.equal, direct.certain, grams.certain))


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_hook_path_counts_the_channel_unfolding(channels_last: bool) -> None:
    inputs = TINY[2].make(2)
    images = [A.view(4, s, s, -1).permute(0, 3, 1, 2) for A, s in zip(inputs, (3, 2, 2), strict=True)]
    if not channels_last:
        images = [image.contiguous() for image in images]
    counts = hook_path(images, 0.01)()
    assert counts.dtype == torch.int64
    assert torch.equal(counts, truth(inputs, 0.01).counts)


def test_peers() -> None:
    A = torch.randn(3, 20, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gram32(A), A.mT @ A)
    assert gram32(A.mT.bfloat16()).dtype == torch.float32
    grams = [gram32(A), gram32(A[0]), gram32(A[1]), gram32(A[2, :, :2])]
    seen: list[tuple[int, ...]] = []

    def eigvalsh(gram: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(gram.shape))
        return torch.linalg.eigvalsh(gram)

    values = stacked_eigenvalues(grams[1:], eigvalsh)
    assert seen == [(2, 5, 5), (2, 2)]
    for gram, found in zip(grams[1:], values, strict=True):
        torch.testing.assert_close(found, torch.linalg.eigvalsh(gram))


def test_the_cases_of_the_design() -> None:
    by_name = {case.name: case for case in GPU_CASES}
    assert len(by_name) == len(GPU_CASES) == 7
    model = by_name[names.RESNET56]
    assert (model.matrices, model.dtype, 2 * model.values) == (55, HALVES, 8724152320)
    assert by_name[names.WIDE].shapes == ((8192, 65536),)
    assert by_name[names.BATCHED].shapes == ((500, 100, 100),)
    assert select_cases(["64x64"], among=GPU_CASES) == [by_name[names.SMALL]]
    assert not any(case.slow for case in select_cases(quick=True, among=GPU_CASES))


def test_targets_by_hand() -> None:
    good = {"wrong": 0}
    record = {
        "name": names.WIDE,
        "best_peer": "peer",
        "floor_ms": {"read": 0.25, "total": 13.0},
        "contenders": [
            {"name": "near_rank", "median_ms": 26.5, "check": good, "graph": {"median_ms": 20.0, "wrong": 0}},
            {"name": MATRIX_RANK, "median_ms": 1000.0, "check": good},
            {"name": "peer", "median_ms": 70.0, "check": good},
        ],
    }
    rows = {row["target"]: row for row in targets({"cases": [record, {"name": "x", "error": "late"}]})}
    assert rows[f"{names.WIDE}: near_rank, 2 floors"]["met"] is True
    assert rows[f"{names.WIDE}: near_rank over matrix_rank"]["value"] == 50
    assert rows[f"{names.WIDE}: near_rank over matrix_rank"]["met"] is False
    assert rows[f"{names.WIDE}: near_rank over the best peer"]["value"] == 3.5
    assert rows[f"{names.SMALL}: launches"]["met"] is None
    kernels = [{"name": "_gram_kernel", "us": 2000.0}, {"name": "count_small", "us": 200.0}]
    model = {"name": names.RESNET56, "best_peer": None, "floor_ms": {"read": 2.0, "total": 2.1}}
    model["contenders"] = [{"name": "near_rank", "kernels": kernels}]
    found = {row["target"]: (row["value"], row["met"]) for row in targets({"cases": [model]})}
    assert found[f"{names.RESNET56}: kernels of the Gram stage, 1.25 reads"] == (2.0, True)
    assert found[f"{names.RESNET56}: kernels of the count stage"] == (0.2, False)
    record["contenders"][0] |= {"check": {"wrong": 1}, "graph": {"median_ms": 20.0, "wrong": 1}}  # type: ignore[index]
    rows = {row["target"]: row for row in targets({"cases": [record]})}
    assert rows[f"{names.WIDE}: near_rank, 2 floors"]["met"] is None


def test_a_clock_of_the_host_has_no_graphs_and_no_kernels() -> None:
    clock = Clock(torch.device("cpu"))
    assert clock.captured(lambda: 1) is None
    assert clock.kernels(lambda: 1) == []
    assert launches([{"name": "gram", "launches": 2.0}, {"name": "Memset (Device)", "launches": 1.0}]) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err == "bsgap bench: device cuda: torch sees no CUDA device here\n"
    assert main(["--device", "tpu"]) == 2
    assert "device must be one of cpu, cuda, got 'tpu'" in capsys.readouterr().err
    assert main(["--time-limit", "0"]) == 2
    assert "time-limit must be a positive number of seconds" in capsys.readouterr().err


def test_contenders_have_distinct_names_and_our_ops_are_those_of_the_cpu() -> None:
    listed = [c.name for c in GPU_CONTENDERS]
    assert len(set(listed)) == len(listed)
    assert {"near_rank", "near_rank_interval", "near_rank_interval probed", f"{HOOK}, NCHW"} <= set(listed)
    assert TRACKER not in listed  # its numbers wait for the device: the hook path stands for it
    with pytest.raises(dataclasses.FrozenInstanceError):
        GPU_CONTENDERS[0].name = "x"  # type: ignore[misc]


def test_intervals_pass_through(tmp_path: Path) -> None:
    def interval(A: torch.Tensor, rtol: float) -> Result:
        count = torch.linalg.matrix_rank(A.double(), rtol=rtol)
        return count, count

    contender = gpu_contenders._prepared(Contender("i", True, interval))
    (record,) = tiny_run(tmp_path, TINY[:1], contenders=(contender,))["cases"]
    assert record["contenders"][0]["check"]["proven"] == 1
