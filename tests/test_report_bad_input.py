"""Half-written and damaged results: the report shows what is there and says what is missing."""

from __future__ import annotations

import html
import json
import re
import shutil

import pytest
from report_fixtures import LENET, write_run, write_sweep

pytest.importorskip("bokeh")
from bsgap_kernels.lab.report import ReportError, write_report
from bsgap_kernels.lab.report.data import load_results
from bsgap_kernels.lab.report.rows import read_rows
from bsgap_kernels.lab.report.text import notices_html

SITES = {name: LENET[name] for name in ("relu1#0", "relu2#0")}


@pytest.fixture
def sweep(tmp_path):
    return write_sweep(tmp_path / "sweep", (16, 128), steps=12, sites=SITES, every_metric=False)


def notice(directory):
    """The text of the box that says what is missing."""
    return html.unescape(re.sub(r"<[^>]+>", "", notices_html(load_results(directory))))


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_run_with_a_config_alone(sweep):
    for name in ("metrics.jsonl", "summary.json"):
        (sweep / "b128-s0" / name).unlink()
    text = notice(sweep)
    assert notices_html(load_results(sweep)) in write_report(sweep).read_text()
    assert "b128-s0: summary.json is missing" in text
    assert "b128-s0: metrics.jsonl is missing" in text
    assert "1 of 2 runs did not finish" in text
    assert "b16-s0" not in text


def test_only_a_config_and_nothing_else(tmp_path):
    run = write_run(tmp_path, 16, steps=2)
    for name in ("metrics.jsonl", "summary.json"):
        (run / name).unlink()
    page = write_report(run).read_text()
    assert page.count("No figure:") == 5
    assert "metrics.jsonl is missing" in page


def test_a_cut_last_line(sweep):
    path = sweep / "b16-s0" / "metrics.jsonl"
    whole = read_rows(path, [])
    path.write_bytes(path.read_bytes()[:-9])
    problems = []
    rows = read_rows(path, problems)
    assert len(problems) == 1
    assert "the last line of metrics.jsonl is cut" in problems[0]
    assert len(rows.series) == len(whole.series)
    assert "the last line of metrics.jsonl is cut" in notice(sweep)


@pytest.mark.parametrize("kept", range(1, 130, 7))
def test_a_file_cut_anywhere(tmp_path, kept):
    """Every length of the last line: whatever is left of it, the lines before it are read."""
    path = tmp_path / "metrics.jsonl"
    row = {
        "run": "b16-s0",
        "attempt": 0,
        "step": 1,
        "site": "relu#0",
        "metric": "probe.near_rank",
        "value": 7,
    }
    other = json.dumps(row | {"step": 2, "metric": "batch.srank"})
    path.write_text(json.dumps(row) + "\n" + other[:kept])
    problems = []
    rows = read_rows(path, problems)
    assert rows.series == {("relu#0", "probe.near_rank"): {1: 7.0}}
    assert bool(problems) == (kept < len(other))


def test_without_a_summary_the_numbers_come_from_the_rows(sweep):
    expected = json.loads((sweep / "b16-s0" / "summary.json").read_text())
    (sweep / "b16-s0" / "summary.json").unlink()
    assert "b16-s0: summary.json is missing" in notice(sweep)
    run = load_results(sweep).runs[0]
    assert (run.batch_size, run.seed, run.steps) == (16, 0, 12)
    assert run.train_accuracy == pytest.approx(expected["train_accuracy"])
    assert run.test_accuracy == pytest.approx(expected["test_accuracy"])
    assert run.gap == pytest.approx(expected["generalization_gap"])
    assert run.metric_ms == pytest.approx(expected["metric_ms_per_step"], abs=1e-4)
    assert run.metric_percent == pytest.approx(expected["metric_percent_of_step"], rel=1e-3)
    for site in expected["sites"]:
        known = run.sites[site["site"]]
        assert (known.near_rank, known.ratio, known.lower) == (
            site["near_rank"],
            site["ratio"],
            site["lower"],
        )
        assert known.null_ratio is None


def test_a_run_without_probe_rows(sweep):
    path = sweep / "b128-s0" / "metrics.jsonl"
    path.write_text("".join(line for line in path.open() if '"probe.' not in line))
    assert "b128-s0: it has no probe rows" in notice(sweep)
    assert "without a panel: batch 128" in write_report(sweep).read_text()


def test_no_run_with_probe_rows(sweep):
    for path in sweep.glob("*/metrics.jsonl"):
        path.write_text("".join(line for line in path.open() if '"probe.' not in line))
    page = write_report(sweep).read_text()
    assert "No figure: no run has near-rank values on the probe." in page
    assert "switch-options" not in page


