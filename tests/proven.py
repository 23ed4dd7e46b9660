"""Which GPU kernels a test run has run or compiled without a GPU, how, and at what sizes.

Helpers of the tests that do so call `note`. The run ends with a table of all notes (conftest.py); a test
process started by another hands its notes on through the file that BSGAP_PROVEN_LOG names. With
BSGAP_PROVEN_JSON=FILE the table is written there as well, for docs/kernels.md.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

INTERPRETED = "Triton's interpreter"
HOST = "host harness"
RACES = "ThreadSanitizer"
ADDRESSES = "AddressSanitizer + UBSan"
COMPILED = "compiled ahead of time"
WAYS = (INTERPRETED, HOST, RACES, ADDRESSES, COMPILED)


@dataclass
class Note:
    """One kernel, proven one way: what of it was seen."""

    times: int = 0
    ranges: dict[str, tuple[int, int]] = field(default_factory=dict)
    values: dict[str, list[str]] = field(default_factory=dict)

    def add(self, times: int, facts: dict[str, Any]) -> None:
        """Widens ranges by numbers and (low, high) pairs, sets by strings and lists of strings."""
        self.times += times
        for name, fact in facts.items():
            if isinstance(fact, int):
                fact = (fact, fact)
            if isinstance(fact, tuple):
                low, high = self.ranges.get(name, fact)
                self.ranges[name] = (min(low, fact[0]), max(high, fact[1]))
            else:
                new = [fact] if isinstance(fact, str) else fact
                self.values[name] = sorted({*self.values.get(name, ()), *new})

    def __str__(self) -> str:
        """Facts in words."""
        ranges = [
            f"{name} {low}" if low == high else f"{name} {low}–{high}"
            for name, (low, high) in self.ranges.items()
        ]
        values = [f"{name} {', '.join(values)}" for name, values in self.values.items()]
        return "; ".join([f"{self.times} ×", *ranges, *values])


_notes: dict[tuple[str, str], Note] = {}


def note(kernel: str, way: str, times: int = 1, **facts: int | tuple[int, int] | str | list[str]) -> None:
    """Remembers that the kernel ran (or compiled) that way, and at what sizes."""
    _notes.setdefault((kernel, way), Note()).add(times, facts)


def note_program(stdout: str, way: str) -> list[str]:
    """Notes the launches that a driver printed, `kernel blocks threads` each; returns the kernels."""
    kernels = []
    for line in stdout.splitlines():
        kernel, blocks, threads = line.rsplit(maxsplit=2)
        note(kernel, way, blocks=int(blocks), threads=int(threads))
        kernels.append(kernel)
    return kernels


def watch_triton() -> None:
    """Notes every launch of a Triton kernel in this process, which interprets it."""
    from bsgap_kernels.triton import config, gram, probe

    run, launch_probe = gram.Prepared.run, probe._launch
    layouts = ("side, 16 bytes", "depth, 16 bytes", "depth", "any")

    def noted(call: gram.Prepared, *args: Any, **options: Any) -> None:
        run(call, *args, **options)
        for one in call.plan.launches:
            kernel = one.kernel
            rows = [row for row in call.plan.rows if row["layout"] // config.CODES == one.group]
            for row in rows:
                code = row["layout"] % config.CODES
                tile = config.TILES[code // config.CODE_LAYOUTS]
                note(
                    kernel,
                    INTERPRETED,
                    times=0,
                    sides=row["side"],
                    depths=row["outer"] * row["inner"],
                    splits=row["splits"],
                    tiles_a_side=-(-row["side"] // tile),
                    matrices=row["count"],
                    tiles=str(tile),
                    layouts=layouts[code % config.CODE_LAYOUTS],
                    dtypes=str(one.dtype).removeprefix("torch."),
                )
            note(kernel, INTERPRETED, rows=len(rows), blocks=one.items)

    def noted_probe(kernel: Any, grid: tuple[int, ...], *args: Any, **arguments: Any) -> None:
        launch_probe(kernel, grid, *args, **arguments)
        facts = {name: arguments[name] for name in ("side", "splits", "tiles") if name in arguments}
        note(kernel.__name__, INTERPRETED, blocks=math.prod(grid), **facts)

    gram.Prepared.run = noted  # type: ignore[method-assign]
    probe._launch = noted_probe


def begin() -> None:
    """Before the tests: the first process makes the file that the others write to."""
    if "BSGAP_PROVEN_LOG" not in os.environ:
        handle, path = tempfile.mkstemp(prefix="bsgap-proven-")
        os.close(handle)
        os.environ["BSGAP_PROVEN_LOG"] = path
        os.environ["BSGAP_PROVEN_OWNER"] = str(os.getpid())
    if os.environ.get("TRITON_INTERPRET") == "1":
        watch_triton()


def end() -> list[str]:
    """After the tests: lines of the table, or none in a process that another started."""
    path = Path(os.environ["BSGAP_PROVEN_LOG"])
    if os.environ["BSGAP_PROVEN_OWNER"] != str(os.getpid()):
        lines = [
            json.dumps({"kernel": kernel, "way": way, "times": found.times, **found.ranges, **found.values})
            for (kernel, way), found in _notes.items()
        ]
        # Unbuffered: workers end at once, and a buffer that is emptied in between would cut a line in two.
        with path.open("ab", buffering=0) as file:
            file.write("".join(f"{line}\n" for line in lines).encode())
        return []
    for line in path.read_text().splitlines():
        facts = json.loads(line)
        kernel, way, times = (facts.pop(name) for name in ("kernel", "way", "times"))
        pairs = {n: tuple(v) if isinstance(v[0], int) else v for n, v in facts.items()}
        note(kernel, way, times, **pairs)
    path.unlink()
    del os.environ["BSGAP_PROVEN_LOG"], os.environ["BSGAP_PROVEN_OWNER"]  # a process may run tests again
    target = os.environ.get("BSGAP_PROVEN_JSON")
    if target:
        rows = [{"kernel": k, "way": way, "seen": str(_notes[k, way])} for k, way in _ordered(_notes)]
        Path(target).write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    lines, before = [], ""
    for kernel, way in _ordered(_notes):
        lines += [kernel] if kernel != before else []
        lines.append(f"  {way + ':':26} {_notes[kernel, way]}")
        before = kernel
    return lines


def _ordered(notes: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return sorted(notes, key=lambda key: (key[0], WAYS.index(key[1])))
