"""The counts behind the prediction of the Gram stage in NOTES.md: ResNet-56's plan and the kernel's loops.

python benchmarks/gram_argument.py     # needs triton, no GPU; writes benchmarks/results/gram_argument.json
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton

from bsgap_kernels.triton.compiled import Variant, compile_variant
from bsgap_kernels.triton.config import SIDE_ALIGNED, TILES, gram_config
from bsgap_kernels.triton.plan import gram_plan
from bsgap_kernels.triton.table import describe

RESULT = Path(__file__).resolve().parent / "results" / "gram_argument.json"
BATCH, PROCESSORS, ARCHITECTURE = 8192, 132, 9
STAGES = ((32, 16, 19), (16, 32, 18), (8, 64, 18))  # ResNet-56: image side, channels, convolutions


def plan_of(shapes: list[tuple[int, int]]) -> dict[str, Any]:
    """Work items and partial sums of channels_last bfloat16 activations on an H200."""
    memory = torch.empty(max(m * n for m, n in shapes), dtype=torch.bfloat16)  # pages that nobody touches
    views = [describe(memory[: m * n].view(m, n), batch=True) for m, n in shapes]
    plan = gram_plan(
        [view for view in views if view is not None],
        precision="float32",
        features_side=False,
        sums=False,
        processors=PROCESSORS,
        architecture=ARCHITECTURE,
    )
    read = sum(2 * m * n for m, n in shapes)
    return {
        "items": [launch.items for launch in plan.launches],
        "bytes_read": read,
        "partial_sums_written_and_read": 2 * 8 * plan.partial_elements / read,
    }


def loops_of(tile: int) -> list[dict[str, int]]:
    """Instructions of each loop with tensor-core products, sm_90; what a flush runs now and then is in it."""
    variant = Variant("one", torch.bfloat16, "float32", 1 << 4 * TILES.index(tile))
    kernel = compile_variant(variant, 90)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        command = [str(tool), "-c", file.name]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    labels: dict[str, int] = {}
    instructions: list[str] = []
    found = []
    for line in lines:
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,5}\*/\s+(.*?);", line):
            instructions.append(re.sub(r"^@!?U?P\w+\s+", "", instruction[1].strip()))
            back = re.search(r"^BRA.*?(\.L_x_\d+)", instructions[-1])
            if back and back[1] in labels:
                count = Counter(re.split(r"[. ]", text)[0] for text in instructions[labels[back[1]] :])
                if count["HMMA"] or count["HGMMA"]:
                    names = ("LDG", "LDGSTS", "LDSM", "HMMA", "HGMMA")
                    found.append({"instructions": count.total(), **{name: count[name] for name in names}})
    return found


def main() -> None:
    """Writes the result."""
    layers = [(BATCH * side * side, channels) for side, channels, number in STAGES for _ in range(number)]
    config = gram_config("float32", 2, 64, False, ARCHITECTURE)
    result = {
        "triton": triton.__version__,
        "grouped": plan_of(layers),
        "by_layer": {f"{m}x{n}": plan_of([(m, n)]) for m, n in dict.fromkeys(layers)},
        "tiles": [
            {
                "tile": tile,
                "warps": config.num_warps,
                "block_bytes": 2 * tile * config.block_depth(tile, SIDE_ALIGNED),
                "loops": loops_of(tile),
            }
            for tile in TILES[:3]
        ],
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(RESULT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
