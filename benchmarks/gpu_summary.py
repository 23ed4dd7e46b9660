"""Summary of a GPU check: summary.json from the steps and the tests' report, and a short table.

python benchmarks/gpu_summary.py DIR STEPS [KEY=VALUE ...]     # STEPS: lines of step, rc, seconds, limit
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

TIMED_OUT = (124, 137)
SKIPPED = -1


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The steps in the order in which they ran."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [
        {"step": step, "rc": int(rc), "seconds": int(seconds), "limit_s": int(limit)}
        for step, rc, seconds, limit in rows
    ]


def read_tests(path: Path) -> dict[str, Any] | None:
    """Numbers and names of failures from a JUnit file, or None where there is none that can be read."""
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError):
        return None
    cases = list(root.iter("testcase"))
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [c for c in cases if c.find("skipped") is not None]
    return {
        "run": len(cases) - len(skipped),
        "failed": len(failed),
        "skipped": len(skipped),
        "names_of_failed": [f"{c.get('classname')}::{c.get('name')}" for c in failed],
    }


def word(rc: int) -> str:
    """What became of a step."""
    if rc == SKIPPED:
        return "skipped"
    return "ok" if rc == 0 else "TIMED OUT" if rc in TIMED_OUT else f"FAILED ({rc})"


def main(arguments: Sequence[str]) -> int:
    """Writes DIR/summary.json and prints the table; 0 if no step failed, else 1."""
    folder, steps = Path(arguments[0]), read_steps(Path(arguments[1]))
    facts = dict(pair.split("=", 1) for pair in arguments[2:])
    tests = read_tests(folder / "junit.xml")
    summary = {"schema": 1, **facts, "steps": steps, "tests": tests}
    content = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
    (folder / "summary.json").write_text(content, encoding="utf-8")
    width = max((len(step["step"]) for step in steps), default=0)
    for step in steps:
        print(f"{step['step'].ljust(width)}  {step['seconds']:>4d} s  {word(step['rc'])}")
    if tests is not None:
        print(f"gpu tests: {tests['run']} run, {tests['failed']} failed, {tests['skipped']} skipped")
        for name in tests["names_of_failed"][:20]:
            print(f"  failed: {name}")
    return 1 if any(step["rc"] not in (0, SKIPPED) for step in steps) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
