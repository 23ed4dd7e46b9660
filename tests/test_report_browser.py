"""The report in a real headless browser: it draws, stays silent, fetches nothing, answers the pointer."""

from __future__ import annotations

import pytest
from browser import browser, open_report, print_pdf, require_browser, screenshot
from report_fixtures import LENET, write_sweep
from report_page import canvases, logged, point_at, sources_of

pytest.importorskip("bokeh")
from bsgap_kernels.lab.report import write_report

FIGURES = ("heatmap", "batch", "trajectory", "accuracy", "time")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    sweep = write_sweep(tmp_path_factory.mktemp("browser") / "sweep", steps={16: 400, 128: 50, "full": 8})
    return write_report(sweep)


@pytest.fixture(scope="module")
def page(report):
    require_browser()
    with browser() as driver:
        open_report(driver, report)
        yield driver


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


def test_pointing_at_the_heat_map_tells_the_cell(page):
    text = point_at(page, "heatmap", 0.6, 0.45)
    for expected in ("layer", "relu", "step", "near-rank", "ratio", "certified interval", "512 ×"):
        assert expected in text


def test_pointing_at_the_time_tells_milliseconds(page):
    text = point_at(page, "time", 0.4, 0.5)
    assert "ms" in text
    assert "% of the step" in text


def test_the_axis_switch_moves_the_trajectories(page):
    labels = """return [...document.querySelectorAll("#figure-trajectory .block")].flatMap((block) => {
      const { item, axes } = JSON.parse(document.getElementById(block.dataset.block).textContent);
      const doc = Bokeh.documents.find((each) => each.get_model_by_id(item.root_id));
      return axes.map((id) => doc.get_model_by_id(id).axis_label);
    });"""
    for unit, end in (("step", 400), ("epoch", 20)):
        page.execute_script(f"document.querySelector('button[data-unit={unit}]').click()")
        shown = page.execute_script(labels)
        assert len(shown) == len(LENET)
        assert all(label.startswith(unit) for label in shown)
        ends = [max(fill["columns"]["x"]) for fill in sources_of(page, "trajectory")]
        assert max(ends) == pytest.approx(end)


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
