"""The targets of the GPU path as ratios within one run, each with what was reached."""

from __future__ import annotations

from typing import Any

from ..contenders import MATRIX_RANK, NEAR_RANK
from ..target_rows import Record, at_least, at_most, over, right_median, row_of
from .cases import BATCHED, RESNET56, SMALL, WIDE
from .contenders import CUPY, HOOK

READ_FACTOR = 1.25
HOOK_FACTOR = 1.4
COUNT_MS = 0.150
"""All counts of a step: one launch."""
WIDE_FACTOR = 2.0
HOST_US = 30.0
LAUNCHES = 2


def targets(result: dict[str, Any]) -> list[Record]:
    """One entry a target: sentence, value, limit, whether it is met (None: not measured)."""
    cases = {case["name"]: case for case in result["cases"] if "error" not in case}
    read, total = _floor(cases, RESNET56, "read"), _floor(cases, WIDE, "total")
    gram, count = _stages(cases, RESNET56, NEAR_RANK)
    wide = _best(cases, WIDE, NEAR_RANK)
    rows = [
        at_most(
            f"{RESNET56}: near_rank_grouped, {READ_FACTOR} reads and {COUNT_MS:g} ms",
            _best(cases, RESNET56, NEAR_RANK),
            None if read is None else READ_FACTOR * read + COUNT_MS,
            "ms",
        ),
        at_most(
            f"{RESNET56}: kernels of the Gram stage, {READ_FACTOR} reads",
            gram,
            None if read is None else READ_FACTOR * read,
            "ms",
        ),
        at_most(f"{RESNET56}: kernels of the count stage", count, COUNT_MS, "ms"),
    ]
    for layout in ("channels_last", "NCHW"):
        rows.append(
            at_most(
                f"{RESNET56}: {HOOK}, {layout}, {HOOK_FACTOR} reads and {COUNT_MS:g} ms",
                _best(cases, RESNET56, f"{HOOK}, {layout}"),
                None if read is None else HOOK_FACTOR * read + COUNT_MS,
                "ms",
            )
        )
    rows += [
        at_most(
            f"{WIDE}: near_rank, {WIDE_FACTOR:g} floors",
            wide,
            None if total is None else WIDE_FACTOR * total,
            "ms",
        ),
        at_least(f"{WIDE}: near_rank over matrix_rank", over(_median(cases, WIDE, MATRIX_RANK), wide), 100),
        at_least(
            f"{BATCHED}: near_rank over CuPy",
            over(_median(cases, BATCHED, CUPY), _best(cases, BATCHED, NEAR_RANK)),
            5,
        ),
    ]
    for name, case in cases.items():
        peer = _median(cases, name, case["best_peer"]) if case.get("best_peer") else None
        rows.append(
            at_least(f"{name}: near_rank over the best peer", over(peer, _best(cases, name, NEAR_RANK)), 3)
        )
    host, launched = (_row(cases, SMALL, NEAR_RANK).get(field) for field in ("host_us", "launches"))
    rows.append(at_most(f"{SMALL}: host time of a call", host, HOST_US, "us"))
    rows.append(at_most(f"{SMALL}: launches", launched, LAUNCHES, "launches"))
    return rows


def _row(cases: dict[str, Record], case: str, name: str) -> Record:
    return row_of(cases.get(case, {}).get("contenders", ()), name=name)


def _median(cases: dict[str, Record], case: str, name: str) -> float | None:
    return right_median(_row(cases, case, name))


def _best(cases: dict[str, Record], case: str, name: str) -> float | None:
    """Median of the graph's replay, or of the call where there is none."""
    replayed = right_median(_row(cases, case, name).get("graph", {}))
    return _median(cases, case, name) if replayed is None else replayed


def _stages(cases: dict[str, Record], case: str, name: str) -> tuple[float | None, float | None]:
    """Milliseconds of the kernels named after the Gram matrix, and of all others."""
    kernels = _row(cases, case, name).get("kernels")
    if not kernels:
        return None, None
    gram = sum(k["us"] for k in kernels if "gram" in k["name"].lower())
    return gram / 1e3, (sum(k["us"] for k in kernels) - gram) / 1e3


def _floor(cases: dict[str, Record], case: str, part: str) -> float | None:
    floors: dict[str, float] = cases.get(case, {}).get("floor_ms") or {}
    return floors.get(part)
