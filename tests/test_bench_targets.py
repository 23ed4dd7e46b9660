"""The CPU targets, from results written by hand."""

from __future__ import annotations

from typing import Any

import pytest

from bsgap_kernels.bench.contenders import (
    GRAM_PHASE,
    INTERVAL,
    MATRIX_RANK,
    NEAR_RANK,
    PROBED,
    SVDVALS,
    TRACKER,
)
from bsgap_kernels.bench.tables import targets_table
from bsgap_kernels.bench.target_rows import at_least, at_most, over, right_median, row_of
from bsgap_kernels.bench.targets import SPEED, targets


def case(name: str, rtol: float, side: int, **medians: float) -> dict[str, Any]:
    names = {"plain": NEAR_RANK, "rigorous": INTERVAL, "probed": PROBED, "rank": MATRIX_RANK}
    rows = [{"name": names.get(k, k), "median_ms": v, "check": {"wrong": 0}} for k, v in medians.items()]
    return {"name": name, "rtol": rtol, "shapes": [[1000, side]], "contenders": rows, "best_peer": "peer"}


def found(result: dict[str, Any]) -> dict[str, tuple[Any, bool | None]]:
    rows = targets({"cases": [], **result})
    assert len({row["target"] for row in rows}) == len(rows)
    return {row["target"]: (row["value"], row["met"]) for row in rows}


def test_nothing_measured() -> None:
    rows = found({})
    assert len(rows) > len(SPEED)
    assert set(rows.values()) == {(None, None)}


def test_speed_over_the_best_peer() -> None:
    rows = found({"cases": [case("65536x64", 0.01, 64, plain=2.0, peer=3.0), case("4096x4096", 0.01, 64)]})
    assert rows["65536x64, rtol 0.01: near_rank over the best peer"] == (1.5, True)
    assert rows["4096x4096, rtol 0.01: near_rank over the best peer"] == (None, None)
    wrong = case("65536x64", 0.01, 64, plain=2.0, peer=3.0)
    wrong["contenders"][0]["check"]["wrong"] = 1
    assert found({"cases": [wrong]})["65536x64, rtol 0.01: near_rank over the best peer"] == (None, None)


@pytest.mark.parametrize(("name", "rtol"), [("65536x64", 0.001), ("512x4704", 0.01), ("512x4704", 0.001)])
def test_no_case_is_slower_than_the_best_peer(name: str, rtol: float) -> None:
    about = f"{name}, rtol {rtol:g}: near_rank over the best peer"
    assert found({"cases": [case(name, rtol, 64, plain=2.0, peer=1.92)]})[about] == (0.96, True)
    assert found({"cases": [case(name, rtol, 64, plain=2.0, peer=1.8)]})[about] == (0.9, False)


def test_intervals() -> None:
    large = case("big", 0.01, 256, plain=10.0, rigorous=30.0, probed=15.1, rank=29.0)
    small = case("small", 0.001, 255, plain=10.0, rigorous=31.0)
    rows = found({"cases": [large, small]})
    assert rows["big, rtol 0.01: probed over near_rank"] == (1.51, False)
    assert rows["big, rtol 0.01: rigorous over near_rank"] == (3, True)
    assert rows["big, rtol 0.01: probed over rigorous"] == (0.503, True)
    assert rows["big, rtol 0.01: rigorous over matrix_rank"] == (0.967, False)
    assert rows["small, rtol 0.001: rigorous over near_rank"] == (3.1, False)
    assert not [about for about in rows if "small" in about and ("probed" in about or "matrix_rank" in about)]


def test_shares_of_the_peak() -> None:
    tall = case("65536x512", 0.01, 512)
    tall["floors_ms"] = {NEAR_RANK: {"gram_math": 40.0}, INTERVAL: {"gram_math": 70.0}}
    tall["profile"] = [
        {"op": NEAR_RANK, "phase": GRAM_PHASE, "median_ms": 50.0},
        {"op": INTERVAL, "phase": GRAM_PHASE, "median_ms": 100.0},
    ]
    ldlt = {"rows": [{"side": 1024, "threads": t, "gflops": rate} for t, rate in ((1, 30.0), (2, 39.0))]}
    result = {
        "cases": [tall],
        "ceilings": {"other_work": 0.01, "fp64_flops": 100e9, "fp64_flops_per_core": 50e9},
        "measurements": {"ldlt": ldlt},
    }
    abouts = ["65536x512: float32 Gram matrix", "65536x512: float64 Gram matrix"]
    abouts += [f"LDLᵀ of side 1024, threads: {t}" for t in (1, 2)]
    rows = found(result)
    assert [rows[about] for about in abouts] == [(0.8, True), (0.7, False), (0.6, True), (0.39, False)]
    busy = found({**result, "ceilings": {**result["ceilings"], "other_work": 0.5}})  # type: ignore[dict-item]
    assert [busy[about] for about in abouts] == [(None, None)] * 4


