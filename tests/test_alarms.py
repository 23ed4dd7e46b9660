"""Alarms: on crossing and not at each step, for the sites that match, and for values that are not finite."""

from __future__ import annotations

import logging
import math

import pytest

from bsgap_kernels.tracking.alarms import Alarm, AlarmEvent, AlarmSink
from bsgap_kernels.tracking.background import BackgroundWriter
from bsgap_kernels.tracking.rows import Row


def feed(sink: AlarmSink, values: list[float], site: str = "relu1#0", metric: str = "batch.ratio") -> None:
    for step, value in enumerate(values):
        sink.write([Row(step, site, metric, value)])


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_bound_is_reported_on_crossing_only(caplog: pytest.LogCaptureFixture) -> None:
    feed(AlarmSink([Alarm(below=0.05)], rank=3), [0.5, 0.04, 0.03, 0.05, 0.05, 0.01, 0.01])
    assert messages(caplog) == [
        "layer relu1#0, step 1, rank 3: batch.ratio = 0.04 fell below 0.05",
        "layer relu1#0, step 5, rank 3: batch.ratio = 0.01 fell below 0.05",
    ]


def test_a_value_that_begins_below_is_reported() -> None:
    events: list[AlarmEvent] = []
    feed(AlarmSink([Alarm(action=events.append)]), [0.01, 0.01])
    assert [event.step for event in events] == [0]


def test_only_sites_and_metrics_that_match(caplog: pytest.LogCaptureFixture) -> None:
    events: list[AlarmEvent] = []
    alarms = [
        Alarm("blocks.*", "*.ratio", 0.1, events.append),
        Alarm("blocks.*", "*.ratio", 0.1, events.append),
    ]
    sink = AlarmSink(alarms, rank=1)
    for site, metric in (("relu1#0", "batch.ratio"), ("blocks.0#0", "batch.srank")):
        feed(sink, [0.01], site, metric)
    assert not events
    for site, metric in (
        ("blocks.0#0", "batch.ratio"),
        ("blocks.0#0", "probe.ratio"),
        ("blocks.1#0", "batch.ratio"),
    ):
        feed(sink, [0.01, 0.01], site, metric)
    # Two alarms that are alike both go off, once for each site and metric.
    assert len(events) == 6
    assert events[0] == (0, "blocks.0#0", "batch.ratio", 0.01, 1, 0.1)
    assert not messages(caplog)


def test_each_site_is_reported_when_it_stops_being_finite(caplog: pytest.LogCaptureFixture) -> None:
    sink = AlarmSink()
    feed(sink, [0.5, math.nan, math.nan, 0.5, math.inf, 0.5])
    feed(sink, [math.nan, math.nan], site="relu2#0")
    feed(sink, [2.0, -math.inf], site="", metric="train.loss")
    assert messages(caplog) == [
        "layer relu1#0, step 1, rank 0: batch.ratio = nan is not finite",
        "layer relu1#0, step 4, rank 0: batch.ratio = inf is not finite",
        "layer relu2#0, step 0, rank 0: batch.ratio = nan is not finite",
        "the run, step 1, rank 0: train.loss = -inf is not finite",
    ]


def test_a_site_is_reported_once_whatever_number_of_its_metrics(caplog: pytest.LogCaptureFixture) -> None:
    sink = AlarmSink()
    bad = [("batch.near_rank", -1), ("batch.ratio", math.nan), ("batch.srank", math.nan)]
    good = [("batch.near_rank", 4), ("batch.ratio", 0.5), ("batch.srank", 3.0)]
    for step, values in enumerate([good, bad, bad, [*good[:2], bad[2]], bad, good, bad]):
        sink.write([Row(step, "relu1#0", metric, value) for metric, value in values])
        # A view that is finite does not say that the other one has recovered.
        sink.write([Row(step, "relu1#0", "probe.ratio", 0.5)])
    assert messages(caplog) == [
        f"layer relu1#0, step {step}, rank 0: batch.near_rank = -1 is not finite" for step in (1, 6)
    ]


def test_a_metric_without_a_value_for_its_shape_is_no_alarm(caplog: pytest.LogCaptureFixture) -> None:
    feed(AlarmSink([Alarm(metric="*", below=-100)]), [math.nan, 1.0, math.nan], metric="batch.alpha_req")
    assert not messages(caplog)


def test_a_gap_of_values_that_are_not_finite_is_no_new_crossing() -> None:
    events: list[AlarmEvent] = []
    feed(AlarmSink([Alarm(action=events.append)]), [0.01, math.nan, 0.01])
    assert [(event.step, event.below) for event in events] == [(0, 0.05), (1, None)]


@pytest.mark.parametrize("error", [RuntimeError("no mail"), SystemExit(1)])
def test_an_action_that_raises_stops_no_alarm(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[AlarmEvent] = []

    def act(event: AlarmEvent) -> None:
        calls.append(event)
        raise error

    values = [0.5, 0.01, 0.5, 0.01]
    with BackgroundWriter([AlarmSink([Alarm(action=act)])]) as writer:
        for step, value in enumerate(values):
            writer.put(lambda step=step, value=value: [Row(step, "relu1#0", "batch.ratio", value)])
    assert [event.step for event in calls] == [1, 3]
    assert writer.disabled == []
    assert "the action of an alarm raised, for layer relu1#0, step 1" in caplog.text


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="below: got nan, expected a finite number"):
        Alarm(below=math.nan)
    with pytest.raises(TypeError, match="action: got str, expected a callable or None"):
        Alarm(action="stop")  # type: ignore[arg-type]
