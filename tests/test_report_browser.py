"""The report in a real headless browser: it draws, stays silent, fetches nothing, answers the pointer."""

from __future__ import annotations

import itertools
import json
import os

import pytest
from browser import browser, open_report, print_pdf, screenshot, why_no_browser
from report_fixtures import write_sweep

pytest.importorskip("bokeh")
from bsgap_kernels.lab.report import write_report

FIGURES = ("heatmap", "batch", "trajectory", "accuracy", "time")
# Bokeh draws in shadow trees: everything below `root`, through them.
DEEP = """const deep = (root) => [...root.querySelectorAll("*")].flatMap(
  (node) => [node, ...(node.shadowRoot ? deep(node.shadowRoot) : [])]);"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    sweep = write_sweep(tmp_path_factory.mktemp("browser") / "sweep", steps={16: 400, 128: 50, "full": 8})
    return write_report(sweep)


@pytest.fixture(scope="module")
def page(report):
    missing = why_no_browser()
    if missing and os.environ.get("BSGAP_REQUIRE_BROWSER") == "1":
        pytest.fail(f"BSGAP_REQUIRE_BROWSER=1, but {missing}")
    if missing:
        pytest.skip(missing)
    with browser() as driver:
        driver.console = []
        driver.requests = []
        open_report(driver, report)
        yield driver


def logged(page):
    """Console messages, and the addresses that pages on disk requested, since the browser started."""
    page.console += page.get_log("browser")
    for entry in page.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        # The browser's own first tab requests chrome:// addresses; they are not the report's.
        asked = message["method"] == "Network.requestWillBeSent"
        if asked and message["params"]["documentURL"].startswith("file:"):
            page.requests.append(message["params"]["request"]["url"])
    return page.console, page.requests


def canvases(page, figure):
    """(width, height, number of colours among sampled pixels) of every canvas of a figure."""
    return page.execute_script(
        DEEP
        + """const nodes = deep(document.getElementById(arguments[0]));
        return nodes.filter((node) => node.tagName === "CANVAS").map((canvas) => {
          const box = canvas.getBoundingClientRect();
          const copy = document.createElement("canvas");
          copy.width = canvas.width; copy.height = canvas.height;
          const context = copy.getContext("2d");
          context.drawImage(canvas, 0, 0);
          const pixels = new Uint32Array(context.getImageData(0, 0, copy.width, copy.height).data.buffer);
          return [box.width, box.height, new Set(pixels).size];
        });""",
        f"figure-{figure}",
    )


@pytest.mark.parametrize("figure", FIGURES)
def test_every_figure_is_drawn(page, figure):
    drawn = [canvas for canvas in canvases(page, figure) if canvas[0] > 100 and canvas[1] > 100]
    expected = {"heatmap": 3, "batch": 2, "trajectory": 4, "accuracy": 2, "time": 2}[figure]
    # A blank canvas has one or two colours, a drawn figure its lines, text and their edges.
    assert len([colours for _, _, colours in drawn if colours > 20]) >= expected


def test_nothing_is_fetched_and_the_console_is_silent(page, report):
    console, requests = logged(page)
    assert [entry for entry in console if entry["level"] in ("WARNING", "SEVERE")] == []
    outside = [url for url in requests if not url.startswith(("data:", "blob:"))]
    assert outside == [report.resolve().as_uri()]
    assert page.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_the_page_fits_a_laptop(page):
    inner, scroll = page.execute_script("return [window.innerWidth, document.documentElement.scrollWidth]")
    assert scroll <= inner == 1280


def point_at(page, figure, across, down):
    """Move the pointer to a fraction of a figure's first canvas; the text of the tooltips that show."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.support.ui import WebDriverWait

    nudges = itertools.cycle((0, -0.1, 0.1))

    def text_after_moving(driver):
        # Moved anew at every look, and a little up and down: a page may not listen yet, and Bokeh's releases
        # differ by some pixels in where a bar ends.
        box = driver.execute_script(
            DEEP
            + """const nodes = deep(document.getElementById(arguments[0]));
            const canvas = nodes.find((node) => node.tagName === "CANVAS");
            canvas.scrollIntoView({block: "center"});
            const box = canvas.getBoundingClientRect();
            return [box.left, box.top, box.width, box.height];""",
            f"figure-{figure}",
        )
        x, y = round(box[0] + across * box[2]), round(box[1] + (down + next(nudges)) * box[3])
        move = ActionChains(driver)
        move.w3c_actions.pointer_action.move_to_location(x - 3, y)
        move.w3c_actions.pointer_action.move_to_location(x, y)
        move.perform()
        return driver.execute_script(
            DEEP
            + """const shown = (node) => node.classList.contains("bk-Tooltip") &&
            node.getBoundingClientRect().height;
            const said = (node) => !node.children.length && node.tagName !== "STYLE";
            return deep(document.body).filter(shown).flatMap((node) => deep(node.shadowRoot).filter(said))
              .map((node) => node.textContent).join(" ")"""
        )

    return WebDriverWait(page, 60).until(text_after_moving)


def test_pointing_at_the_heat_map_tells_the_cell(page):
    text = point_at(page, "heatmap", 0.6, 0.45)
    for expected in ("layer", "relu", "step", "near-rank", "ratio", "certified interval", "512 ×"):
        assert expected in text


def test_pointing_at_the_time_tells_milliseconds(page):
    text = point_at(page, "time", 0.4, 0.5)
    assert "ms" in text
    assert "% of the step" in text


def test_the_axis_switch_moves_the_trajectories(page):
    labels = "return JSON.parse(document.getElementById('switch-options').textContent).axes.map("
    labels += "(id) => Bokeh.documents[0].get_model_by_id(id).axis_label)"
    ends = "return Math.max(...JSON.parse(document.getElementById('switch-options').textContent).sources.map("
    ends += "(id) => Math.max(...Bokeh.documents[0].get_model_by_id(id).data.x)))"
    for unit, end in (("step", 400), ("epoch", 20)):
        page.execute_script(f"document.querySelector('button[data-unit={unit}]').click()")
        assert all(label.startswith(unit) for label in page.execute_script(labels))
        assert page.execute_script(ends) == pytest.approx(end)


def test_a_hostile_layer_name_stays_text(page, tmp_path):
    name = "</script><script>window.attacked = 1</script><img src=x onerror='window.attacked=1'>$$x$$#0"
    sweep = write_sweep(tmp_path / "sweep", (16, 32), steps=5, sites={name: (64, 32)})
    open_report(page, write_report(sweep))
    point_at(page, "heatmap", 0.6, 0.4)
    assert page.execute_script("return window.attacked") is None
    _, requests = logged(page)
    assert [url for url in requests if not url.startswith(("data:", "blob:", "file:"))] == []


def test_it_prints(page, report, tmp_path):
    open_report(page, report)
    print_pdf(page, tmp_path / "report.pdf")
    screenshot(page, tmp_path / "report.png")
    content = (tmp_path / "report.pdf").read_bytes()
    pages = content.count(b"/Type /Page\n") + content.count(b"/Type /Page ")
    assert 3 <= pages <= 6
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
