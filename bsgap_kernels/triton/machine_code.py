"""Where a compiled kernel touches local memory, read off its machine code.

The size of a thread's stack frame says that words are spilled, not what that costs: a frame of a kilobyte may
belong to code that runs for one matrix in a million, eight bytes may stand in the innermost loop. So each
innermost loop of products is judged by what it moves and multiplies in one round.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# Bytes a clock and multiprocessor. Local memory lies in the first-level cache, which moves a line a clock;
# memory brings less than this to each (B200: 8 TB/s to 148 of them at 1.9 GHz is 28, H200 19, the others 14
# and less).
CACHE_RATE, MEMORY_RATE = 128, 32
# Float64 multiply-adds a clock and multiprocessor, by compute capability: without tensor cores (CUDA C++
# Programming Guide, throughput of native arithmetic instructions) and with them (A100 19.5, H200 67, B200 40
# TFLOP/s).
FLOAT64_RATE = {80: 32, 86: 2, 89: 2, 90: 64, 100: 64, 120: 2}
FLOAT64_TENSOR_RATE = {80: 64, 90: 128, 100: 64}

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z]\w*(?:\.\w+)*)\s*([^;]*);")
_LABEL = re.compile(r"^(\.L_x_\w+):", re.MULTILINE)
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


@dataclass(frozen=True)
class Loop:
    """One round of an innermost loop: bytes and float64 multiply-adds of a thread."""

    local_bytes: int  # spills, stored and loaded
    loaded_bytes: int  # from global memory
    float64_products: int
    float64_tensor_products: int
    multiplies: bool  # in any precision

    def spill_share(self, capability: int) -> float:
        """Time of the spills over the least time of the round, as if nothing ran beside anything else."""
        if not self.local_bytes:
            return 0.0
        least = max(
            self.loaded_bytes / MEMORY_RATE,
            self.float64_products / FLOAT64_RATE[capability],
            self.float64_tensor_products / FLOAT64_TENSOR_RATE.get(capability, FLOAT64_RATE[capability]),
        )
        return self.local_bytes / CACHE_RATE / least if least else float("inf")


def tool_output(tool: str, option: str, cubin: bytes) -> str:
    """What a tool that comes with triton prints about a binary."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        return subprocess.run(
            [str(path), option, file.name], capture_output=True, text=True, check=True
        ).stdout


def innermost_loops(text: str) -> list[Loop]:
    """The loops without a loop in them, of what `nvdisasm -c` prints."""
    code = [(int(m[1], 16), m[2].split("."), m[3]) for m in _INSTRUCTION.finditer(text)]
    labels = {}
    for label in _LABEL.finditer(text):
        following = _INSTRUCTION.search(text, label.end())
        if following is not None:
            labels[label[1]] = int(following[1], 16)
    spans = []
    for address, (operation, *_), operands in code:
        target = re.search(r"\.L_x_\w+", operands) if operation == "BRA" else None
        if target is not None and labels.get(target[0], address + 1) <= address:
            spans.append((labels[target[0]], address))
    inner = [s for s in spans if not any(s[0] <= t[0] and t[1] <= s[1] and s != t for t in spans)]
    return [_loop([words for address, words, _ in code if first <= address <= last]) for first, last in inner]


def _loop(instructions: list[list[str]]) -> Loop:
    moved: Counter[str] = Counter()
    tensor = 0
    for operation, *modifiers in instructions:
        moved[operation] += next((_BYTES[m] for m in modifiers if m in _BYTES), 4)
        if operation == "DMMA":  # of a warp, rows x columns x depth
            tensor += math.prod(map(int, modifiers[0].split("x"))) // 32
    operations = Counter(words[0] for words in instructions)
    return Loop(
        local_bytes=moved["LDL"] + moved["STL"],
        loaded_bytes=moved["LDG"] + moved["LDGSTS"],
        float64_products=operations["DFMA"],
        float64_tensor_products=tensor,
        multiplies=operations["DFMA"] > 0 or any("MMA" in name for name in operations),
    )
