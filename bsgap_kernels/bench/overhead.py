"""What tracking costs a training step: without, with naive hooks, with delve and with ours, in one run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from . import machine, measure
from .overhead_hooks import HookClock, HookSet
from .overhead_result import EQUAL, NEAR_TAU, WRONG, OverheadResult, SiteCount, WayTimes
from .overhead_ways import (
    DEFAULTS,
    DELVE,
    NAIVE,
    NONE,
    OURS,
    STEP_END,
    Naive,
    Ours,
    Way,
    delve_is_installed,
    make_ways,
)
from .truth import truth_at

Step = Callable[[], object]
Build = Callable[[], tuple[nn.Module, Step]]

ROUNDS = 20
LEAST_ROUNDS = 7
"""Samples of a way at least: a difference of two medians is read off."""
BUDGET_S = 20.0
LEAST_PROFILE_ROUNDS, PROFILE_ROUNDS = 5, 15
PROFILE_SHARE = 0.25
"""Of the budget, for the steps in which every hook is timed apart."""
COMPILE_STEPS = 3
"""Steps of a model that a function built before anything is timed: compilation would spend the budget."""
ADAPTIVE_STEPS = 20
"""Steps of a sample under `max_overhead`, which tracks only some steps: enough to hold several that are."""


def measure_overhead(
    model: nn.Module | Build,
    step: Step | None = None,
    *,
    unfold: str = "channel",
    rtol: float = 1e-2,
    layers: Sequence[str] | None = None,
    every: int = 1,
    max_overhead: float | None = None,
    tracker_options: Mapping[str, Any] | None = None,
    ways: Sequence[str] | None = None,
    rounds: int = ROUNDS,
    budget_s: float = BUDGET_S,
    check: bool = True,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> OverheadResult:
    """Time a training step under several ways of tracking, step by step in turns.

        result = measure_overhead(model, step)   # step(): forward, backward and update of `model`
        print(result.way("RankTracker").percent, "% of a step")

    All ways take turns on the same model: their hooks are taken off and put back outside the timed part. The
    model trains on meanwhile, and is left without hooks. On a GPU the clock stops once the device is done.

    Args:
        model: the network that `step` trains; or a function that builds one and returns it with its step.
            Then every way has a model of its own, as `torch.compile` wants it: compile in the function, do
            not call, so that hooks are there first. No hook is timed apart in such a model.
        step: one training step, called many times.
        unfold: as RankTracker's; naive hooks unfold the same way.
        rtol: as RankTracker's; naive hooks count at the same one.
        layers: as RankTracker's; naive hooks read the same sites.
        every: as RankTracker's; the others track every step. A sample is the mean of so many steps.
        max_overhead: as RankTracker's. A sample is the mean of `ADAPTIVE_STEPS` steps.
        tracker_options: further options of RankTracker.
        ways: names to measure, of `no tracking`, `naive hooks`, `delve`, `RankTracker` (one count a site)
            and `RankTracker, all defaults`; default: all, delve where it is installed. `no tracking` is
            always among them.
        rounds: samples of a way at most.
        budget_s: seconds of timed steps of a way; a slow one gets fewer samples, at least 7.
        check: count one more step by both ways and by float64 singular values.
        seed: of the order within the rounds.
        progress: is told what goes on.

    Raises:
        TypeError: `model` is a module and there is no `step`.
        ValueError: an option that makes no sense.
    """
    if isinstance(model, nn.Module) == (step is None):
        raise TypeError("step: expected a callable with a module, and none with a function that builds both")
    if rounds < 1 or not budget_s >= 0:
        raise ValueError(f"rounds, budget_s: got {rounds} and {budget_s}, expected positive numbers")
    options: dict[str, Any] = {"layers": layers, "unfold": unfold, "rtol": rtol, **(tracker_options or {})}
    if every != 1:
        options["every"] = every
    if max_overhead is not None:
        options["max_overhead"] = max_overhead
    shared = (model, step) if isinstance(model, nn.Module) and step is not None else None
    build: Build = (lambda: shared) if shared is not None else model
    subject = build()
    device = next((p.device for p in subject[0].parameters()), torch.device("cpu"))
    timing = Timing(rounds, budget_s, seed, progress)
    # Compiled code is shared by all models of a class, and looks at hooks only if told to.
    guards = nullcontext() if shared else torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)
    with guards:
        sites = _sites(*subject, options)
        makers = make_ways(
            _names(ways),
            options,
            sites=sites,
            ours_steps=ADAPTIVE_STEPS if max_overhead is not None else every,
            device=device,
        )
        return _measure(
            build,
            subject if shared else None,
            makers,
            options,
            _Bench(device),
            timing,
            sites if check else (),
        )


def _measure(
    build: Build,
    shared: tuple[nn.Module, Step] | None,
    makers: Mapping[str, Callable[[], Way]],
    options: dict[str, Any],
    bench: _Bench,
    timing: Timing,
    check: Sequence[str],
) -> OverheadResult:
    """Every way in turns, then its hooks apart, then the counts."""
    others = machine.OtherWork()
    runs: dict[str, _Run] = {}
    failed: dict[str, str] = {}
    try:
        for name, make in makers.items():
            try:
                runs[name] = _Run(make(), *(shared or build()), bench)
                for _ in range(0 if shared else COMPILE_STEPS):
                    runs[name]()
            except Exception as error:
                if name == OURS:
                    raise
                failed[name] = _sentence(error)
        samples = measure.interleave(
            {name: run for name, run in runs.items() if name not in failed},
            rounds=timing.rounds,
            budget_s=timing.budget_s,
            least=LEAST_ROUNDS,
            stopwatch=bench.stopwatch,
            progress=timing.progress,
            seed=timing.seed,
        )
        failed |= {name: found.error for name, found in samples.items() if found.error is not None}
        failed |= {
            name: "no hook was called"
            for name, run in runs.items()
            if name not in failed and not run.way.fired()
        }
        inside = {
            name: run.profile(timing.budget_s * PROFILE_SHARE, partial(timing.progress, f"hooks: {name}"))
            for name, run in runs.items()
            if shared and name != NONE and name not in failed
        }
    finally:
        for run in runs.values():
            run.close()
    counts: tuple[SiteCount, ...] = ()
    if check:
        timing.progress("counts")
        counts = _check(*(shared or build()), check, options)
    step_ms = samples[NONE].quartiles[1] if NONE not in failed else None
    times = tuple(
        WayTimes(name, error=failed[name])
        if name in failed
        else _times(name, samples[name], step_ms, inside.get(name), runs[name].way.steps)
        for name in makers
    )
    return OverheadResult(times, counts, others.share())


@dataclass(frozen=True)
class Timing:
    """How long, and in which order; `progress` is told what goes on."""

    rounds: int
    budget_s: float
    seed: int
    progress: Callable[[str], None]


class _Bench:
    """The clock of whole steps."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spent = 0.0

    def synchronize(self) -> None:
        """Wait for the device, if it is one to wait for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def stopwatch(self, call: Callable[[], object]) -> float:
        """Seconds of a step, as the called run measured it once its hooks were on."""
        call()
        return self.spent


class _Run:
    """One way of tracking on a model, off until it is called for one sample."""

    def __init__(self, way: Way, model: nn.Module, step: Step, bench: _Bench) -> None:
        self.way, self.step, self.bench = way, step, bench
        self.hooks = HookSet(model, partial(way.attach, model))
        self.hooks.off()

    def __call__(self) -> None:
        self.hooks.on()
        try:
            self.way.begin()
            self.bench.synchronize()
            self.bench.spent = measure.host_seconds(self._steps) / self.way.steps
        finally:
            self.hooks.off()

    def _steps(self) -> None:
        for _ in range(self.way.steps):
            self.step()
            self.way.end_step()
        self.bench.synchronize()

    def profile(self, budget_s: float, progress: Callable[[], None]) -> dict[str, float]:
        """Median milliseconds a step inside each hook, by site, and at the end of the step."""
        progress()
        clock = HookClock(self.bench.device)
        found: dict[str, list[float]] = {}
        rounds = steps = 0
        spent = 0.0
        while rounds < LEAST_PROFILE_ROUNDS or (rounds < PROFILE_ROUNDS and spent < budget_s):
            sums: dict[str, float] = {}
            self.bench.synchronize()
            with self.hooks.timed(clock):
                self.way.begin()
                for _ in range(self.way.steps):
                    spent += measure.host_seconds(self.step)
                    begin = clock.now()
                    self.way.end_step()
                    clock.add(STEP_END, begin)
                    steps += 1
                    for site, spent_ms in clock.read().items():
                        sums[site] = sums.get(site, 0.0) + spent_ms
            for site, total in sums.items():
                found.setdefault(site, []).append(total / self.way.steps)
            rounds += 1
        return {site: statistics.median(values) for site, values in found.items()}

    def close(self) -> None:
        """Leave nothing on the model."""
        self.way.close()
        self.hooks.forget()


def _names(ways: Sequence[str] | None) -> list[str]:
    known = (NONE, NAIVE, DELVE, OURS, DEFAULTS)
    if ways is None:
        return [name for name in known if name != DELVE or delve_is_installed()]
    for name in ways:
        if name not in known:
            raise ValueError(f"ways: got {name!r}, expected some of {', '.join(known)}")
    return [name for name in known if name in ways or name == NONE]


def _times(
    name: str,
    samples: measure.Samples,
    step_ms: float | None,
    inside: dict[str, float] | None,
    steps: int,
) -> WayTimes:
    low, median, high = samples.quartiles
    added = None if step_ms is None or name == NONE else median - step_ms
    inside_ms = None if inside is None else sum(inside.values())
    known = [value for value in (added, inside_ms) if value is not None]
    cost = None
    if known:
        cost = max(known) if name in (OURS, DEFAULTS) else min(known)
    return WayTimes(
        name,
        rounds=len(samples.times_ms),
        median_ms=round(median, 5),
        lower_quartile_ms=round(low, 5),
        upper_quartile_ms=round(high, 5),
        added_ms=_rounded(added),
        inside_ms=_rounded(inside_ms),
        cost_ms=_rounded(cost),
        percent=None if cost is None or not step_ms else round(100 * cost / step_ms, 3),
        steps_per_sample=steps,
        sites_ms={site: round(value, 5) for site, value in (inside or {}).items()},
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


def _tracked(options: dict[str, Any]) -> dict[str, Any]:
    """The options for a tracker that reads the first step it sees."""
    return {key: value for key, value in options.items() if key not in ("every", "max_overhead")}


def _sites(model: nn.Module, step: Step, options: dict[str, Any]) -> list[str]:
    """The sites that the tracker finds in a step, functional nonlinearities among them."""
    ours = Ours(_tracked(options))
    hooks = HookSet(model, partial(ours.attach, model))
    try:
        step()
        return list(ours.counts())
    finally:
        ours.close()
        hooks.forget()


def _check(
    model: nn.Module, step: Step, sites: Sequence[str], options: dict[str, Any]
) -> tuple[SiteCount, ...]:
    """Every site of one step, counted by naive hooks, ours and float64 singular values."""
    naive = Naive(sites=sites, unfold=options["unfold"], rtol=options["rtol"], singular_values=True)
    ours = Ours(_tracked(options))

    def attach() -> None:
        naive.attach(model)
        ours.attach(model)

    hooks = HookSet(model, attach)
    try:
        step()
        counted = ours.counts()
    finally:
        naive.close()
        ours.close()
        hooks.forget()
    return tuple(
        _verdict(site, naive, near_rank, options["rtol"])
        for site, near_rank in counted.items()
        if site in naive.counts
    )


def _verdict(site: str, naive: Naive, ours: int, rtol: float) -> SiteCount:
    truth = truth_at([naive.singular_values[site]], rtol)
    few, many = (int(bound) for bound in truth.band)
    theirs = naive.counts[site]
    if ours == theirs:
        verdict = EQUAL
    else:
        verdict = NEAR_TAU if all(few <= count <= many for count in (ours, theirs)) else WRONG
    return SiteCount(site, naive.shapes[site], ours, theirs, int(truth.counts), verdict)


def _sentence(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
