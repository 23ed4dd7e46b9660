"""What is measured beside the cases: rows, dtypes, memory, overhead, thresholds, LDLᵀ. Counts are checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..dispatch import default_rtol
from . import contenders, measure
from .cases import COARSE_RTOL, Case
from .contenders import MATRIX_RANK, NEAR_RANK, SVDVALS, Result
from .memory import extra_memory
from .truth import Truth, judge, truth, truth_of_grams

ROWS = tuple(2**power for power in range(14, 23, 2))
FEATURES = 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPE_SHAPES: tuple[tuple[int, ...], ...] = ((65536, 64), (65536, 512), (4096, 256, 32))
SMALL_SIDES = (2, 32)
OVERHEAD_CALLS = 100
FINE_SHAPES = ((65536, 64), (2048, 512))
FINE_RTOLS = (1e-4, 1e-6)
LDLT_SIDE, LDLT_THREADS, LDLT_COUNTS = 1024, (1, 2), (8, 16)
"""Thresholds of the two calls whose difference is that many factorisations."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """How the run was asked to measure."""

    rounds: int
    seconds: float
    """Timed seconds of each function at most."""
    seed: int
    rtols: Sequence[float]
    cases: Sequence[Case]
    """Of the run; `memory` takes those of a single matrix."""
    flush: Callable[[], None]
    progress: Callable[[str], None]


@dataclass(frozen=True)
class Timed:
    """One function on one matrix; `about` opens its row."""

    about: Row
    run: Callable[[Tensor, float], Result]
    A: Tensor
    rtol: float

    def truth(self) -> Truth:
        """The count that is right; from Gram matrices, which is quicker, where they are as good."""
        return (truth_of_grams if self.rtol >= COARSE_RTOL else truth)([self.A], self.rtol)


def interleaved(setting: Setting, entries: Sequence[Timed], *, calls: int = 1) -> list[Row]:
    """Times the entries together: a row each, with the number of wrong counts."""
    wrong: dict[str, int] = {}

    def check(name: str, result: object) -> None:
        answer: Result = result  # type: ignore[assignment]
        wrong[name] = judge(answer, entries[int(name)].truth()).wrong

    samples = measure.interleave(
        {str(i): partial(entry.run, entry.A, entry.rtol) for i, entry in enumerate(entries)},
        rounds=setting.rounds,
        budget_s=setting.seconds,
        calls=calls,
        flush=setting.flush,
        on_result=check,
        progress=setting.progress,
        seed=setting.seed,
    )
    rows = []
    for i, entry in enumerate(entries):
        found = samples[str(i)]
        if found.error is not None:
            raise RuntimeError(f"{entry.about}: {found.error}")
        rows.append({**entry.about, **found.row(), "wrong": wrong[str(i)]})
    return rows


def rows(setting: Setting, sizes: Sequence[int] = ROWS) -> list[Row]:
    """near_rank of float32 matrices of 64 features and ever more rows: is the time linear?"""
    (A,) = Case("", "", ((max(sizes), FEATURES),)).make(setting.seed)
    entries = [Timed({"rows": m}, contenders.near_rank, A[:m], COARSE_RTOL) for m in sizes]
    return [
        {**row, "ns_per_row": round(row["median_ms"] * 1e6 / row["rows"], 4)}
        for row in interleaved(setting, entries)
    ]


def dtypes(setting: Setting, shapes: Sequence[tuple[int, ...]] = DTYPE_SHAPES) -> list[Row]:
    """near_rank of the same matrix in every dtype."""
    found: list[Row] = []
    for shape in shapes:
        (A,) = Case("", "", (shape,)).make(setting.seed)
        found += interleaved(
            setting,
            [Timed(_about(shape, dtype), contenders.near_rank, A.to(dtype), COARSE_RTOL) for dtype in DTYPES],
        )
    return found


def memory(setting: Setting) -> list[Row]:
    """Memory that our calls take beside their input, for every case of a single matrix."""
    found: list[Row] = []
    for case in setting.cases:
        if case.matrices == 1:
            setting.progress(case.name)
            found += extra_memory(case, list(setting.rtols), setting.seed)
    return found


def overhead(setting: Setting, sides: Sequence[int] = SMALL_SIDES) -> list[Row]:
    """Calls of torch's dispatcher on matrices so small that the call is what is timed, cache-warm."""
    entries = []
    for side in sides:
        (A,) = Case("", "", ((side, side),)).make(setting.seed)
        about = _about((side, side), A.dtype)
        for name, run in ((NEAR_RANK, _near_rank_op), (MATRIX_RANK, contenders.matrix_rank)):
            entries.append(Timed({**about, "name": name}, run, A, COARSE_RTOL))
    return [
        {**row, "us_per_call": round(row["median_ms"] * 1e3, 2)}
        for row in interleaved(setting, entries, calls=OVERHEAD_CALLS)
    ]


