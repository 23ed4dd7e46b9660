"""Every method of the lab on the digits beside plain SGD at a small and a large batch, and its mechanism.

python benchmarks/methods.py --out DIR    # run (about an hour, two side by side), write results/methods.json
python benchmarks/methods.py --render     # write the tables of docs/methods.md from the committed result
python benchmarks/methods.py --check      # exit code 1 if the page differs from it

Stopped, the same command goes on in DIR. Learning rates of plain SGD, Adam, LARS and LAMB are chosen of a
grid by the training loss of one run a rate, on a seed that no comparison uses, among those below the edge of
what trains (`chosen`); LEGW takes that of the small batch, other methods at batch 256 that of plain SGD
there, full-batch ones and AutoWU their sources'.
Mechanisms are what the tests that check them say they found.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import marked
from method_claims import CLAIMS, Cases, Claim, accuracies, difference, relative_cost, verdict

from bsgap_kernels.bench.machine import describe, processor
from bsgap_kernels.lab.comparison import cells_of, compare, mean_of
from bsgap_kernels.lab.config import SweepConfig
from bsgap_kernels.lab.report.statistics import Estimate, estimate
from bsgap_kernels.lab.sweep import sweep

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "methods.json"
PAGE = ROOT / "docs" / "methods.md"
SEEDS = "0,1,2"
PILOT_SEED = 1000
TRAINED = 0.99
"""Training accuracy from which a rate of the pilot counts as one that trains."""
SHARED: dict[str, Any] = {
    "base_batch_size": 16, "every": None, "max_probes": 25, "max_evaluations": 10, "threads": 1,
}  # fmt: skip
AT_256 = (
    "sgd", "adam", "lars", "lamb", "legw", "autowu", "conadv", "disadv", "random-sign",
    "decentlam", "dmsgd", "dsgd", "pmsgd", "rank-reg", "rank-control",
)  # fmt: skip
WITH_SGDS_RATE = AT_256[6:]
CASES: dict[str, dict[str, Any]] = {
    "batch 256": {"model": "lenet5", "methods": AT_256, "batch_sizes": "256", "reference": 16, "epochs": 60},
    "full batch": {
        "model": "lenet5", "methods": ("sgd", "fb", "fb-long", "fb-clip", "fb-reg", "fb-strong"),
        "batch_sizes": "full", "steps": 300,
    },
    "lstm": {
        "model": "lstm", "methods": ("sgd", "legw"), "batch_sizes": "256", "reference": 16, "epochs": 30,
    },
    "overdetermined": {
        "model": "mlp", "methods": ("sgd", "subset"), "batch_sizes": "256", "reference": 16, "epochs": 60,
    },
}  # fmt: skip
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "batch 256": {
        "sgd@16": (0.0025, 0.005, 0.01, 0.02),
        "sgd@256": (0.01, 0.02, 0.04, 0.08),
        "adam@256": (0.0005, 0.001, 0.002, 0.004),
        "lars@256": (1.0, 2.0, 4.0, 8.0),
        "lamb@256": (0.003, 0.01, 0.03, 0.1),
    },
    "full batch": {"sgd@full": (0.01, 0.03, 0.1)},
    "lstm": {"sgd@16": (0.01, 0.03, 0.1, 0.3), "sgd@256": (0.03, 0.1, 0.3, 1.0)},
    "overdetermined": {"sgd@16": (0.01, 0.03, 0.1), "sgd@256": (0.03, 0.1, 0.3)},
}
"""Learning rates that are tried of a method at a batch size."""


def pilot(out: Path) -> list[dict[str, Any]]:
    """One run of every rate of the grids."""
    found = []
    for case, grids in GRIDS.items():
        for cell, rates in grids.items():
            method, _, size = cell.partition("@")
            for rate in rates:
                shared = {**CASES[case], "methods": method, "batch_sizes": size, "reference": None}
                config = SweepConfig(**SHARED, **shared, probe_every=None, seeds=PILOT_SEED, lr=rate)
                (summary,) = sweep(config, out / "pilot" / case.replace(" ", "-") / f"{cell}-{rate:g}")
                kept = {name: summary[name] for name in ("train_loss", "train_accuracy", "test_accuracy")}
                found.append({"case": case, "cell": cell, "lr": rate, **kept})
    return found


def chosen(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By case and cell the rate of the lowest training loss of those whose next larger one trains too.

    At the edge of what trains, some seeds end in dead layers, and more of a method that adds to the loss.
    """
    grids: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: float(run["lr"])):
        grids.setdefault((run["case"], run["cell"]), []).append(run)
    rates: dict[str, dict[str, float]] = {case: {} for case in CASES}
    for (case, cell), tried in grids.items():
        safe = [run for run, larger in pairwise(tried) if (larger["train_accuracy"] or 0) >= TRAINED]
        rates[case][cell] = min(safe, key=lambda run: float(run["train_loss"]))["lr"]
    for case, found in rates.items():
        methods = CASES[case]["methods"]
        if "legw" in methods:
            found["legw"] = found["sgd@16"]
        found |= {method: found["sgd@256"] for method in (*WITH_SGDS_RATE, "subset") if method in methods}
    return rates


def run(out: Path) -> dict[str, Any]:
    """Pilot, comparisons and mechanisms."""
    started = time.perf_counter()
    tried = pilot(out)
    rates = chosen(tried)
    cases = {}
    for case, options in CASES.items():
        directory = out / case.replace(" ", "-")
        config = SweepConfig(
            **SHARED, **options, seeds=SEEDS, lrs=rates[case], jobs=2, sharpness=True, sharpness_images=500
        )
        cases[case] = compare(sweep(config, directory), directory)
    return {
        **describe(),
        "seconds": round(time.perf_counter() - started),
        "pilot": tried,
        "rates": rates,
        "cases": cases,
        "mechanisms": mechanisms(),
    }


