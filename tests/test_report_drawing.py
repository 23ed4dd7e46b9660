"""The report's newer figures, its comparison, its late drawing and its printing, in a real browser."""

from __future__ import annotations

import json
import re
import subprocess
from contextlib import contextmanager

import numpy as np
import pytest
from browser import browser, find_browser, open_report, print_pdf, require_browser, wait_until_drawn
from report_fixtures import LENET, write_sweep
from report_page import canvases, logged, point_at_color, sources_of

pytest.importorskip("bokeh")
from bsgap_kernels.lab.report import write_report
from bsgap_kernels.lab.report.data import load_results
from bsgap_kernels.lab.report.style import LAYER_COLORS, TRAIN

FIGURES = ("heatmap", "batch", "trajectory", "accuracy", "time", "speed", "sharpness", "curves")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawing") / "sweep"
    return write_sweep(folder, (16, 128, "full"), (0, 1), steps=60, methods=("sgd",), landscape=True)


@pytest.fixture(scope="module")
def report(sweep):
    return write_report(sweep)


@pytest.fixture(scope="module")
def page(report):
    require_browser()
    with browser() as driver:
        open_report(driver, report)
        yield driver


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A report of 55 layers: (directory, page)."""
    folder = tmp_path_factory.mktemp("deep") / "sweep"
    sites = {f"stage{index}.relu#0": (64, 16 << index % 3) for index in range(55)}
    options = {"steps": 40, "sites": sites, "every_metric": False, "wide_intervals": True}
    write_sweep(folder, (16, 64), (0, 1), **options)
    return folder, write_report(folder)


@contextmanager
def held_back(path):
    """A report in a browser that is never idle: what is drawn was asked for."""
    require_browser()
    with browser() as driver:
        source = "window.requestIdleCallback = () => 0; window.print = () => { window.printed = true; };"
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": source})
        driver.get(path.resolve().as_uri())
        yield driver


def wait_for(page, script):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(page, 60).until(lambda driver: driver.execute_script(f"return {script}"))


def drawn_blocks(page):
    return page.execute_script(
        "return [...document.querySelectorAll('.block[data-drawn]')].map((block) => block.id)"
    )


def images_of(pdf):
    """How many pictures a PDF holds: every canvas that is not blank is some."""
    return pdf.read_bytes().count(b"/Subtype /Image")


@pytest.mark.parametrize("figure", FIGURES)
def test_every_figure_is_drawn(page, figure):
    drawn = [canvas for canvas in canvases(page, figure) if canvas[0] > 100 and canvas[1] > 100]
    panels = {"heatmap": 3, "trajectory": 4, "curves": 4}.get(figure, 2)
    assert len([colours for _, _, colours in drawn if colours > 20]) >= panels


def test_pointing_at_sharpness_tells_epsilon_and_train_loss(page):
    text = point_at_color(page, "sharpness", LAYER_COLORS[0])
    for expected in ("full space, ε = 0.001", "train loss f(x)", "95 % interval", "dimensions", "61,706"):
        assert expected in text
    assert "@" not in text


def test_pointing_at_a_curve_tells_losses_and_accuracies(page):
    text = point_at_color(page, "curves", TRAIN, size=7)
    for expected in ("α", "train loss", "test loss", "train accuracy", "%"):
        assert expected in text


def test_pointing_at_the_speed_tells_updates_and_runs(page):
    text = point_at_color(page, "speed", LAYER_COLORS[1])
    for expected in ("90 %", " s (mean of 2 seeds", "updates", "epochs", "run", "-s0"):
        assert expected in text


def test_pointing_at_near_rank_tells_null_and_law(page):
    text = point_at_color(page, "batch", LAYER_COLORS[0])
    assert re.search(r"Gaussian null:?\s*512 \(Marchenko–Pastur law: 512\.0\)", text)


def test_pointing_at_a_small_panel_tells_its_layer(page, deep, report):
    open_report(page, deep[1])
    text = point_at_color(page, "batch", LAYER_COLORS[0], size=6)
    assert "stage" in text
    assert "95 % interval" in text
    open_report(page, report)


def test_the_comparison_shows_the_pair_that_is_chosen(page, sweep):
    from selenium.webdriver.support.ui import Select

    def text(name):
        return page.execute_script(f"return document.getElementById('compare-{name}').innerText")

    def pick(name, value):
        Select(page.find_element("id", f"compare-{name}")).select_by_visible_text(value)

    runs = {run.name: run for run in load_results(sweep).runs}
    for first, last, layer in (("b16-s0", "bfull-s0", "relu1#0"), ("b128-s1", "b16-s1", "relu3#0")):
        pick("a", first)
        pick("b", last)
        pick("layer", layer)
        assert text("chosen") == f"A: {first}, B: {last}"
        a, b = runs[first], runs[last]
        assert "batch_size" in text("options")
        assert ("seed" in text("options")) == (a.seed != b.seed)
        row = next(line for line in text("numbers").splitlines() if line.startswith("test accuracy"))
        shown = [float(cell.replace("−", "-")) for cell in row.split("\t")[1:]]
        change = 100 * (b.test_accuracy - a.test_accuracy)
        assert shown == pytest.approx([100 * a.test_accuracy, 100 * b.test_accuracy, change], rel=1e-2)
        assert f"Near-rank of {layer} on the probe" in text("lines")
        lines, bars = page.execute_script(
            """const all = (name) => [...document.querySelectorAll(name)];
            return [all("path.trajectory").map((path) => path.getAttribute("d").split(/[ML]/).length - 1),
              all("rect.change").map((bar) => bar.textContent)];"""
        )
        assert lines == [61, 61]
        assert len(bars) == len(LENET)
        wanted = b.sites[layer].ratio - a.sites[layer].ratio
        told = next(bar for bar in bars if bar.startswith(layer)).rsplit("B − A ", 1)[1]
        assert float(told.replace("−", "-")) == pytest.approx(wanted, rel=1e-3)


def test_nothing_is_fetched_and_the_console_is_silent(page):
    console, requests = logged(page)
    assert [entry for entry in console if entry["level"] in ("WARNING", "SEVERE")] == []
    assert [url for url in requests if not url.startswith(("data:", "blob:", "file:"))] == []
    assert page.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_figures_hold_the_rows_of_the_files(page, sweep):
    """The values over steps, through their packing and out of the page again."""
    written = {}
    for line in (sweep / "b128-s1" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        written[row["site"], row["metric"], row["step"]] = row["value"]
    lines = [fill for fill in sources_of(page, "trajectory") if "128, seed 1" in fill["columns"]["run"]]
    assert len(lines) == len(LENET)
    for fill, site in zip(lines, LENET, strict=True):
        columns = fill["columns"]
        assert columns["step"] == list(range(61))
        for name in ("near_rank", "lower", "upper", "ratio"):
            expected = [written[site, f"probe.{name}", step] for step in range(61)]
            assert columns[name] == pytest.approx(expected)
    heat = next(fill["columns"] for fill in sources_of(page, "heatmap") if fill["run"] == 2)
    assert heat["row"] == [row for row in range(len(LENET)) for _ in range(61)]
    assert heat["layer"][-1] == "relu4#0, probe 512 × 84"
    assert (heat["left"][:2], heat["right"][60]) == ([0, 0.5], 60)


def test_small_panels_hold_the_rows_of_the_files_where_they_belong(page, deep):
    folder, path = deep
    open_report(page, path)
    for unit, end in (("epoch", 20), ("step", 40)):
        page.execute_script(f"document.querySelector('button[data-unit={unit}]').click()")
        (first, _, third, _) = sources_of(page, "trajectory")
        run = load_results(folder).runs[0]
        cells = first["cells"] + third["cells"]
        columns = {name: first["columns"][name] + third["columns"][name] for name in first["columns"]}
        assert len(cells) == 55
        # A row without values parts the runs and the panels: two seeds, 41 steps, one gap each.
        assert len(columns["x"]) == 55 * 2 * 42
        for place, (layer, left, bottom) in enumerate(cells):
            rows = slice(84 * place, 84 * place + 41)
            trajectory = run.trajectories[f"stage{layer}.relu#0"]
            share = np.arange(41) / 40
            assert columns["near_rank"][rows] == trajectory.near_rank.tolist()
            assert columns["x"][rows] == pytest.approx((left + first["width"] * share).tolist())
            assert columns["y"][rows] == pytest.approx((bottom - first["height"] * trajectory.ratio).tolist())
            assert columns["x"][rows.stop] is None
        shown = page.execute_script(
            """const block = document.querySelector("#figure-trajectory .block");
            const { item, ticks } = JSON.parse(document.getElementById(block.dataset.block).textContent);
            const doc = Bokeh.documents.find((each) => each.get_model_by_id(item.root_id));
            return Object.fromEntries(Object.entries(ticks).map(([unit, ids]) => [unit,
              ids.map((id) => doc.get_model_by_id(id)).filter((text) => text.visible)
                .flatMap((text) => [...text.data_source.data.text])]));"""
        )
        assert [name for name, texts in shown.items() if texts] == [unit]
        assert any(text.startswith(unit) for text in shown[unit])
        assert str(end) in shown[unit]


def test_figures_are_drawn_when_they_come_near(deep):
    with held_back(deep[1]) as page:
        assert page.execute_script("return window.scrollY") == 0
        below = "document.querySelector('#figure-accuracy .block')"
        page.execute_script(f"{below}.scrollIntoView()")
        wait_for(page, f"{below}.dataset.drawn === 'true'")
        # What is above was never near the window.
        assert "block-heatmap-0" not in drawn_blocks(page)
        page.execute_script("document.querySelector('#figure-heatmap .block').scrollIntoView()")
        wait_for(page, "document.querySelector('#figure-heatmap .block').dataset.drawn === 'true'")


def test_the_switch_moves_figures_that_are_drawn_after_it(report):
    with held_back(report) as page:
        wait_for(page, "!!document.querySelector('button[data-unit=epoch]')")
        assert "block-trajectory-0" not in drawn_blocks(page)
        page.execute_script("document.querySelector('button[data-unit=epoch]').click()")
        page.execute_script("document.querySelector('#figure-trajectory .block').scrollIntoView()")
        wait_for(page, "document.querySelector('#figure-trajectory .block').dataset.drawn === 'true'")
        assert max(max(fill["columns"]["x"]) for fill in sources_of(page, "trajectory")) == pytest.approx(20)


def test_the_print_shortcut_waits_until_all_is_drawn(report):
    with held_back(report) as page:
        wait_for(page, "document.readyState === 'complete'")
        assert len(drawn_blocks(page)) < len(FIGURES)
        keys = "{ key: 'p', ctrlKey: true, cancelable: true }"
        page.execute_script(f"window.dispatchEvent(new KeyboardEvent('keydown', {keys}))")
        wait_for(page, "window.printed === true")
        assert len(drawn_blocks(page)) == len(FIGURES)


def test_printing_draws_what_is_not_drawn(report, tmp_path):
    with held_back(report) as page:
        wait_for(page, "document.readyState === 'complete'")
        assert len(drawn_blocks(page)) < len(FIGURES)
        print_pdf(page, tmp_path / "early.pdf")
        wait_until_drawn(page)
        print_pdf(page, tmp_path / "late.pdf")
        assert images_of(tmp_path / "late.pdf") > 20 > images_of(tmp_path / "early.pdf")


def test_a_browser_without_a_window_prints_every_figure(report, tmp_path):
    require_browser()
    pdf = tmp_path / "report.pdf"
    command = [find_browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--print-to-pdf={pdf}", report.resolve().as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert images_of(pdf) > 20


@pytest.mark.parametrize("kind", ["few layers", "many layers"])
def test_it_prints_on_a4_without_cut_figures(page, report, deep, tmp_path, kind):
    open_report(page, report if kind == "few layers" else deep[1])
    print_pdf(page, tmp_path / "report.pdf")
    content = (tmp_path / "report.pdf").read_bytes()
    sizes = {
        tuple(round(float(number)) for number in match.split())
        for match in re.findall(rb"/MediaBox \[([\d. ]+)\]", content)
    }
    # A4 across in points.
    assert sizes == {(0, 0, 842, 595)}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        heights, menus, chosen = page.execute_script(
            """const all = (name) => [...document.querySelectorAll(name)];
            const height = (node) => node.getBoundingClientRect().height;
            return [all(".whole, .drawing").map(height), all(".switch, .menus").map(height),
              document.getElementById("compare-chosen").innerText];"""
        )
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    # 188 mm between the margins, 96 pixels an inch.
    assert max(heights) < 188 / 25.4 * 96
    assert set(menus) == {0}
    assert chosen.startswith("A: b16-s0, B: b")


def test_without_javascript_the_page_says_what_is_missing(report):
    text = report.read_text()
    assert re.search(r"<noscript><p class=\"notice\">The figures and the comparison need JavaScript", text)
