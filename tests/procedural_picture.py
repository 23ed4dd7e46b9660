"""Make the picture of the procedural set in docs/: `python tests/procedural_picture.py docs/procedural.png`.

A column a class, a row a difficulty, training images of seed 0. Where two difficulties show the same image,
it is what they make of the same random numbers. Reduced to 256 colours, which keeps it under 150 kB.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from bsgap_kernels.lab.config import ProceduralOptions
from bsgap_kernels.lab.data.procedural import contact_sheet

ROWS = {0.0: 1, 0.5: 1, ProceduralOptions().difficulty: 3, 1.0: 1, 1.5: 1}
"""How many rows of each difficulty, from the top."""
ENLARGED = 3
MAX_BYTES = 150_000


def make_picture(picture: Path) -> int:
    """Write the picture; return its size in bytes."""
    from PIL import Image

    sheets = [contact_sheet(ProceduralOptions(difficulty=level), rows) for level, rows in ROWS.items()]
    small = Image.fromarray(np.concatenate(sheets))
    large = small.quantize(256, dither=Image.Dither.NONE).resize(
        (small.width * ENLARGED, small.height * ENLARGED), Image.Resampling.NEAREST
    )
    picture.parent.mkdir(parents=True, exist_ok=True)
    large.save(picture, optimize=True)
    return picture.stat().st_size


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Picture of the procedural set.")
    parser.add_argument("picture", type=Path, help="PNG to write")
    size = make_picture(picture := parser.parse_args().picture)
    print(f"{picture}: {size / 1000:.0f} kB")
    return 0 if size < MAX_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
