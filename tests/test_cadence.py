"""When a tracker reads: intervals from a budget, the same steps again from a log or a state, the clock."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bsgap_kernels.tracking import RankTracker
from bsgap_kernels.tracking.cadence import Cadence
from bsgap_kernels.tracking.clock import StepClock

TIMES = st.lists(st.tuples(st.floats(1e-4, 1.0), st.floats(1e-7, 1e-1)), min_size=1, max_size=12)


def run(cadence: Cadence, times: list[tuple[float, float]], steps: range, delay: int = 0) -> list[int]:
    """Steps that are tracked; times of tracked steps, in turn, are known `delay` steps later."""
    tracked, under_way = [], []
    for step in steps:
        if cadence.due(step):
            tracked.append(step)
            under_way.append((step + delay, times[len(tracked) % len(times)]))
        while under_way and under_way[0][0] <= step:
            seconds, own = under_way.pop(0)[1]
            cadence.observe(step, seconds + own, own)
    return tracked


@pytest.mark.parametrize(("every", "expected"), [(1, [0, 1, 2, 3]), (3, [0, 3])])
def test_without_a_budget_the_interval_stays(every: int, expected: list[int]) -> None:
    cadence = Cadence(every)
    assert run(cadence, [(1.0, 1.0)], range(4)) == expected
    assert cadence.log == [(0, every)]


def test_the_interval_is_the_smallest_within_the_budget() -> None:
    cadence = Cadence(max_overhead=1 / 128)
    # A sixteenth of a step: every eighth one costs 1/128.
    tracked = run(cadence, [(4.0, 0.25)], range(200))
    assert cadence.every == 8
    assert tracked == [*range(5), *range(12, 200, 8)]
    assert cadence.log == [(0, 1), (5, 8)]
    cheap = Cadence(every=4, max_overhead=0.5)
    run(cheap, [(4.0, 0.25)], range(100))
    assert cheap.every == 1


def test_small_changes_and_single_outliers_change_nothing() -> None:
    cadence = Cadence(max_overhead=0.01)
    times = [(0.02, 0.002)] * 9 + [(0.02, 0.0022), (0.02, 0.5)]
    run(cadence, times, range(2000))
    assert len(cadence.log) == 2


@settings(max_examples=60, deadline=None)
@given(
    times=TIMES, delay=st.integers(0, 7), every=st.integers(1, 5), budget=st.sampled_from([0.001, 0.01, 0.3])
)
def test_a_replay_tracks_the_same_steps(
    times: list[tuple[float, float]], delay: int, every: int, budget: float
) -> None:
    cadence = Cadence(every, budget)
    tracked = run(cadence, times, range(300), delay)
    other_times = [(own, seconds) for seconds, own in times]
    for again in (Cadence(replay=cadence.log), Cadence(7, budget, replay=cadence.log)):
        assert run(again, other_times, range(300), delay) == tracked
        assert again.log == [
            setting for setting in cadence.log if setting[0] < 300
        ]  # the last may come after


@settings(max_examples=60, deadline=None)
@given(times=TIMES, every=st.integers(1, 5), stop=st.integers(1, 99))
def test_a_resumed_run_goes_on_at_the_interval(
    times: list[tuple[float, float]], every: int, stop: int
) -> None:
    whole, first, second = Cadence(every, 0.01), Cadence(every, 0.01), Cadence(every, 0.01)
    before = run(first, times, range(stop))
    second.load_state_dict(first.state_dict())
    assert (second.every, second.log) == (first.every, first.log)
    # The times so far are forgotten: without new ones the interval stays.
    second.max_overhead = None
    after = run(second, times, range(stop, 100))
    assert run(whole, times, range(stop)) == before
    whole.max_overhead = None
    assert after == run(whole, times, range(stop, 100))


def test_of_two_settings_of_one_step_the_later_holds() -> None:
    cadence = Cadence(replay=[(0, 1), (3, 9), (3, 2)])
    assert [step for step in range(10) if cadence.due(step)] == [0, 1, 2, 4, 6, 8]


def model_and_batch() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(8, 4)


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_tracker_resumes_on_the_step_that_was_due(stop: int) -> None:
    model, x = model_and_batch()

    def tracked(tracker: RankTracker, steps: range) -> list[int]:
        found = []
        for step in steps:
            model(x)
            if tracker.collect():
                found.append(step)
        return found

    options = {"every": 3, "verbose": False}
    with RankTracker(model, **options) as first:
        before = tracked(first, range(stop))
        state = first.state_dict()
    with RankTracker(model, **options) as second:
        second.load_state_dict(state)
        assert before + tracked(second, range(stop, 10)) == [0, 3, 6, 9]


def test_a_tracker_logs_its_intervals() -> None:
    model, x = model_and_batch()
    with RankTracker(model, max_overhead=1e-6, verbose=False) as tracker:
        for _ in range(12):
            model(x)
            tracker.step()
        assert tracker.every > 100
        log = tracker.state_dict()["cadence"]["log"]
    assert log[0] == (0, 1)
    assert log[1][1] == tracker.every


# The clock


class Time:
    """Stands for time.perf_counter: moves when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock_time(monkeypatch: pytest.MonkeyPatch) -> Time:
    now = Time()
    monkeypatch.setattr(time, "perf_counter", now)
    return now


def spend(clock: StepClock, now: Time, own: float, rest: float) -> None:
    beginning = clock.begin()
    now.now += own
    clock.end(beginning)
    now.now += rest


def test_the_clock_knows_tracked_steps_from_the_second_on(clock_time: Time) -> None:
    clock = StepClock(torch.device("cpu"))
    spend(clock, clock_time, 9.0, 9.0)
    clock.end_step(tracked=True)
    assert clock.finished() == []
    spend(clock, clock_time, 1.0, 3.0)
    clock.end_step(tracked=True)
    assert clock.finished() == [(4.0, 1.0)]
    assert clock.finished() == []
    assert clock.latest == (4.0, 1.0)


def test_what_a_tracked_step_leaves_to_the_next_is_counted(clock_time: Time) -> None:
    """The numbers of other ranks are counted a step later, which may be one that is not tracked."""
    clock = StepClock(torch.device("cpu"))
    clock.end_step(tracked=False)
    for _ in range(2):
        spend(clock, clock_time, 1.0, 4.0)
        clock.end_step(tracked=True)
        spend(clock, clock_time, 0.5, 4.0)
        clock.end_step(tracked=False)
        spend(clock, clock_time, 0.25, 4.0)
        clock.end_step(tracked=False)
    assert clock.finished() == [(5.0, 1.0), (5.5, 1.5)]