def test_measurements_beside_the_cases() -> None:
    def timed(median: float, **about: Any) -> dict[str, Any]:
        return {**about, "median_ms": median, "wrong": 0, "us_per_call": median * 1e3}

    rows = found(
        {
            "measurements": {
                "rows": {
                    "rows": [{"rows": m, "ns_per_row": t} for m, t in ((4, 13.0), (1, 20.0), (2, 10.0))]
                },
                "dtypes": {
                    "rows": [
                        timed(4.0, matrix="65536x64", dtype="float32"),
                        timed(5.0, matrix="65536x64", dtype="bfloat16"),
                    ]
                },
                "memory": {
                    "rows": [
                        {"matrix": "9x9", "name": name, "extra_bytes": used << 20, "promised_bytes": 64 << 20}
                        for name, used in ((NEAR_RANK, 3), (INTERVAL, 65), (TRACKER, 90))
                    ]
                },
                "overhead": {
                    "rows": [
                        timed(0.0095, matrix="2x2", name=NEAR_RANK),
                        timed(0.04, matrix="32x32", name=NEAR_RANK),
                        timed(0.05, matrix="32x32", name=MATRIX_RANK),
                    ]
                },
                "fine-thresholds": {
                    "rows": [
                        timed(10.0, matrix="2048x512", dtype=dtype, rtol=rtol, name=name)
                        for dtype, rtol in (("float32", 1e-4), ("float32", 1e-6), ("float64", 4e-13))
                        for name in (NEAR_RANK,)
                    ]
                    + [
                        timed(9.7, matrix="2048x512", dtype=dtype, rtol=rtol, name=SVDVALS)
                        for dtype, rtol in (("float32", 1e-4), ("float32", 1e-6), ("float64", 4e-13))
                    ]
                },
            }
        }
    )
    assert rows["time of a row, tallest matrix over the least"] == (1.3, False)
    assert rows["65536x64: bfloat16 over float32"] == (0.8, False)
    assert rows["9x9: extra memory of a count or interval"] == (65, False)
    assert rows["2x2: time of a warm call"] == (9.5, True)
    assert rows["32x32: near_rank over matrix_rank, warm"] == (1.25, True)
    assert rows["2048x512, float32, rtol 0.0001: near_rank over svdvals"] == (0.97, False)
    assert rows["2048x512, float32, rtol 1e-06: near_rank over svdvals"] == (0.97, True)
    assert rows["2048x512, float64, default rtol: near_rank over svdvals"] == (0.97, True)
    assert rows["65536x64, float64, default rtol: near_rank over svdvals"] == (None, None)


@pytest.mark.parametrize("failed", [{"error": "MemoryError"}, {"rows": []}])
def test_measurements_that_failed_are_not_measured(failed: dict[str, Any]) -> None:
    names = ("rows", "dtypes", "memory", "overhead", "fine-thresholds", "ldlt")
    assert found({"measurements": dict.fromkeys(names, failed)}) == found({})


def test_rows_of_targets() -> None:
    assert at_most("a", 2.0, 2.0, "ms")["met"] is True
    assert at_most("a", 2.0, None, "ms")["met"] is None
    assert at_least("a", 1.9, 2.0)["met"] is False
    assert at_least("a", None, 2.0)["met"] is None
    assert over(3.0, 2.0) == 1.5
    assert over(3.0, 0.0) is None
    assert over(None, 2.0) is None
    assert row_of([{"a": 1, "b": 2}, {"a": 1, "b": 3}], a=1, b=3) == {"a": 1, "b": 3}
    assert row_of([{"a": 1}], a=2) == {}
    assert right_median({"median_ms": 1.0, "check": {"wrong": 0}}) == 1
    assert right_median({"median_ms": 1.0, "wrong": 2}) is None
    assert right_median({"error": "x"}) is None


def test_the_table() -> None:
    rows = [at_least("fast", 3.14159, 2), at_most("small", 9.0, 8.0, "MiB"), at_least("unknown", None, 1)]
    assert targets_table(rows).splitlines() == [
        "   met  fast: 3.142 (at least 2 times)",
        "MISSED  small: 9 (at most 8 MiB)",
        "Targets that were not measured: 1",
    ]