def test_null_values_and_failed_counts(sweep):
    path = sweep / "b16-s0" / "metrics.jsonl"
    lines = []
    for line in path.open():
        row = json.loads(line)
        if row["step"] >= 9 and row["site"] == "relu2#0":
            row["value"] = -1 if row["metric"].endswith(("near_rank", "lower", "upper")) else None
        if row["metric"] in ("test.accuracy", "time.metric_ms"):
            row["value"] = None
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))

    def change(summary):
        summary["test_accuracy"] = summary["generalization_gap"] = summary["metric_ms_per_step"] = None
        summary["sites"][1] |= {"near_rank": -1, "lower": -1, "upper": -1, "ratio": None}

    edit(sweep / "b16-s0" / "summary.json", change)
    write_report(sweep)
    assert "relu2#0: 4 of 13 near-ranks on the probe have no value (first at step 9)" in notice(sweep)
    run = load_results(sweep).runs[0]
    assert run.test_accuracy is None
    assert run.sites["relu2#0"].near_rank is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe\x00",
        b'{"sites": 3, "steps": "many", "batch_size": {}, "versions": []}',
        b'{"sites": [1, {"site": 5}, {"site": "relu1#0", "probe_shape": "wide", "ratio": true}]}',
        b'{"steps": ' + b"9" * 400 + b"}",
        b"[" * 100_000,
    ],
)
def test_a_damaged_summary(sweep, content):
    (sweep / "b16-s0" / "summary.json").write_bytes(content)
    assert "b16-s0" in notice(sweep)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"- 1",
        b"a: [",
        b"\xff\xfe",
        b"batch_size: {a: 1}\nseed: many",
        b"x: !!python/object:os.system {}",
    ],
)
def test_a_damaged_config(sweep, content):
    (sweep / "b16-s0" / "config.yaml").write_bytes(content)
    assert load_results(sweep).runs[0].batch_size == 16


def test_damaged_lines_are_left_out_and_counted(tmp_path):
    row = {
        "run": "b16-s0",
        "attempt": 0,
        "step": 1,
        "site": "relu#0",
        "metric": "probe.near_rank",
        "value": 7,
    }
    changes = [
        {"step": "1"},
        {"step": -1},
        {"step": 10**30},
        {"value": "x"},
        {"value": 10**400},
        {"site": None},
    ]
    bad = [
        "not json",
        "[]",
        "5",
        '{"metric": "probe.near_rank"}',
        *(json.dumps(row | change) for change in changes),
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([*bad, json.dumps(row), ""]))
    problems = []
    assert read_rows(path, problems).series == {("relu#0", "probe.near_rank"): {1: 7.0}}
    assert problems == [f"{len(bad)} lines of metrics.jsonl cannot be read and are left out."]


def test_unknown_metrics_and_other_spacing(tmp_path):
    row = {
        "run": "b16-s0",
        "attempt": 0,
        "step": 1,
        "site": 'a "metric": "b#0',
        "metric": "probe.near_rank",
        "value": 7,
    }
    path = tmp_path / "metrics.jsonl"
    compact = json.dumps(row | {"step": 2}, separators=(",", ":"))
    unknown = [
        json.dumps(row | {"metric": name})
        for name in ("probe.future", "batch.near_rank", "probe.near_rank.x")
    ]
    path.write_text("\n".join([json.dumps(row), compact, "", *unknown, ""]))
    problems = []
    assert read_rows(path, problems).series == {(row["site"], "probe.near_rank"): {1: 7.0, 2: 7.0}}
    assert problems == []


def test_a_later_attempt_replaces_what_it_repeats(tmp_path):
    row = {"run": "b16-s0", "attempt": 0, "site": "relu#0", "metric": "probe.near_rank"}
    first = [json.dumps(row | {"step": step, "value": 1}) for step in range(8)]
    second = [json.dumps(row | {"attempt": 1, "step": step, "value": 2}) for step in range(4, 6)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([*first, *second, ""]))
    assert read_rows(path, []).series["relu#0", "probe.near_rank"] == {0: 1, 1: 1, 2: 1, 3: 1, 4: 2, 5: 2}


def test_runs_that_the_sweep_announces_and_that_are_missing(sweep):
    shutil.rmtree(sweep / "b128-s0")
    assert "1 of 2 runs of the sweep are not there: b128-s0" in notice(sweep)


def test_a_run_of_which_nothing_can_be_read(sweep):
    for name in ("config.yaml", "metrics.jsonl", "summary.json"):
        (sweep / "b128-s0" / name).write_bytes(b"\xff")
    assert "b128-s0: nothing in it can be read" in notice(sweep)


def test_a_stopped_run(sweep):
    edit(sweep / "b16-s0" / "summary.json", lambda summary: summary.update(status="stopped"))
    assert "b16-s0: it was stopped after 12 steps." in notice(sweep)


def test_a_run_of_the_initialised_network_alone(tmp_path):
    run = write_run(tmp_path, "full", steps=4)
    path = run / "metrics.jsonl"
    path.write_text("".join(line for line in path.open() if json.loads(line)["step"] == 0))
    (run / "summary.json").unlink()
    write_report(run)
    assert "summary.json is missing" in notice(run)
    assert "its batch size in samples is not recorded" in notice(run)
    found = load_results(run).runs[0]
    assert (found.batch_size, found.label, list(found.trajectories)) == (None, "full", list(LENET))


def test_every_file_damaged_is_an_error(tmp_path):
    run = write_run(tmp_path / "sweep", 16, steps=2)
    for name in ("config.yaml", "metrics.jsonl", "summary.json"):
        (run / name).write_bytes(b"\x00")
    with pytest.raises(
        ReportError, match=r"holds no results: expected config\.yaml, metrics\.jsonl, summary\.json"
    ):
        write_report(tmp_path / "sweep")


def test_a_directory_that_cannot_be_written_to(sweep):
    (sweep / "report.html").mkdir()
    with pytest.raises(ReportError, match="cannot be written"):
        write_report(sweep)
