"""What the report says: its figures, its table, its words, its size."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
from report_fixtures import LENET, layers, unpacked, write_run, write_sweep

pytest.importorskip("bokeh")
from bsgap_kernels.lab.report import ReportError, write_report
from bsgap_kernels.lab.report.data import load_results
from bsgap_kernels.lab.report.figures import heat_maps, trajectories
from bsgap_kernels.lab.report.figures_batch import accuracy_by_batch, near_rank_by_batch
from bsgap_kernels.lab.report.figures_time import time_by_batch
from bsgap_kernels.lab.report.series import SHOWN_STEPS, drawn_runs, pack
from bsgap_kernels.lab.report.style import significant

FIGURES = ("heatmap", "batch", "trajectory", "accuracy", "time")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return write_sweep(tmp_path_factory.mktemp("content") / "sweep", steps={16: 700, 128: 90, "full": 8})


@pytest.fixture(scope="module")
def page(sweep):
    return write_report(sweep).read_text()


def summaries(sweep):
    return {path.parent.name: json.loads(path.read_text()) for path in sweep.glob("*/summary.json")}


def table_rows(page):
    """{run: cells as text} of the table."""
    rows = re.findall(r'<tr[^>]* data-run="([^"]*)">(.*?)</tr>', page)
    return {
        name: [re.sub(r"<[^>]+>", " ", cell).split() for cell in re.findall(r"<td>(.*?)</td>", cells)]
        for name, cells in rows
    }


def sources(plot, column):
    """Data of every source of a figure that has `column`."""
    from bokeh.models import ColumnDataSource

    return [source.data for source in models(plot, ColumnDataSource) if column in source.data]


def models(plot, kind):
    """Every Bokeh model of one kind in a figure."""
    return [model for block in plot.blocks for model in block.model.select({"type": kind})]


def filled(results, plot):
    """{(run's name, layer): values over steps} that the page fills into a figure."""
    content, runs = pack(results), drawn_runs(results)
    found = {}
    for fill in (fill for block in plot.blocks for fill in block.fills):
        shown = fill["layers"] if fill["kind"] == "heat" else [fill["layer"]]
        for layer in shown:
            values = unpacked(content, fill["run"], layer)
            found[runs[fill["run"]].name, content["layers"][layer]["name"]] = values
    return found


def test_it_is_one_file_with_every_figure(page, sweep):
    assert (sweep / "report.html").read_text() == page
    assert not list(sweep.glob("*.tmp"))
    for name in FIGURES:
        figure = re.search(rf'<figure class="card" id="figure-{name}">(.*?)</figure>', page, re.DOTALL)
        assert figure is not None
        block = re.search(r'<div class="block" id="([^"]+)" data-block="([^"]+)"', figure[1])
        assert f'id="{block[2]}">' in figure[1]
        assert "What to look at:" in figure[1]
    assert "Incomplete results" not in page


def test_it_names_no_other_address(page):
    outside_scripts = re.sub(r"<script\b.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"https?://|//cdn", outside_scripts)
    assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=\"(?!data:)", page)
    assert "default-src 'none'" in page


def test_the_head_says_what_the_experiment_is(page):
    head = html.unescape(re.sub(r"<[^>]+>", " ", page.split("<header")[1].split("</header>")[0]))
    for fact in (
        "lenet5",
        "digits",
        "16, 128, 1437 (full)",
        "20 epochs",
        "0.01",
        "flatten",
        "512",
        "torch 2.15.0",
    ):
        assert fact in head


def test_the_table_holds_the_numbers_of_the_files(page, sweep):
    rows = table_rows(page)
    expected = summaries(sweep)
    assert list(rows) == ["b16-s0", "b128-s0", "bfull-s0"]
    for name, summary in expected.items():
        cells = rows[name]
        assert cells[0][0] == str(summary["batch_size"])
        assert cells[1] == ["0"]
        assert cells[2] == [f"{summary['steps']:,}"]
        percents = [summary["train_accuracy"], summary["test_accuracy"], summary["generalization_gap"]]
        assert [cell[0] for cell in cells[3:6]] == [f"{100 * value:.1f}" for value in percents]
        for cell, site in zip(cells[6:10], summary["sites"], strict=True):
            assert cell == [f"{site['ratio']:.3f}", "null", f"{site['null_ratio']:.3f}"]
        assert cells[10] == [significant(summary["metric_ms_per_step"])]
        assert cells[11] == [significant(summary["metric_percent_of_step"])]


def test_the_heat_map_holds_the_rows_of_the_files_on_a_fixed_scale(sweep):
    from bokeh.models import LinearColorMapper

    results = load_results(sweep)
    plot = heat_maps(results)
    mappers = models(plot, LinearColorMapper)
    assert len(mappers) == 3
    assert all((mapper.low, mapper.high) == (0, 1) for mapper in mappers)
    written = {}
    for line in (sweep / "b128-s0" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        written[row["site"], row["metric"], row["step"]] = row["value"]
    drawn = filled(results, plot)
    assert set(drawn) == {(run.name, site) for run in results.runs for site in LENET}
    for site in LENET:
        values = drawn["b128-s0", site]
        assert values["step"].tolist() == list(range(91))
        for column in ("near_rank", "lower", "upper"):
            expected = [written[site, f"probe.{column}", step] for step in range(91)]
            assert values[column].tolist() == expected
        ratios = [written[site, "probe.ratio", step] for step in range(91)]
        assert (values["near_rank"] / values["smaller"]).tolist() == pytest.approx(ratios)


def test_long_runs_are_thinned_by_the_stated_rule(sweep, page):
    results = load_results(sweep)
    steps = filled(results, heat_maps(results))["b16-s0", "relu1#0"]["step"]
    assert len(steps) == SHOWN_STEPS
    assert (steps[0], steps[-1]) == (0, 700)
    assert set(np.diff(steps)) <= {2.0, 3.0}
    assert f"at most {SHOWN_STEPS} of up to 701 steps" in page


def test_near_rank_by_batch_stands_beside_its_null(sweep):
    from bokeh.models import Span

    plot = near_rank_by_batch(load_results(sweep))
    by_layer = {}
    for data in sources(plot, "null"):
        by_layer.setdefault(data["layer"][0], []).append(data)
    assert set(by_layer) == set(LENET)
    for name, summary in summaries(sweep).items():
        for site in summary["sites"]:
            for data in by_layer[site["site"]]:
                at = data["x"].index(summary["batch_size"])
                assert data["near_rank"][at] == site["near_rank"], name
                assert data["y"][at] in (site["near_rank"], site["near_rank"] / site["null_near_rank"])
    spans = {span.location for span in models(plot, Span)}
    assert spans == {512, 120, 84, 1}


def test_trajectories_have_a_line_per_run_and_bands_where_intervals_are_wide(tmp_path):
    from bokeh.models import Line, VArea

    narrow = load_results(write_sweep(tmp_path / "narrow", (16, 64), steps=12))
    plot, switch = trajectories(narrow)
    assert len(models(plot, Line)) == len(filled(narrow, plot)) == 2 * len(LENET)
    assert switch.start == "step"
    assert not models(plot, VArea)
    assert any("single number" in note for note in plot.notes)
    wide = load_results(write_sweep(tmp_path / "wide", (16, 64), steps=12, wide_intervals=True))
    plot, _ = trajectories(wide)
    assert len(models(plot, VArea)) == 2 * len(LENET)
    for values in filled(wide, plot).values():
        assert np.all(values["lower"] <= values["near_rank"])
        assert np.any(values["lower"] < values["upper"])


def test_runs_of_unequal_length_are_compared_in_epochs(sweep):
    results = load_results(sweep)
    _, switch = trajectories(results)
    assert switch.start == "epoch"
    assert switch.ends == {"step": 700, "epoch": pytest.approx(20)}
    for run, packed in zip(drawn_runs(results), pack(results)["runs"], strict=True):
        assert packed["rate"] * run.steps == pytest.approx(20)


def test_accuracy_and_time_hold_the_numbers_of_the_files(sweep):
    results = load_results(sweep)
    expected = summaries(sweep).values()
    by_name = {data["name"][0]: data for data in sources(accuracy_by_batch(results), "name")}
    for name, key in (
        ("training set", "train_accuracy"),
        ("test set", "test_accuracy"),
        ("gap", "generalization_gap"),
    ):
        drawn = dict(zip(by_name[name]["x"], by_name[name]["y"], strict=True))
        assert drawn == pytest.approx({entry["batch_size"]: 100 * entry[key] for entry in expected})
    (bars,) = sources(time_by_batch(results), "metric_ms")
    assert sorted(bars["metric_ms"]) == pytest.approx(
        sorted(entry["metric_ms_per_step"] for entry in expected)
    )
    assert sorted(bars["step_ms"]) == pytest.approx(sorted(entry["step_ms"] for entry in expected))


def test_several_seeds_give_means_and_points(tmp_path):
    sweep = write_sweep(tmp_path / "sweep", (16, 64), (0, 1, 2), steps=6)
    results = load_results(sweep)
    test = [data for data in sources(accuracy_by_batch(results), "name") if data["name"][0] == "test set"]
    means, points = sorted(test, key=lambda data: len(data["x"]))
    assert (len(means["x"]), len(points["x"])) == (2, 6)
    assert means["y"][0] == pytest.approx(
        np.mean([y for x, y in zip(points["x"], points["y"], strict=True) if x == 16])
    )
    page = write_report(sweep).read_text()
    assert "Of several seeds the first is drawn (seed 0)." in page
    assert "Lines join the means over seeds" in page


def test_findings_say_what_the_files_say(page):
    assert "the near-rank ratio on the probe falls in 4 of 4 layers" in page
    assert "between 8 and 700 updates" in page


def test_one_run_is_reported_too(tmp_path):
    run = write_run(tmp_path, 32, steps=10)
    path = write_report(run)
    assert path == run / "report.html"
    assert list(table_rows(path.read_text())) == ["b32-s0"]


def test_many_layers_get_tables_of_their_own(tmp_path):
    sweep = write_sweep(tmp_path / "sweep", (16,), steps=3, sites=layers(11))
    page = write_report(sweep).read_text()
    assert page.count("<table>") == 3
    assert all(f"stage{index}." in page for index in range(11))


def test_every_text_from_the_files_is_escaped(tmp_path):
    name = "<b>evil</b>\"'&</script>#0"
    sweep = write_sweep(tmp_path / "<i>sweep", (16, 32), steps=3, sites={name: (64, 32)})
    summary = sweep / "b16-s0" / "summary.json"
    content = json.loads(summary.read_text()) | {"model": "<i>net", "budget": "<u>5", "status": "<s>"}
    summary.write_text(json.dumps(content))
    page = write_report(sweep).read_text()
    for tag in ("<b>evil", "<i>net", "<u>5", "<i>sweep", "</script>#0"):
        assert tag not in page


def test_a_large_sweep_stays_under_five_megabytes(tmp_path):
    sizes = (16, 64, 256, 512, "full")
    sites = layers(8)
    sweep = write_sweep(
        tmp_path / "sweep",
        sizes,
        (0, 1, 2),
        steps=SHOWN_STEPS + 20,
        sites=sites,
        every_metric=False,
        wide_intervals=True,
    )
    # More steps than are drawn change nothing in the size, so 320 stand for 2,000.
    assert write_report(sweep).stat().st_size < 5_000_000


def test_the_style_and_script_of_the_page_are_packaged():
    """An installed package without them would fail where a checkout works."""
    tomllib = pytest.importorskip("tomllib", reason="tomllib is part of Python from 3.11")
    root = Path(__file__).parent.parent
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["bsgap_kernels.lab.report"]
    folder = root / "bsgap_kernels" / "lab" / "report"
    assets = [path for path in folder.glob("*.*") if path.suffix != ".py"]
    assert {path.name for path in assets} == {"page.css", "page.js", "series.js", "compare.js"}
    assert all(any(path.match(pattern) for pattern in patterns) for path in assets)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("nowhere", "does not exist"), ("file", "is a file"), ("empty", "holds no results")],
)
def test_nothing_to_report_on_is_one_sentence(tmp_path, name, sentence):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match=sentence) as error:
        write_report(tmp_path / name)
    assert isinstance(error.value, ValueError)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


