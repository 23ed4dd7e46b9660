"""Missing and damaged sharpness, curves and speeds: the report shows what is there and says what is not."""

from __future__ import annotations

import html
import json
import re

import pytest
from report_fixtures import LENET, write_sweep

pytest.importorskip("bokeh")
from bsgap_kernels.lab.report import write_report
from bsgap_kernels.lab.report.compare import compare_data
from bsgap_kernels.lab.report.data import load_results
from bsgap_kernels.lab.report.figures_curves import parametric_plots
from bsgap_kernels.lab.report.figures_sharpness import sharpness_by_batch
from bsgap_kernels.lab.report.figures_speed import speed_by_batch
from bsgap_kernels.lab.report.findings import findings
from bsgap_kernels.lab.report.table import table_html
from bsgap_kernels.lab.report.text import notices_html

SITES = {name: LENET[name] for name in ("relu1#0", "relu2#0")}
PAIR = "b16-s0--b128-s0.json"


@pytest.fixture
def sweep(tmp_path):
    folder = tmp_path / "sweep"
    return write_sweep(folder, (16, 128), steps=6, sites=SITES, methods=("sgd",), landscape=True)


def notice(directory):
    """The text of the box that says what is missing; what would stand beside it is made, too."""
    results = load_results(directory)
    for make in (sharpness_by_batch, parametric_plots, speed_by_batch, findings, table_html, compare_data):
        make(results)
    return html.unescape(re.sub(r"<[^>]+>", "", notices_html(results)))


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_nothing_is_said_of_results_that_are_whole(sweep):
    assert notice(sweep) == ""


def test_without_sharpness_and_curves_there_is_neither_figure_nor_notice(sweep):
    for path in [*sweep.glob("*/sharpness.json"), *sweep.glob("curves/*.json")]:
        path.unlink()
    assert notice(sweep) == ""
    page = write_report(sweep).read_text()
    assert 'id="figure-sharpness"' not in page
    assert 'id="figure-curves"' not in page


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "sharpness.json cannot be read: its sharpness is not shown."),
        (b"{", "sharpness.json cannot be read: its sharpness is not shown."),
        (b"\xff\xfe\x00", "sharpness.json cannot be read: its sharpness is not shown."),
        (b"[" * 100_000, "sharpness.json cannot be read: its sharpness is not shown."),
        (b"null", "sharpness.json holds no sharpness: its sharpness is not shown."),
        (b'{"schema": 1}', "sharpness.json holds nothing that can be shown."),
        (b'{"sharpness": {"phi": 1}}', "sharpness.json holds no list of sharpness."),
        (b'{"sharpness": [1, "x", null, []]}', "4 of 4 entries of sharpness.json are left out"),
        (
            b'{"sharpness": [], "hessian": {"max_eigenvalue": NaN}}',
            "sharpness.json has no finite largest eigenvalue of the Hessian.",
        ),
    ],
)
def test_a_damaged_sharpness_file(sweep, content, sentence):
    (sweep / "b16-s0" / "sharpness.json").write_bytes(content)
    assert f"b16-s0: {sentence}" in notice(sweep)
    assert load_results(sweep).runs[0].sharpness is None
    # The other run's is still drawn.
    assert sharpness_by_batch(load_results(sweep)) is not None


@pytest.mark.parametrize(
    "change",
    [
        {"phi": None},
        {"phi": float("nan")},
        {"phi": "12"},
        {"phi": True},
        {"phi": 10**400},
        {"epsilon": 0},
        {"epsilon": -1e-3},
        {"epsilon": None},
        {"space": "half"},
        {"space": ["full"]},
    ],
)
def test_a_damaged_entry_of_the_sharpness(sweep, change):
    edit(sweep / "b16-s0" / "sharpness.json", lambda content: content["sharpness"][0].update(change))
    assert "1 of 4 entries of sharpness.json are left out: each needs a space" in notice(sweep)
    assert len(load_results(sweep).runs[0].sharpness.maxima) == 3


