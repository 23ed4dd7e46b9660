"""Writes the tables of docs/study.md and README.md from the committed study, between their marker comments.

python benchmarks/study_page.py            # rewrite both
python benchmarks/study_page.py --check    # exit code 1 if one differs from the result

The result is `bsgap study`'s: copy its study.json to benchmarks/results/ first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import marked

from bsgap_kernels.bench.machine import processor
from bsgap_kernels.lab.study.page import ends, layers, outcomes, verdicts
from bsgap_kernels.lab.study.plan import load_plan

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "study.json"
PAGE = ROOT / "docs" / "study.md"
README = ROOT / "README.md"


def about(result: dict[str, Any]) -> str:
    """How much was run, where and when, and of which plan."""
    machine, versions = processor(result), result["versions"]["torch"]
    runs, minutes = len(result["runs"]), result["seconds"] / 60
    return (
        f"{runs} runs in {minutes:.0f} minutes, two side by side on a thread each, {machine}, "
        f"torch {versions}, commit {result['commit'][:12]}. "
        f"SHA-256 of the plan: `{result['plan_sha256']}`."
    )


def written(result: dict[str, Any]) -> dict[Path, str]:
    """The pages with the result's tables in them.

    Raises:
        ValueError: the result is of another plan than the package's, or a page lacks a marker.
    """
    plan = load_plan()
    if result["plan_sha256"] != plan.sha256:
        raise ValueError(f"{RESULT.name} is of the plan {result['plan_sha256']}, plan.yaml is {plan.sha256}")
    page = marked.replaced(PAGE.read_text(encoding="utf-8"), "study-about", about(result))
    for name, table in (("verdicts", verdicts), ("outcomes", outcomes), ("layers", layers)):
        page = marked.replaced(page, f"study-{name}", table(plan, result))
    readme = marked.replaced(README.read_text(encoding="utf-8"), "study-ends", ends(plan, result))
    return {PAGE: page, README: readme}


if __name__ == "__main__":
    sys.exit(marked.write(written(json.loads(RESULT.read_text(encoding="utf-8"))), sys.argv[1:]))