def mechanisms() -> dict[str, list[str]]:
    """By method what the tests of its mechanism found; they have to pass."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        tests = sorted(str(path) for path in (ROOT / "tests").glob("test_lab_method_*.py"))
        tests += [
            str(ROOT / "tests" / f"test_lab_{name}.py") for name in ("finite_difference", "rank_penalty")
        ]
        command = [sys.executable, "-m", "pytest", "-q", *tests, f"--junitxml={report}"]
        subprocess.run([*command, "-o", "junit_family=xunit1"], cwd=ROOT, check=True)
        properties = ElementTree.parse(report).getroot().iter("property")
    found: dict[str, list[str]] = {}
    for entry in properties:
        word, *methods = entry.attrib["name"].split()
        for method in methods if word == "mechanism" else ():
            found.setdefault(method, []).append(entry.attrib["value"])
    return found


def percent(found: Estimate | None, *, sign: bool = False) -> str:
    """A mean in percent and half its interval."""
    if found is None:
        return "–"
    text = f"{100 * found.mean:+.1f}" if sign else f"{100 * found.mean:.1f}"
    return (text if not found.half else f"{text} ± {100 * found.half:.1f}").replace("-", "−")


def main_table(result: Mapping[str, Any]) -> str:
    """Method, mechanism, accuracy beside plain SGD's, and whether the claim showed."""
    cases: Cases = result["cases"]
    lines = [
        "| method | its mechanism, as its tests found it | test acc. | SGD, small | SGD, large | claim | "
        "difference | showed |",
        "|---|---|--:|--:|--:|---|--:|---|",
    ]
    told: set[str] = set()
    for claim in CLAIMS:
        mechanism = "" if claim.method in told else "; ".join(result["mechanisms"][claim.method])
        told.add(claim.method)
        own, small, large = (
            percent(estimate(list(accuracies(cases, cell).values())))
            for cell in (claim.cell, claim.small, claim.large)
        )
        found = difference(cases, claim)
        showed = "–" if "no claim" in claim.text else verdict(found, kept=claim.kept)
        if claim.cost is not None:
            cost = relative_cost(cases, claim)
            showed += f"; {cost:.2g} times the gradients" + (
                "" if cost <= claim.cost else f", not {claim.cost:g}"
            )
        cells = [f"`{claim.method}`", mechanism, own, small, large, _said(claim), percent(found, sign=True)]
        lines.append(f"| {' | '.join([*cells, showed])} |")
    return "\n".join(lines)


def _said(claim: Claim) -> str:
    case, method, size = claim.against
    where = f"{method} at {size}" + ("" if case == claim.cell[0] else f", {case}")
    return f"{claim.text} (against {where})"


def case_tables(result: Mapping[str, Any]) -> str:
    """Every cell of every case: what it ended with, what it cost."""
    lines = []
    for case, runs in result["cases"].items():
        options = CASES[case]
        budget = f"{options['steps']} updates" if "steps" in options else f"{options['epochs']} epochs"
        lines += [
            f"**{case}**: `{options['model']}`, {budget}",
            "",
            "| method | batch | lr | train acc. | test acc. | gap | near-rank | φ | gradients | time, s |",
            "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for (method, size), found in cells_of(runs).items():
            cells = [f"`{method}`", str(size), f"{found[0]['lr']:.3g}"]
            for name in ("train_accuracy", "test_accuracy", "generalization_gap"):
                cells.append(mean_of(found, name, lambda value: f"{100 * value:.1f}"))
            cells.append(mean_of(found, "near_rank_ratio", lambda value: f"{value:.3f}"))
            cells.append(mean_of(found, "sharpness", lambda value: f"{value:.3g}"))
            cells.append(mean_of(found, "gradient_images", lambda value: f"{value:,.0f}", spread=False))
            cells.append(mean_of(found, "train_seconds", lambda value: f"{value:.1f}", spread=False))
            lines.append(f"| {' | '.join([*cells[:3], *(cell.replace('-', '−') for cell in cells[3:])])} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def about(result: Mapping[str, Any]) -> str:
    """Where, with what and how long it was run, and which rates the pilot chose."""
    where = f"{processor(result)}, torch {result['versions']['torch']}, commit {result['commit'][:12]}"
    rates = "; ".join(
        f"{case}: " + ", ".join(f"{cell} {rate:g}" for cell, rate in found.items() if "@" in cell)
        for case, found in result["rates"].items()
    )
    return (
        f"Seeds {SEEDS}, means ± half of their 95 % interval; accuracies and differences in percent, paired "
        f"by seed. Rates chosen by the pilot: {rates}. {where}; two runs side by side on a thread each."
    )


def written(result: Mapping[str, Any]) -> dict[Path, str]:
    """The page with the tables in it."""
    text = PAGE.read_text(encoding="utf-8")
    for name, table in (("about", about), ("table", main_table), ("cases", case_tables)):
        text = marked.replaced(text, f"methods-{name}", table(result))
    return {PAGE: text}


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    if list(arguments) not in (["--render"], ["--check"]):
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
        parser.add_argument("--out", type=Path, required=True, help="directory of the runs")
        result = run(parser.parse_args(arguments).out)
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return 0
    pages = written(json.loads(RESULT.read_text(encoding="utf-8")))
    return marked.write(pages, [] if list(arguments) == ["--render"] else arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
