"""Sharpness, curves, speed and methods in the report: figures, words, and the comparison's data."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from report_fixtures import LENET, layers, unpacked, write_curves, write_run, write_sweep

pytest.importorskip("bokeh")
from bsgap_kernels.lab.report import write_report
from bsgap_kernels.lab.report.compare import compare_data
from bsgap_kernels.lab.report.data import load_results
from bsgap_kernels.lab.report.figures import heat_maps, law_note, trajectories
from bsgap_kernels.lab.report.figures_batch import accuracy_by_batch, near_rank_by_batch
from bsgap_kernels.lab.report.figures_curves import MAX_PAIRS, parametric_plots
from bsgap_kernels.lab.report.figures_sharpness import sharpness_by_batch
from bsgap_kernels.lab.report.figures_speed import speed_by_batch
from bsgap_kernels.lab.report.figures_time import time_by_batch
from bsgap_kernels.lab.report.findings import findings
from bsgap_kernels.lab.report.grid import MAX_SINGLE_PANELS
from bsgap_kernels.lab.report.series import pack
from bsgap_kernels.lab.report.statistics import estimate

NEW_FIGURES = ("speed", "sharpness", "curves")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("landscape") / "sweep"
    return write_sweep(folder, (16, 128, 512), (0, 1, 2), steps=6, methods=("sgd", "adam"), landscape=True)


@pytest.fixture(scope="module")
def results(sweep):
    return load_results(sweep)


@pytest.fixture(scope="module")
def page(sweep):
    return write_report(sweep).read_text()


def models(plot, kind):
    return [model for block in plot.blocks for model in block.model.select({"type": kind})]


def rows(plot, column):
    """Every row of the sources that have `column`, as dicts."""
    from bokeh.models import ColumnDataSource

    tables = [source.data for source in models(plot, ColumnDataSource) if column in source.data]
    return [
        {name: values[index] for name, values in table.items()}
        for table in tables
        for index in range(len(table[column]))
    ]


def test_the_page_has_the_new_figures_and_old_results_do_not(page, tmp_path):
    old = write_report(write_sweep(tmp_path / "old", (16, 32), steps=3)).read_text()
    for name in NEW_FIGURES:
        assert f'id="figure-{name}"' in page
        assert f'id="figure-{name}"' not in old
    assert "Incomplete results" not in page
    assert "Incomplete results" not in old


def test_runs_of_several_methods_are_told_apart(results, page):
    assert results.methods == ["sgd", "adam"]
    assert results.labels[:2] == ["16 · sgd", "16 · adam"]
    assert results.batch_labels == ["16", "128", "512"]
    assert {run.name for run in results.of("16 · adam")} == {f"adam-b16-s{seed}" for seed in range(3)}
    assert "3 batch sizes, 2 methods, 18 runs" in page
    assert "adam: From batch size 16 to 512" in page


def test_one_method_is_not_told(tmp_path):
    results = load_results(write_sweep(tmp_path / "sweep", (16, 32), steps=3, methods=("adam",)))
    assert results.labels == ["16", "32"]


def test_a_method_is_known_from_the_runs_name_alone(tmp_path):
    run = write_run(tmp_path, 16, steps=3, method="adam")
    for name in ("config.yaml", "summary.json"):
        (run / name).unlink()
    found = load_results(run).runs[0]
    assert (found.method, found.batch_size, found.seed) == ("adam", 16, 0)


def test_missing_runs_of_methods_are_named(tmp_path):
    import shutil

    sweep = write_sweep(tmp_path / "sweep", (16, 32), steps=3, methods=("sgd", "adam"))
    shutil.rmtree(sweep / "adam-b32-s0")
    assert load_results(sweep).problems == ["1 of 4 runs of the sweep are not there: adam-b32-s0."]


def test_sharpness_holds_every_phi_with_its_epsilon_and_train_loss(results, sweep):
    plot = sharpness_by_batch(results)
    drawn = {(row["runs"], row["name"]): row for row in rows(plot, "max_loss") if row["seed"] == "(seed 1)"}
    names = {"full": "full space", "subspace": "random subspace"}
    written = json.loads((sweep / "adam-b128-s1" / "sharpness.json").read_text())
    assert len(drawn) == 4 * 6
    for entry in written["sharpness"]:
        row = drawn["adam-b128-s1", f"{names[entry['space']]}, ε = {entry['epsilon']:g}"]
        assert (row["x"], row["y"]) == (128, entry["phi"])
        assert float(row["epsilon"]) == entry["epsilon"]
        assert float(row["loss"]) == pytest.approx(entry["loss"], rel=1e-2)
    eigenvalues = [row for row in rows(plot, "residual") if row["runs"] == "adam-b128-s1"]
    assert [row["y"] for row in eigenvalues] == [written["hessian"]["max_eigenvalue"]]
    assert any("Loss of 1,000 of 1,437 training images, eval mode." in note for note in plot.notes)


def test_sharpness_that_few_runs_have(tmp_path):
    sweep = write_sweep(tmp_path / "sweep", (16, 32, 64), steps=3, landscape=True)
    (sweep / "b32-s0" / "sharpness.json").unlink()
    results = load_results(sweep)
    assert results.problems == results.runs[1].problems == []
    assert "Without sharpness.json: b32-s0." in sharpness_by_batch(results).notes


def test_phi_that_is_not_positive_is_named_not_drawn(tmp_path):
    sweep = write_sweep(tmp_path / "sweep", (16, 32), steps=3, landscape=True)
    path = sweep / "b16-s0" / "sharpness.json"
    content = json.loads(path.read_text())
    content["sharpness"][0]["phi"] = 0.0
    content["hessian"]["max_eigenvalue"] = -1.5
    path.write_text(json.dumps(content))
    plot = sharpness_by_batch(load_results(sweep))
    assert min(row["y"] for row in rows(plot, "max_loss")) > 0
    assert any(note.startswith("1 of 8 values of φ are not above 0") for note in plot.notes)
    assert min(row["y"] for row in rows(plot, "residual")) == -1.5


def test_the_mean_phi_of_several_subspaces_is_drawn(tmp_path):
    sweep = write_sweep(tmp_path / "sweep", (16, 32), steps=3, landscape=True)
    path = sweep / "b16-s0" / "sharpness.json"
    content = json.loads(path.read_text())
    other = dict(content["sharpness"][2], phi=content["sharpness"][2]["phi"] + 4, seed=1)
    content["sharpness"].append(other)
    path.write_text(json.dumps(content))
    drawn = [row["y"] for row in rows(sharpness_by_batch(load_results(sweep)), "max_loss") if row["x"] == 16]
    assert content["sharpness"][2]["phi"] + 2 in drawn


def test_curves_hold_the_values_of_the_files_and_mark_both_runs(results, sweep):
    from bokeh.models import Label, LogScale, Span

    plot = parametric_plots(results)
    assert len(plot.blocks) == 2
    written = json.loads((sweep / "curves" / "b16-s0--b512-s0.json").read_text())["curves"][0]
    drawn = rows(plot, "alpha")
    assert len(drawn) == 2 * 2 * 25
    mine = [row for row in drawn if row["alpha"] == 0.5]
    at = written["alpha"].index(0.5)
    assert mine[0]["train_loss"] == written["train_loss"][at]
    assert mine[0]["test_accuracy"] == 100 * written["test_accuracy"][at]
    assert {label.text for label in models(plot, Label)} == {
        "b16-s0",
        "b512-s0",
        "adam-b16-s0",
        "adam-b512-s0",
    }
    assert {span.location for span in models(plot, Span)} == {0.0, 1.0}
    # Losses from 0.02 to 2.4 read on a log axis.
    assert len(models(plot, LogScale)) == 4


def test_close_losses_are_drawn_on_a_linear_axis(tmp_path):
    from bokeh.models import LogScale

    sweep = write_sweep(tmp_path / "sweep", (16, 32), steps=3)
    path = write_curves(sweep, "b16-s0", "b32-s0")
    content = json.loads(path.read_text())
    for curve in content["curves"]:
        for name in ("train_loss", "test_loss"):
            curve[name] = [1 + value for value in curve[name]]
    path.write_text(json.dumps(content))
    assert not models(parametric_plots(load_results(sweep)), LogScale)


def test_more_pairs_than_fit_are_named(tmp_path):
    sweep = write_sweep(tmp_path / "sweep", (16, 32), steps=3)
    for index in range(MAX_PAIRS + 2):
        write_curves(sweep, f"a{index}", f"b{index}")
    plot = parametric_plots(load_results(sweep))
    assert len(plot.blocks) == MAX_PAIRS
    assert any(note == "Not drawn: a8 to b8, a9 to b9." for note in plot.notes)


def test_speed_holds_throughput_and_times(results, sweep):
    plot = speed_by_batch(results)
    written = json.loads((sweep / "b16-s2" / "summary.json").read_text())
    (rate,) = [row["y"] for row in rows(plot, "seconds") if row["runs"] == "b16-s2"]
    assert rate == written["images_per_second"]
    times = {row["name"]: row for row in rows(plot, "epochs") if row["runs"] == "b16-s2"}
    for target, reached in written["time_to_accuracy"].items():
        row = times[f"{100 * float(target):g} %"]
        assert row["y"] == reached["seconds"]
        assert row["steps"] == str(reached["steps"])


def test_targets_that_some_runs_never_reach_are_named(tmp_path):
    sweep = write_sweep(tmp_path / "sweep", (16, "full"), steps=3, methods=("sgd",))
    results = load_results(sweep)
    assert "Never reached: 95 % by bfull-s0. Means are of the other runs." in speed_by_batch(results).notes
    assert any(sentence.startswith("90 % test accuracy took") for sentence in findings(results))
    page = write_report(sweep).read_text()
    assert "90 % test<br>acc. (s)" in page
    assert "images<br>per s" in page


def test_every_figure_against_batch_size_has_intervals_over_seeds(results):
    for plot, measure, column in (
        (near_rank_by_batch(results), lambda run: run.sites["relu1#0"].near_rank, "near_rank"),
        (accuracy_by_batch(results), lambda run: 100 * run.test_accuracy, "batch"),
        (sharpness_by_batch(results), lambda run: run.sharpness.maxima[0].phi, "max_loss"),
        (sharpness_by_batch(results), lambda run: run.sharpness.eigenvalue, "residual"),
        (speed_by_batch(results), lambda run: run.images_per_second, "seconds"),
        (speed_by_batch(results), lambda run: run.time_to_accuracy[0.9].seconds, "epochs"),
    ):
        found = estimate([measure(run) for run in results.of("128 · adam")])
        bars = [(row["low"], row["high"]) for row in rows(plot, "bar_x")]
        assert any(bar == pytest.approx((found.lower, found.upper)) for bar in bars)
        means = [row for row in rows(plot, column) if row["y"] == pytest.approx(found.mean)]
        assert any("mean of 3 seeds, 95 % interval" in row["seed"] for row in means)
        assert any("(n = 3)" in note for note in plot.notes)


def test_one_seed_has_no_interval_anywhere(tmp_path):
    sweep = write_sweep(tmp_path / "sweep", (16, 32), steps=3, methods=("sgd",), landscape=True)
    results = load_results(sweep)
    for make in (near_rank_by_batch, accuracy_by_batch, sharpness_by_batch, speed_by_batch):
        plot = make(results)
        assert rows(plot, "bar_x") == []
        assert not any("95 %" in note for note in plot.notes)
    page = write_report(sweep).read_text()
    assert "mean of" not in page
    assert "one seed in common: no interval" in page


def test_mean_rows_of_the_table(page, results):
    row = re.search(r'<tr class="mean" data-label="128 · adam">(.*?)</tr>', page)[1]
    cells = re.findall(r"<td>(.*?)</td>", row)
    found = estimate([run.test_accuracy for run in results.of("128 · adam")])
    assert cells[:2] == ["128 · adam", "mean of 3"]
    assert cells[4] == f"{100 * found.mean:.1f}<small>± {100 * found.half:.1f}</small>"
    assert page.count('<tr class="mean"') == len(results.labels)


def test_findings_tell_differences_with_their_intervals(results):
    said = findings(results)
    first = [run.test_accuracy for run in results.of("16 · sgd")]
    last = [run.test_accuracy for run in results.of("512 · sgd")]
    change = estimate([100 * (b - a) for a, b in zip(first, last, strict=True)])
    text = f"difference −{-change.mean:.1f}, 95 % interval over 3 seeds"
    assert any(
        sentence.startswith("sgd: Between batch sizes 16 and 512") and text in sentence for sentence in said
    )
    assert any(
        "φ (full space, ε = 0.001) goes from" in sentence and "f(x) = " in sentence for sentence in said
    )
    curve = "On the straight line from b16-s0 to b512-s0 the train loss is largest at α = 0.50"
    assert any(sentence.startswith(curve) for sentence in said)
    assert not re.search(r"\b(cause|because|due to|leads? to|explains?)\b", " ".join(said))


def test_differences_that_seeds_do_not_show_are_called_so(tmp_path):
    sweep = write_sweep(tmp_path / "sweep", (16, 32), (0, 1, 2), steps=3)
    for size, values in ((16, (0.90, 0.95, 0.92)), (32, (0.95, 0.90, 0.93))):
        for seed, value in enumerate(values):
            path = sweep / f"b{size}-s{seed}" / "summary.json"
            content = json.loads(path.read_text())
            content["test_accuracy"], content["generalization_gap"] = value, 1 - value
            path.write_text(json.dumps(content))
    (sentence,) = [each for each in findings(load_results(sweep)) if "test accuracy goes" in each]
    assert sentence.count("no difference distinguishable at these seeds") == 2


def test_synthetic_images_are_said_in_the_lead(tmp_path):
    sweep = write_sweep(tmp_path / "sweep", (16, 32), steps=3, methods=("sgd",))
    for path in sweep.glob("*/summary.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"data": "procedural", "synthetic": True}))
    page = write_report(sweep).read_text()
    assert '<p class="lead">lenet5 on procedural (synthetic images): 2 batch sizes, 2 runs.</p>' in page
    assert "<dt>Data</dt><dd>procedural (synthetic images)</dd>" in page


def test_the_law_stands_beside_the_null(tmp_path):
    shapes = {"square#0": (64, 64), "tall#0": (64, 16)}
    run = write_run(tmp_path, 16, steps=3, sites=shapes)
    summary = json.loads((run / "summary.json").read_text())
    for site, null in zip(summary["sites"], (50, 16), strict=True):
        site["null_near_rank"] = null
    (run / "summary.json").write_text(json.dumps(summary | {"rtol": 0.25}))
    results = load_results(run)
    law = results.runs[0].sites["square#0"].law_near_rank
    assert 40 < law < 50
    row = next(row for row in rows(near_rank_by_batch(results), "law") if row["layer"] == "square#0")
    assert (row["null"], row["law"]) == ("50", f"{law:.1f}")
    (note,) = law_note(results)
    assert f"predicts the null of square#0 as {law:.1f}, counted were 50" in note


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deep") / "sweep"
    sites = {f"stage{index}.relu#0": (64, 16 << index % 3) for index in range(55)}
    return load_results(
        write_sweep(folder, (16, 64), (0, 1), steps=4, sites=sites, every_metric=False, wide_intervals=True)
    )


def test_many_layers_are_small_multiples(deep):
    from bokeh.models import Plot as Figure

    plot, _ = trajectories(deep)
    assert [len(block.fills[0]["cells"]) for block in plot.blocks] == [30, 25]
    assert len(models(plot, Figure)) == 2
    cells = [cell for block in plot.blocks for cell in block.fills[0]["cells"]]
    assert sorted(layer for layer, *_ in cells) == list(range(55))
    assert len({(left, bottom) for _, left, bottom in cells[:30]}) == 30
    # A line a batch size; the page puts the runs of its seeds into it.
    assert [fill["runs"] for fill in plot.blocks[0].fills] == [[0, 1], [2, 3]]
    # A printed page of A4 across has 888 pixels at the page's zoom, heading and caption included.
    assert all(block.height <= 700 for block in plot.blocks)


def test_many_layers_against_batch_size_are_small_multiples_with_intervals(deep):
    plot = near_rank_by_batch(deep)
    drawn = [row for row in rows(plot, "said") if row["layer"]]
    assert len(drawn) == 55 * 2
    row = next(row for row in drawn if row["layer"] == "stage7.relu#0" and row["batch"] == "64")
    sites = [run.sites["stage7.relu#0"] for run in deep.of("64")]
    assert row["said"] == f"{np.mean([site.near_rank / site.null_near_rank for site in sites]):.3f}"
    assert "mean of 2 seeds, 95 % interval" in row["seed"]
    assert sum(math.isnan(row["x"]) for row in rows(plot, "said")) == 55


def test_values_over_steps_are_packed_without_loss(deep):
    content = pack(deep)
    for place, run in enumerate(deep.runs):
        for layer, name in enumerate(deep.sites):
            values = unpacked(content, place, layer)
            expected = run.trajectories[name]
            for column in ("near_rank", "lower", "upper"):
                assert np.array_equal(values[column], getattr(expected, column))
            assert np.array_equal(values["step"], expected.steps)
            assert values["smaller"] == min(run.sites[name].probe_shape)


def test_the_comparison_holds_what_differs(results):
    data = compare_data(results)
    assert data["options"] == ["batch_size", "seed", "method"]
    first, last = (data["runs"][place] for place in data["start"])
    assert (first["name"], last["name"]) == ("b16-s0", "b512-s0")
    assert first["options"] == ["16", "0", "sgd"]
    numbers = dict(zip(data["numbers"], last["numbers"], strict=True))
    run = next(run for run in results.runs if run.name == "b512-s0")
    assert numbers["test accuracy (%)"] == pytest.approx(100 * run.test_accuracy, rel=1e-5)
    assert numbers["sharpness φ (full space, ε = 0.001)"] == pytest.approx(
        run.sharpness.maxima[0].phi, rel=1e-5
    )
    assert last["ratios"] == pytest.approx([run.sites[name].ratio for name in LENET], rel=1e-5)


def test_no_block_is_higher_than_a_printed_page(tmp_path):
    sweep = write_sweep(
        tmp_path / "sweep",
        (2, 4, 8, 16, 32, 64, 128, 256, 512),
        steps=2,
        sites=layers(MAX_SINGLE_PANELS),
        every_metric=False,
        methods=("sgd", "adam"),
    )
    results = load_results(sweep)
    for plot in (heat_maps(results), trajectories(results)[0], time_by_batch(results)):
        # A page has 888 pixels at the page's zoom; heading, key and caption take up to 180.
        assert all(block.height <= 700 for block in plot.blocks)


def test_one_run_has_nothing_to_be_compared_with(tmp_path):
    page = write_report(write_run(tmp_path, 16, steps=3)).read_text()
    assert 'id="compare"' not in page


def test_a_report_of_fifteen_runs_and_all_there_is_stays_small(tmp_path):
    sweep = write_sweep(
        tmp_path / "sweep",
        (16, 64, 256, 512, "full"),
        (0, 1, 2),
        steps=320,
        sites=layers(8),
        every_metric=False,
        wide_intervals=True,
        methods=("sgd",),
        landscape=True,
    )
    assert write_report(sweep).stat().st_size < 5_000_000