def fine_thresholds(setting: Setting, shapes: Sequence[tuple[int, int]] = FINE_SHAPES) -> list[Row]:
    """Thresholds that take a dearer path, down to the default of float64, beside svdvals."""
    found: list[Row] = []
    for shape in shapes:
        (A,) = Case("", "", (shape,)).make(setting.seed)
        double = default_rtol(torch.float64, *shape)
        for X, rtol in (*((A, rtol) for rtol in FINE_RTOLS), (A.double(), double)):
            found += interleaved(
                setting,
                [
                    Timed({**_about(shape, X.dtype), "rtol": rtol, "name": name}, run, X, rtol)
                    for name, run in (
                        (NEAR_RANK, contenders.near_rank),
                        (SVDVALS, contenders.singular_values),
                    )
                ],
            )
    return found


def _near_rank_op(A: Tensor, rtol: float) -> Tensor:
    counts: Tensor = torch.ops.bsgap.near_rank(A, rtol=rtol)
    return counts


def ldlt(setting: Setting, side: int = LDLT_SIDE, threads: Sequence[int] = LDLT_THREADS) -> list[Row]:
    """Rate of float64 LDLᵀ, one after the other: from the difference of calls with 8 and 16 of them."""
    (A,) = Case("", "", ((side, side),)).make(setting.seed)
    few, many = LDLT_COUNTS
    found: list[Row] = []
    before = torch.get_num_threads()
    try:
        for number in threads:
            torch.set_num_threads(number)
            samples = measure.interleave(
                {str(count): partial(_factorise, A, count) for count in LDLT_COUNTS},
                rounds=setting.rounds,
                budget_s=setting.seconds,
                progress=setting.progress,
                seed=setting.seed,
            )
            seconds = (samples[str(many)].quartiles[1] - samples[str(few)].quartiles[1]) / 1e3
            rate = (many - few) * side**3 / 3 / seconds
            found.append({"side": side, "threads": number, "gflops": round(rate / 1e9, 2)})
    finally:
        torch.set_num_threads(before)
    return found


def _factorise(A: Tensor, count: int) -> object:
    """A Gram matrix, its largest eigenvalue, and an LDLᵀ for each of so many thresholds."""
    rtols = torch.logspace(-3, -1, count, dtype=torch.float64)
    pairs = torch.stack([torch.zeros_like(rtols), rtols], -1)[None]
    return torch.ops.bsgap._counts(A, pairs, 0.0, 0.0, False, False)


def _about(shape: tuple[int, ...], dtype: torch.dtype) -> Row:
    return {"matrix": "x".join(map(str, shape)), "dtype": str(dtype).removeprefix("torch.")}


MEASUREMENTS: dict[str, Callable[[Setting], list[Row]]] = {
    "rows": rows,
    "dtypes": dtypes,
    "memory": memory,
    "overhead": overhead,
    "fine-thresholds": fine_thresholds,
    "ldlt": ldlt,
}
"""By the names that --measure takes."""


def measured(measurement: Callable[[Setting], list[Row]], setting: Setting) -> dict[str, Any]:
    """Its rows, or why there are none: the run goes on."""
    try:
        return {"rows": measurement(setting)}
    except Exception as error:  # what cannot be measured is a result too
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
