"""The targets of the GPU path as ratios within one run, each with what was reached."""

from __future__ import annotations

from typing import Any

from ..contenders import MATRIX_RANK
from .cases import BATCHED, RESNET56, SMALL, WIDE
from .contenders import CUPY, HOOK

READ_FACTOR = 1.25
HOOK_FACTOR = 1.4
COUNT_MS = 0.150
"""All counts of a step: one launch."""
WIDE_FACTOR = 2.0
HOST_US = 30.0
LAUNCHES = 2


def targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry a target: sentence, value, limit, whether it is met (None: not measured)."""
    cases = {case["name"]: case for case in result["cases"] if "error" not in case}
    rows: list[dict[str, Any]] = []

    def at_most(about: str, value: float | None, limit: float | None, unit: str) -> None:
        met = None if value is None or limit is None else value <= limit
        rows.append({"target": about, "value": value, "limit": limit, "unit": f"at most, {unit}", "met": met})

    def at_least(about: str, value: float | None, limit: float) -> None:
        met = None if value is None else value >= limit
        rows.append({"target": about, "value": value, "limit": limit, "unit": "at least, times", "met": met})

    read = _floor(cases, RESNET56, "read")
    at_most(
        f"{RESNET56}: near_rank_grouped, {READ_FACTOR} reads and {COUNT_MS:g} ms",
        _best(cases, RESNET56, "near_rank"),
        None if read is None else READ_FACTOR * read + COUNT_MS,
        "ms",
    )
    gram, count = _stages(cases, RESNET56, "near_rank")
    limit = None if read is None else READ_FACTOR * read
    at_most(f"{RESNET56}: kernels of the Gram stage, {READ_FACTOR} reads", gram, limit, "ms")
    at_most(f"{RESNET56}: kernels of the count stage", count, COUNT_MS, "ms")
    for layout in ("channels_last", "NCHW"):
        at_most(
            f"{RESNET56}: {HOOK}, {layout}, {HOOK_FACTOR} reads and {COUNT_MS:g} ms",
            _best(cases, RESNET56, f"{HOOK}, {layout}"),
            None if read is None else HOOK_FACTOR * read + COUNT_MS,
            "ms",
        )
    total = _floor(cases, WIDE, "total")
    wide = _best(cases, WIDE, "near_rank")
    at_most(
        f"{WIDE}: near_rank, {WIDE_FACTOR:g} floors",
        wide,
        None if total is None else WIDE_FACTOR * total,
        "ms",
    )
    at_least(f"{WIDE}: near_rank over matrix_rank", _ratio(_median(cases, WIDE, MATRIX_RANK), wide), 100)
    at_least(
        f"{BATCHED}: near_rank over CuPy",
        _ratio(_median(cases, BATCHED, CUPY), _best(cases, BATCHED, "near_rank")),
        5,
    )
    for name, case in cases.items():
        peer = _median(cases, name, case["best_peer"]) if case.get("best_peer") else None
        at_least(f"{name}: near_rank over the best peer", _ratio(peer, _best(cases, name, "near_rank")), 3)
    at_most(f"{SMALL}: host time of a call", _field(cases, SMALL, "near_rank", "host_us"), HOST_US, "us")
    at_most(f"{SMALL}: launches", _field(cases, SMALL, "near_rank", "launches"), LAUNCHES, "launches")
    return rows


def _row(cases: dict[str, Any], case: str, name: str) -> dict[str, Any]:
    rows = cases.get(case, {}).get("contenders", ())
    return next((row for row in rows if row["name"] == name), {})


def _field(cases: dict[str, Any], case: str, name: str, field: str) -> float | None:
    value = _row(cases, case, name).get(field)
    return None if value is None else float(value)


def _median(cases: dict[str, Any], case: str, name: str) -> float | None:
    row = _row(cases, case, name)
    # A wrong count has no time.
    return _right(row.get("median_ms"), row.get("check", {}).get("wrong", 1))


def _best(cases: dict[str, Any], case: str, name: str) -> float | None:
    """Median of the graph's replay, or of the call where there is none."""
    row = _row(cases, case, name)
    graph = row.get("graph", {})
    replayed = _right(graph.get("median_ms"), graph.get("wrong", 1))
    return _median(cases, case, name) if replayed is None else replayed


def _stages(cases: dict[str, Any], case: str, name: str) -> tuple[float | None, float | None]:
    """Milliseconds of the kernels named after the Gram matrix, and of all others."""
    kernels = _row(cases, case, name).get("kernels")
    if not kernels:
        return None, None
    gram = sum(k["us"] for k in kernels if "gram" in k["name"].lower())
    return gram / 1e3, (sum(k["us"] for k in kernels) - gram) / 1e3


def _right(median: float | None, wrong: int) -> float | None:
    return None if median is None or wrong else median


def _floor(cases: dict[str, Any], case: str, part: str) -> float | None:
    floors: dict[str, float] = cases.get(case, {}).get("floor_ms") or {}
    return floors.get(part)


def _ratio(other: float | None, own: float | None) -> float | None:
    return None if other is None or own is None or own <= 0 else round(other / own, 3)
