"""The targets of the CPU path as ratios and limits within one run, each with what was reached."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .cases import COARSE_RTOL, FINE_RTOL
from .contenders import GRAM_PHASE, INTERVAL, MATRIX_RANK, NEAR_RANK, PROBED, RECORD, SVDVALS
from .machine import BUSY
from .measurements import DTYPE_SHAPES, FINE_RTOLS, FINE_SHAPES
from .target_rows import Record, at_least, at_most, over, right_median, row_of

SPEED = (
    ("65536x64", 15, 2),
    ("65536x512", 8, 1.7),
    ("2048x8192", 50, 2.5),
    ("4096x4096", 20, 2.5),
    ("4096x256x32", 30, 10),
    ("resnet56-channel", 20, 4),
)
"""Case; least times as fast as matrix_rank, and as the best peer."""
NOISE = 1.05
"""Medians of calls that do the same work differ by so much: `never slower` allows it."""
PROBED_FACTOR, PROBED_SIDE = 1.5, 256
RIGOROUS_FACTOR = 3.0
GRAM_CASE, GRAM_SHARE = "65536x512", 0.75
"""Of the float32 peak, in the Gram matrix of near_rank."""
ROW_FACTOR = 1.25
"""Time of a row in the tallest matrix over that in any: 1 where time is linear in the rows."""
OVERHEAD_US = 15.0


def targets(result: dict[str, Any]) -> list[Record]:
    """One entry a target: sentence, value, limit, whether it is met (None: not measured)."""
    return [
        *_speed(result["cases"]),
        *_intervals(result["cases"]),
        *_gram_share(result),
        *_others(result.get("measurements", {})),
    ]


def _speed(cases: list[Record]) -> Iterator[Record]:
    for rtol in (COARSE_RTOL, FINE_RTOL):
        for name, standard, peer in SPEED:
            case = row_of(cases, name=name, rtol=rtol)
            own = _median(case, NEAR_RANK)
            about = f"{name}, rtol {rtol:g}: near_rank over"
            yield at_least(f"{about} matrix_rank", over(_median(case, MATRIX_RANK), own), standard)
            yield at_least(f"{about} the best peer", over(_median(case, case.get("best_peer")), own), peer)


def _intervals(cases: list[Record]) -> Iterator[Record]:
    """Of every case that was timed."""
    for case in cases:
        about = f"{case['name']}, rtol {case['rtol']:g}:"
        plain, rigorous, probed, svd = (_median(case, c) for c in (NEAR_RANK, INTERVAL, PROBED, SVDVALS))
        if min(min(shape[-2:]) for shape in case["shapes"]) >= PROBED_SIDE:
            yield at_most(f"{about} probed over near_rank", over(probed, plain), PROBED_FACTOR, "times")
        yield at_most(f"{about} rigorous over near_rank", over(rigorous, plain), RIGOROUS_FACTOR, "times")
        yield at_most(f"{about} probed over rigorous", over(probed, rigorous), NOISE, "times (5 % of noise)")
        for mode, own in (("rigorous", rigorous), ("probed", probed)):
            yield at_least(f"{about} {mode} over svdvals", over(svd, own), 1)


def _gram_share(result: dict[str, Any]) -> Iterator[Record]:
    """Not measured where other processes took a part of the peak."""
    busy = (result.get("ceilings", {}).get("other_work") or 0) > BUSY
    case = {} if busy else row_of(result["cases"], name=GRAM_CASE, rtol=COARSE_RTOL)
    shortest = case.get("floors_ms", {}).get(NEAR_RANK, {}).get("gram_math")
    spent = row_of(case.get("profile", ()), op=NEAR_RANK, phase=GRAM_PHASE).get("median_ms")
    share = over(shortest, spent)
    yield at_least(f"{GRAM_CASE}: Gram matrix of near_rank", share, GRAM_SHARE, "of the float32 peak")


def _others(measurements: dict[str, Any]) -> Iterator[Record]:
    def rows(name: str) -> list[Record]:
        found: list[Record] = measurements.get(name, {}).get("rows", [])
        return found

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
    """The counts; what the tracker logs returns more than counts and promises nothing."""
    promising = [row for row in rows if row["name"] != RECORD]
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
