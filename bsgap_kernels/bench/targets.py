"""The targets of the CPU path as ratios and limits within one run, each with what was reached."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from .cases import COARSE_RTOL
from .contenders import GRAM_PHASE, INTERVAL, MATRIX_RANK, NEAR_RANK, PROBED, SVDVALS, TRACKER
from .machine import BUSY
from .measurements import DTYPE_SHAPES, FINE_RTOLS, FINE_SHAPES, LDLT_SIDE
from .target_rows import Record, at_least, at_most, over, right_median, row_of

SPEED = (
    ("65536x64", 1.5),
    ("65536x512", 1.5),
    ("2048x8192", 1.8),
    ("4096x4096", 1.8),
    ("4096x256x32", 5),
    ("resnet56-channel", 2),
)
"""Case; least times as fast as the best peer at the coarse threshold."""
NOISE = 1.05
"""Medians of calls that do the same work differ by so much: `never slower` allows it."""
PROBED_FACTOR = 1.5
RIGOROUS_FACTOR = 3.0
GRAM_CASE, GRAM_SHARE = "65536x512", 0.75
"""Of the peak, in the Gram matrices of near_rank (float32) and of its certificate (float64)."""
LDLT_SHARES = ((1, "fp64_flops_per_core", 0.6), (2, "fp64_flops", 0.4))
"""Threads, the peak they have, and the least share of it."""
ROW_FACTOR = 1.25
"""Time of a row in the tallest matrix over that in any: 1 where time is linear in the rows."""
OVERHEAD_US = 10.0


def targets(result: dict[str, Any]) -> list[Record]:
    """One entry a target: sentence, value, limit, whether it is met (None: not measured)."""
    measurements = result.get("measurements", {})
    return [
        *_speed(result["cases"]),
        *_intervals(result["cases"]),
        *_shares(result, _rows(measurements, "ldlt")),
        *_others(measurements),
    ]


def _rows(measurements: dict[str, Any], name: str) -> list[Record]:
    found: list[Record] = measurements.get(name, {}).get("rows", [])
    return found


def _speed(cases: list[Record]) -> Iterator[Record]:
    """Over the best peer: by a factor at the coarse threshold, and in no case that was timed slower."""
    for name, factor in SPEED:
        case = row_of(cases, name=name, rtol=COARSE_RTOL)
        yield at_least(
            f"{name}, rtol {COARSE_RTOL:g}: near_rank over the best peer", _over_peer(case), factor
        )
    factors = {(name, COARSE_RTOL) for name, _ in SPEED}
    for case in cases:
        if (case["name"], case["rtol"]) not in factors:
            about = f"{case['name']}, rtol {case['rtol']:g}: near_rank over the best peer"
            yield at_least(about, _over_peer(case), round(1 / NOISE, 3))


def _over_peer(case: Record) -> float | None:
    return over(_median(case, case.get("best_peer")), _median(case, NEAR_RANK))


def _intervals(cases: list[Record]) -> Iterator[Record]:
    """Of every case that was timed; a probed interval where the plan has one."""
    for case in cases:
        about = f"{case['name']}, rtol {case['rtol']:g}:"
        plain, rigorous, probed, svd = (_median(case, c) for c in (NEAR_RANK, INTERVAL, PROBED, MATRIX_RANK))
        yield at_most(f"{about} rigorous over near_rank", over(rigorous, plain), RIGOROUS_FACTOR, "times")
        if svd is not None:
            yield at_least(f"{about} rigorous over matrix_rank", over(svd, rigorous), 1)
        if probed is not None:
            yield at_most(f"{about} probed over near_rank", over(probed, plain), PROBED_FACTOR, "times")
            yield at_most(f"{about} probed over rigorous", over(probed, rigorous), NOISE, "times")


def _shares(result: dict[str, Any], factorised: list[Record]) -> Iterator[Record]:
    """Shares of the peak; not measured where other processes took a part of it."""
    ceilings = result.get("ceilings", {})
    busy = (ceilings.get("other_work") or 0) > BUSY
    case = {} if busy else row_of(result["cases"], name=GRAM_CASE, rtol=COARSE_RTOL)
    for op, dtype in ((NEAR_RANK, "float32"), (INTERVAL, "float64")):
        shortest = case.get("floors_ms", {}).get(op, {}).get("gram_math")
        spent = row_of(case.get("profile", ()), op=op, phase=GRAM_PHASE).get("median_ms")
        about = f"{GRAM_CASE}: {dtype} Gram matrix"
        yield at_least(about, over(shortest, spent), GRAM_SHARE, f"of the {dtype} peak")
    for threads, peak, least in LDLT_SHARES:
        rate = None if busy else row_of(factorised, side=LDLT_SIDE, threads=threads).get("gflops")
        share = None if rate is None or peak not in ceilings else round(rate * 1e9 / ceilings[peak], 3)
        yield at_least(f"LDLᵀ of side {LDLT_SIDE}, threads: {threads}", share, least, "of the float64 peak")


def _others(measurements: dict[str, Any]) -> Iterator[Record]:
    rows = partial(_rows, measurements)
    per_row = [row["ns_per_row"] for row in sorted(rows("rows"), key=lambda row: row["rows"])]
    growth = round(per_row[-1] / min(per_row), 3) if per_row else None
    yield at_most("time of a row, tallest matrix over the least", growth, ROW_FACTOR, "times")

    for shape in DTYPE_SHAPES:
        matrix = "x".join(map(str, shape))
        full, half = (
            right_median(row_of(rows("dtypes"), matrix=matrix, dtype=dtype))
            for dtype in ("float32", "bfloat16")
        )
        yield at_least(f"{matrix}: bfloat16 over float32", over(full, half), 1)

    yield from _memory(rows("memory"))

    empty, small = (row_of(rows("overhead"), matrix=m, name=NEAR_RANK) for m in ("2x2", "32x32"))
    yield at_most("2x2: time of a warm call", empty.get("us_per_call"), OVERHEAD_US, "us")
    standard = right_median(row_of(rows("overhead"), matrix="32x32", name=MATRIX_RANK))
    yield at_least("32x32: near_rank over matrix_rank, warm", over(standard, right_median(small)), 1)

    yield from _fine_thresholds(rows("fine-thresholds"))


def _memory(rows: list[Record]) -> Iterator[Record]:
    """Of a count or an interval; a tracker also keeps what it counts by."""
    promising = [row for row in rows if row["name"] != TRACKER]
    for matrix in dict.fromkeys(row["matrix"] for row in promising):
        mine = [row for row in promising if row["matrix"] == matrix]
        most = max(row["extra_bytes"] for row in mine) / 2**20
        limit = mine[0]["promised_bytes"] / 2**20
        yield at_most(f"{matrix}: extra memory of a count or interval", round(most, 1), limit, "MiB")
    if not promising:
        yield at_most("extra memory of a count or interval", None, None, "MiB")


def _fine_thresholds(rows: list[Record]) -> Iterator[Record]:
    for shape in FINE_SHAPES:
        matrix = "x".join(map(str, shape))
        kinds = [("float32", {"rtol": rtol}, f"rtol {rtol:g}") for rtol in FINE_RTOLS]
        for dtype, wanted, said in (*kinds, ("float64", {}, "default rtol")):
            own, svd = (
                right_median(row_of(rows, matrix=matrix, dtype=dtype, name=name, **wanted))
                for name in (NEAR_RANK, SVDVALS)
            )
            # Where singular values are computed the call is svdvals and little more.
            limit = 1.0 if said == f"rtol {FINE_RTOLS[0]:g}" else round(1 / NOISE, 3)
            yield at_least(f"{matrix}, {dtype}, {said}: near_rank over svdvals", over(svd, own), limit)


def _median(case: Record, name: str | None) -> float | None:
    return right_median(row_of(case.get("contenders", ()), name=name))
