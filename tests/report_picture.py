"""Make the picture of the README: `python tests/report_picture.py runs/demo docs/report.png`.

Give it a real sweep. Needs the packages of the extras `lab` and `test`, Chromium and chromedriver. The
picture is cut below the figure of near-rank against batch size and reduced to 128 colours, which keeps
it under 300 kB.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from browser import browser, open_report, screenshot, why_no_browser

from bsgap_kernels.lab.report import ReportError, write_report

MAX_BYTES = 300_000


def make_picture(directory: Path, picture: Path) -> int:
    """Write the report of `directory` and its picture; return the picture's size in bytes."""
    from PIL import Image

    report = write_report(directory)
    with browser() as driver:
        open_report(driver, report)
        bottom = driver.execute_script(
            "return document.getElementById('figure-batch').getBoundingClientRect().bottom"
        )
        picture.parent.mkdir(parents=True, exist_ok=True)
        screenshot(driver, picture, height=round(bottom) + 18)
    with Image.open(picture) as image:
        whole = image.convert("RGB")
    whole.save(picture, optimize=True)
    if picture.stat().st_size >= MAX_BYTES:
        whole.quantize(256, dither=Image.Dither.NONE).save(picture, optimize=True)
    return picture.stat().st_size


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Picture of a report.")
    parser.add_argument("directory", type=Path, help="sweep directory")
    parser.add_argument("picture", type=Path, help="PNG to write")
    options = parser.parse_args()
    missing = why_no_browser()
    if missing:
        print(missing, file=sys.stderr)
        return 2
    try:
        size = make_picture(options.directory, options.picture)
    except ReportError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{options.picture}: {size / 1000:.0f} kB")
    return 0 if size < MAX_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
