"""Make the pictures of the pages from the report of a real sweep.

    python tests/report_picture.py runs/demo docs/report.png
    python tests/report_picture.py runs/study/SWEEP docs/study.png --figures batch sharpness curves

Needs the packages of the extras `lab` and `test`, Chromium and chromedriver. The picture is the report's top,
down to the figure of near-rank against batch size, or the figures named, one below the other; of 256 colours
where that keeps it under 300 kB.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from browser import browser, open_report, screenshot, why_no_browser

from bsgap_kernels.lab.report import ReportError, write_report

MAX_BYTES = 300_000
_BOX = """const box = document.getElementById(arguments[0]).getBoundingClientRect();
return [box.left, box.top, box.right, box.bottom];"""


def make_picture(directory: Path, picture: Path, figures: Sequence[str] = ()) -> int:
    """Write the report of `directory` and its picture; return the picture's size in bytes."""
    from PIL import Image

    report = write_report(directory)
    with browser() as driver:
        open_report(driver, report)
        boxes = [driver.execute_script(_BOX, f"figure-{name}") for name in figures or ["batch"]]
        picture.parent.mkdir(parents=True, exist_ok=True)
        screenshot(driver, picture, height=max(round(bottom) for *_, bottom in boxes) + 18)
    with Image.open(picture) as image:
        whole = image.convert("RGB")
    if figures:
        parts = [whole.crop(tuple(round(edge) for edge in box)) for box in boxes]
        whole = Image.new("RGB", (max(p.width for p in parts), sum(p.height for p in parts)), "white")
        for index, part in enumerate(parts):
            whole.paste(part, (0, sum(p.height for p in parts[:index])))
    whole.save(picture, optimize=True)
    if picture.stat().st_size >= MAX_BYTES:
        # Median cut, the default, leaves small areas no colours: the bright end of the ratio's scale is lost.
        few = whole.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few.save(picture, optimize=True)
    return picture.stat().st_size


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Picture of a report.")
    parser.add_argument("directory", type=Path, help="sweep directory")
    parser.add_argument("picture", type=Path, help="PNG to write")
    parser.add_argument("--figures", nargs="+", default=[], help="such as batch, accuracy, sharpness, curves")
    options = parser.parse_args()
    missing = why_no_browser()
    if missing:
        print(missing, file=sys.stderr)
        return 2
    try:
        size = make_picture(options.directory, options.picture, options.figures)
    except ReportError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{options.picture}: {size / 1000:.0f} kB")
    return 0 if size < MAX_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