def fitted_sweep(directory, **ends):
    """A sweep of runs that were to train until fitted, with a floor of the metric's time."""
    sweep = write_sweep(directory, (16, "full"), steps={16: 400, "full": 100})
    for name, ended in {"b16-s0": "fitted", "bfull-s0": "fitted", **ends}.items():
        path = sweep / name / "summary.json"
        full = name == "bfull-s0"
        more = {
            "until_fitted": 0.99,
            "ended": ended,
            "probes": 5,
            "probe_ms": 2.5,
            "epochs": 100 if full else 4,
        }
        more |= {
            "metric_floor_ms": 4.5 if full else 0.25,
            "train_accuracy": 0.99 if ended == "fitted" else 0.5,
        }
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    return sweep


def test_runs_that_were_trained_until_fitted_say_how_they_ended(tmp_path):
    sweep = fitted_sweep(tmp_path / "both")
    page = write_report(sweep).read_text()
    assert (
        "Every run was trained until it reached 99 % train accuracy, which took 100 to 400 updates." in page
    )
    assert "change together here" not in page
    rows = table_rows(page)
    assert [rows[name][2] for name in rows] == [["400", "fitted"], ["100", "fitted"]]
    short = write_report(fitted_sweep(tmp_path / "one", **{"bfull-s0": "stalled"})).read_text()
    assert "1 of 2 runs did not reach 99 % train accuracy" in short
    assert "bfull-s0 (50.0 %, stalled). These networks are not equally well trained." in short
    assert "which took" not in short
    assert table_rows(short)["bfull-s0"][2] == ["100", "stalled"]
    # Four times as long in steps, 25 times in epochs.
    assert trajectories(load_results(sweep))[1].start == "step"


def test_the_cost_stands_beside_its_floor_and_the_probe_apart(tmp_path):
    sweep = fitted_sweep(tmp_path)
    found = summaries(sweep)
    (bars,) = sources(time_by_batch(load_results(sweep)), "metric_ms")
    assert bars["floor_ms"] == [0.25, 4.5]
    assert bars["floor_at"] == [
        found[run]["step_ms"] + at for run, at in (("b16-s0", 0.25), ("bfull-s0", 4.5))
    ]
    ends = [found[run]["step_ms"] + found[run]["metric_ms_per_step"] for run in ("b16-s0", "bfull-s0")]
    assert bars["end"] == ends
    assert bars["probe_text"] == [" 2.5 ms × 5"] * 2
    page = write_report(sweep).read_text()
    assert (
        f"at batch 1437 (full) the Gram matrices alone need 4.5 of the {significant(bars['metric_ms'][1])} ms"
        in page
    )
    assert table_rows(page)["bfull-s0"][12] == ["4.5"]
