"""Interleaved, cache-cold timing of several functions, and the statistics of the samples."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

MIN_ROUNDS = 3
SETTLE_S = 0.005
"""Pause before each sample: OpenMP threads of the library that ran last spin for milliseconds, and would take
a core from the next one if that brings its own threads (NumPy's OpenBLAS beside torch's OpenMP)."""
REGAIN_S = 0.03
"""Seconds for which a short contender runs untimed before each sample. After threads of another library the
scheduler may keep both of its own on one core for a while, which takes longer than a short call."""


@dataclass
class Samples:
    """Times of one function, milliseconds a call."""

    times_ms: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Lower quartile, median, upper quartile (linear interpolation between the samples)."""
        return quartiles(self.times_ms)

    def row(self) -> dict[str, float]:
        """Rounds, median and quartiles as they go into a result."""
        low, median, high = self.quartiles
        return {
            "rounds": len(self.times_ms),
            "median_ms": round(median, 5),
            "lower_quartile_ms": round(low, 5),
            "upper_quartile_ms": round(high, 5),
        }


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile, by linear interpolation; the value itself for a single one."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


class CacheFlush:
    """Overwrites twice the last-level cache, so that each sample reads its input from memory."""

    def __init__(self) -> None:
        self.bytes = min(max(2 * last_level_cache_bytes(), 64 << 20), 512 << 20)
        self._buffer = torch.zeros(self.bytes // 4, dtype=torch.float32)

    def __call__(self) -> None:
        """Empties the cache."""
        self._buffer.add_(1.0)


def last_level_cache_bytes() -> int:
    """Size of the level-3 cache, 0 where the system does not say."""
    try:
        return max(os.sysconf("SC_LEVEL3_CACHE_SIZE"), 0)
    except (AttributeError, ValueError, OSError):
        return 0


def rounds_for(warm_up_s: float, rounds: int, budget_s: float, least: int = MIN_ROUNDS) -> int:
    """Rounds of a function whose warm-up took so long: all that the budget allows, at least 3."""
    return min(rounds, max(least, int(budget_s / max(warm_up_s, 1e-9))))


def takes_part(index: int, mine: int, total: int) -> bool:
    """Whether a function with `mine` of `total` rounds runs in round `index`; they are spread evenly."""
    return index * mine // total != (index + 1) * mine // total


def _append_result(results: list[object], function: Callable[[], object]) -> None:
    results.append(function())


def interleave(
    functions: dict[str, Callable[[], object]],
    *,
    rounds: int,
    budget_s: float,
    least: int = MIN_ROUNDS,
    calls: int = 1,
    flush: Callable[[], None] | None = None,
    on_result: Callable[[str, object], None] | None = None,
    progress: Callable[[str], None] = lambda _: None,
    seed: int = 0,
    stopwatch: Callable[[Callable[[], object]], float] | None = None,
    settle_s: float | None = None,
) -> dict[str, Samples]:
    """Times the functions in rounds, each in a new order, so that a slow spell of the machine meets all.

    A warm-up call of each goes first; its result goes to `on_result` and its duration says how many rounds
    the function gets, at least `least`. A function that raises is not timed further: its `error` says why.
    With `calls` > 1 a sample is the mean of that many calls in a row. `stopwatch` times one call in seconds
    where the host's clock does not (a GPU); `settle_s` replaces `SETTLE_S`.
    """
    seconds = host_seconds if stopwatch is None else stopwatch
    pause = SETTLE_S if settle_s is None else settle_s
    samples = {name: Samples() for name in functions}
    number: dict[str, int] = {}
    typical: dict[str, float] = {}
    for name, function in functions.items():
        progress(f"warm-up: {name}")
        try:
            results: list[object] = []
            # The first call pays for what only a first call does.
            spent = seconds(partial(_append_result, results, function))
            if spent < budget_s / rounds:  # cheap: a second call says how long one takes once all is loaded
                spent = seconds(function)
            typical[name] = spent
            number[name] = rounds_for(spent * calls, rounds, budget_s, least)
            if calls == 1 and spent >= budget_s and number[name] > 1:
                # What only a first call does is nothing beside one that outlasts its budget: a sample, too.
                samples[name].times_ms.append(spent * 1e3)
                number[name] -= 1
        except Exception as error:  # a contender that fails is a result too
            samples[name].error = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if on_result is not None:
            on_result(name, results[0])
    order = random.Random(seed)
    total = max(number.values(), default=0)
    for index in range(total):
        names = [name for name, mine in number.items() if takes_part(index, mine, total)]
        order.shuffle(names)
        for name in names:
            progress(f"round {index + 1}/{total}: {name}")
            if stopwatch is None:
                begun = time.perf_counter()
                while typical[name] < REGAIN_S and time.perf_counter() - begun < REGAIN_S:
                    functions[name]()
            if calls == 1 and flush is not None:
                flush()
            if pause or stopwatch is None:
                time.sleep(pause)
            spent = seconds(partial(_call, functions[name], calls))
            samples[name].times_ms.append(spent * 1e3 / calls)
    return samples


def host_seconds(call: Callable[[], object]) -> float:
    """How long a call takes by the host's clock."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _call(function: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        function()
