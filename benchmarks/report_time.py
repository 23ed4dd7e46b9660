"""How long a report takes to write and to open, and how large it is.

    python benchmarks/report_time.py    # minutes; writes benchmarks/results/report_time.json

Needs the extras `lab` and `test`, Chromium and chromedriver. Each case is a sweep of invented numbers in the
schema of real ones (tests/report_fixtures.py); its report is opened in fresh headless browsers. Times are
milliseconds from the start of the navigation, medians of several openings: `first_paint_ms` (head, findings
and table), `load_ms`, `first_figure_ms` and `all_figures_ms` (drawn without anybody scrolling).
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from browser import browser, open_report, why_no_browser  # noqa: E402
from report_fixtures import write_sweep  # noqa: E402

from bsgap_kernels.bench.machine import describe  # noqa: E402
from bsgap_kernels.lab.report import write_report  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "report_time.json"
OPENINGS = 5
MANY = (16, 64, 256, 512, "full")
# (name, batch sizes, seeds, steps, layers)
CASES: tuple[tuple[str, tuple[int | str, ...], tuple[int, ...], int, int], ...] = (
    ("1 run x 10,000 steps x 55 layers", (128,), (0,), 10_000, 55),
    ("15 runs x 2,000 steps x 8 layers", MANY, (0, 1, 2), 2_000, 8),
    ("15 runs x 500 steps x 55 layers", MANY, (0, 1, 2), 500, 55),
)
_MARKS = """const paint = performance.getEntriesByName("first-contentful-paint")[0].startTime;
const load = performance.getEntriesByType("navigation")[0].loadEventEnd;
const drawn = performance.getEntriesByType("mark").filter((mark) => mark.name.startsWith("drawn "));
const times = drawn.map((mark) => mark.startTime);
return [paint, load, Math.min(...times), Math.max(...times)];"""
_TIMES = ("first_paint_ms", "load_ms", "first_figure_ms", "all_figures_ms")


def opening(report: Path) -> list[float]:
    """Times of one opening in a fresh browser, in the order of _TIMES."""
    with browser() as driver:
        open_report(driver, report)
        found: list[float] = driver.execute_script(_MARKS)
    return found


def measure(
    folder: Path, sizes: tuple[int | str, ...], seeds: tuple[int, ...], steps: int, layers: int
) -> dict[str, Any]:
    """Write a sweep and its report, open it several times."""
    sites = {f"stage{index}.relu#0": (512, max(1024 >> index // 12, 40)) for index in range(layers)}
    options: dict[str, Any] = {"steps": steps, "sites": sites, "every_metric": False, "wide_intervals": True}
    write_sweep(folder, sizes, seeds, methods=("sgd",), landscape=True, **options)
    started = time.perf_counter()
    report = write_report(folder)
    seconds = time.perf_counter() - started
    times = zip(*(opening(report) for _ in range(OPENINGS)), strict=True)
    medians = {name: round(statistics.median(each)) for name, each in zip(_TIMES, times, strict=True)}
    return {"write_s": round(seconds, 1), "megabytes": round(report.stat().st_size / 1e6, 2), **medians}


def main() -> int:
    """Measure every case and write the result file."""
    missing = why_no_browser()
    if missing:
        print(missing, file=sys.stderr)
        return 2
    cases = {}
    for name, *shape in CASES:
        with tempfile.TemporaryDirectory() as folder:
            cases[name] = measure(Path(folder) / "sweep", *shape)
        print(name, cases[name], flush=True)
    content = describe() | {"openings": OPENINGS, "cases": cases}
    RESULT.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