def test_sharpness_without_what_it_need_not_have(sweep):
    def strip(content):
        for name in ("images", "of", "mode", "hessian"):
            del content[name]
        for entry in content["sharpness"]:
            for name in ("loss", "max_loss", "dimension", "iterations", "at_bound"):
                del entry[name]

    for path in sweep.glob("*/sharpness.json"):
        edit(path, strip)
    assert notice(sweep) == ""
    assert sharpness_by_batch(load_results(sweep)) is not None


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", f"curves/{PAIR} cannot be read: its curves are not shown."),
        (b"[" * 100_000, f"curves/{PAIR} cannot be read: its curves are not shown."),
        (b"[]", f"curves/{PAIR} holds no curves: its curves are not shown."),
        (b'{"a": "b16-s0"}', f"curves/{PAIR} does not say which runs it joins"),
        (b'{"a": "x", "b": 5, "curves": []}', f"curves/{PAIR} does not say which runs it joins"),
        (b'{"a": "x", "b": "y", "curves": 3}', f"curves/{PAIR} does not say which runs it joins"),
        (b'{"a": "x", "b": "y", "curves": [7]}', f"curves/{PAIR}: a curve is left out"),
    ],
)
def test_a_damaged_curves_file(sweep, content, sentence):
    (sweep / "curves" / PAIR).write_bytes(content)
    assert sentence in notice(sweep)
    assert load_results(sweep).curves == []


@pytest.mark.parametrize(
    "change",
    [
        {"kind": None},
        {"alpha": []},
        {"alpha": [0.0]},
        {"alpha": [0.0] * 24 + [None]},
        {"alpha": [0.0] * 24 + ["1"]},
        {"alpha": list(range(5000))},
        {"alpha": 3},
        dict.fromkeys(("train_loss", "test_loss", "train_accuracy", "test_accuracy")),
    ],
)
def test_a_damaged_curve(sweep, change):
    edit(sweep / "curves" / PAIR, lambda content: content["curves"][0].update(change))
    assert f"curves/{PAIR}: a curve is left out: it needs a kind" in notice(sweep)
    assert [curve.kind for curve in load_results(sweep).curves] == ["curved"]


def test_missing_values_of_a_curve_are_gaps_and_counted(sweep):
    def damage(content):
        content["curves"][0]["train_loss"][3:5] = [None, float("inf")]
        content["curves"][1]["test_accuracy"] = [0.5]

    edit(sweep / "curves" / PAIR, damage)
    text = notice(sweep)
    assert f"curves/{PAIR}: 2 values of its linear curve are missing." in text
    assert f"curves/{PAIR}: 25 values of its curved curve are missing." in text
    assert len(load_results(sweep).curves) == 2


def test_curves_is_a_file(sweep):
    (sweep / "curves" / PAIR).unlink()
    (sweep / "curves").rmdir()
    (sweep / "curves").write_text("")
    assert load_results(sweep).curves == []
    write_report(sweep)


@pytest.mark.parametrize(
    "change",
    [
        {"images_per_second": None, "train_seconds": "many", "time_to_accuracy": None},
        {"images_per_second": float("inf"), "time_to_accuracy": [1]},
        {"time_to_accuracy": {}},
        {"method": 5, "synthetic": "yes", "threads": None, "precision": [], "hyper": 3},
    ],
)
def test_a_summary_whose_speeds_cannot_be_used(sweep, change):
    edit(sweep / "b16-s0" / "summary.json", lambda content: content.update(change))
    assert notice(sweep) == ""
    run = load_results(sweep).runs[0]
    assert (run.method, run.synthetic) == ("sgd", False)


@pytest.mark.parametrize(
    "change", [{"x": None}, {"nan": None}, {"7": None}, {"0.9": 3}, {"0.9": {"seconds": "long"}}]
)
def test_a_damaged_time_to_accuracy(sweep, change):
    edit(sweep / "b16-s0" / "summary.json", lambda content: content["time_to_accuracy"].update(change))
    assert "b16-s0: summary.json: a time to accuracy cannot be read and is left out." in notice(sweep)


def test_only_curves_without_a_figure_of_anything_else(sweep):
    """Runs of unknown batch size have no place against batch size; the curves are drawn all the same."""
    for run in [path.parent for path in sweep.glob("*/config.yaml")]:
        edit(run / "summary.json", lambda content: content.update(batch_size=None))
        (run / "config.yaml").write_text("seed: 0\n")
        run.rename(sweep / f"run-{run.name.split('-')[0]}x")
    page = write_report(sweep).read_text()
    assert 'id="figure-curves"' in page
    assert 'id="figure-sharpness"' not in page
