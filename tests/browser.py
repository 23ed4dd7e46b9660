"""A headless Chromium for the tests of the report and for the picture of the README."""

from __future__ import annotations

import base64
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    # A container's /dev/shm is often too small for a page's canvases.
    "--disable-dev-shm-usage",
)


def find_browser() -> str | None:
    """Path of a browser: BSGAP_TEST_BROWSER, else the first Chromium or Chrome on the path."""
    return os.environ.get("BSGAP_TEST_BROWSER") or next(filter(None, map(shutil.which, _NAMES)), None)


def why_no_browser() -> str | None:
    """What is missing for a browser test, or None."""
    if find_browser() is None:
        return f"no browser: none of {', '.join(_NAMES)} is on the path and BSGAP_TEST_BROWSER is not set"
    if shutil.which("chromedriver") is None:
        return "no chromedriver on the path (Debian: chromium-driver)"
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed (pip install 'bsgap_kernels[test]')"
    return None


def require_browser() -> None:
    """Skip a test where there is no browser; fail it under BSGAP_REQUIRE_BROWSER=1."""
    import pytest

    missing = why_no_browser()
    if missing and os.environ.get("BSGAP_REQUIRE_BROWSER") == "1":
        pytest.fail(f"BSGAP_REQUIRE_BROWSER=1, but {missing}")
    if missing:
        pytest.skip(missing)


@contextmanager
def browser(width: int = 1280, height: int = 900) -> Iterator[Any]:
    """A fresh headless browser; its console and its network requests are logged."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = find_browser() or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for option in (*_OPTIONS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
            options.add_argument(option)
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        driver.console, driver.requests = [], []
        try:
            yield driver
        finally:
            driver.quit()


def open_report(driver: Any, path: Path) -> None:
    """Open a report and wait until every figure is drawn, those far below the window too."""
    driver.get(path.resolve().as_uri())
    wait_until_drawn(driver)


def wait_until_drawn(driver: Any) -> None:
    """Wait until every block of a report's figures is drawn and holds its values."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 120).until(
        lambda page: page.execute_script(
            "return !window.Bokeh || (Bokeh.documents.every((each) => each.is_idle) && "
            "[...document.querySelectorAll('.block')].every((block) => block.dataset.drawn === 'true'))"
        )
    )


def screenshot(driver: Any, path: Path, *, height: int | None = None) -> None:
    """Write a PNG of the page from its top: `height` pixels of it, or the whole."""
    size = driver.execute_script(
        "return [document.documentElement.clientWidth, document.documentElement.scrollHeight]"
    )
    clip = {"x": 0, "y": 0, "width": size[0], "height": min(height or size[1], size[1]), "scale": 1}
    answer = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    path.write_bytes(base64.b64decode(answer["data"]))


def print_pdf(driver: Any, path: Path) -> None:
    """Write the page as it would be printed."""
    answer = driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": False, "preferCSSPageSize": True})
    path.write_bytes(base64.b64decode(answer["data"]))
