"""Does near-rank fall with the batch size on the digits? LeNet-5, a fixed probe, two budgets, several seeds.

python benchmarks/digits_study.py                  # run (about 15 minutes on 2 cores), write the result
python benchmarks/digits_study.py --render         # write the README's table from the committed result
python benchmarks/digits_study.py --check          # exit code 1 if the README differs from the result
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import marked

from bsgap_kernels.bench.machine import describe
from bsgap_kernels.lab.config import SweepConfig
from bsgap_kernels.lab.sweep import sweep

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "digits_batch_size.json"
NAME = "digits-table"
BUDGETS: dict[str, dict[str, int]] = {"40 epochs": {"epochs": 40}, "900 steps": {"steps": 900}}
BATCH_SIZES = "16,64,256,full"
NEVER = 10**9  # the question is about the probe at the end: nothing is read on training batches


def run(seeds: str) -> dict[str, Any]:
    """Both budgets, every batch size and seed; what the summaries say of the end of each run."""
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for name, budget in BUDGETS.items():
            config = SweepConfig(
                batch_sizes=BATCH_SIZES, seeds=seeds, every=NEVER, max_probes=1, eval_every=NEVER, **budget
            )
            for summary in sweep(config, Path(directory) / name.replace(" ", "-")):
                kept = ("batch_size", "seed", "steps", "lr", "train_accuracy", "test_accuracy", "train_loss")
                sites = [
                    {
                        key: site[key]
                        for key in ("site", "probe_shape", "near_rank", "lower", "upper", "null_near_rank")
                    }
                    for site in summary["sites"]
                ]
                rows.append({"budget": name, **{key: summary[key] for key in kept}, "sites": sites})
    return {
        "schema": 1,
        "model": config.model,
        "data": config.data,
        "rtol": config.rtol,
        "runs": rows,
        **describe(),
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: one row a budget and batch size, near-ranks at the end as mean (range) over seeds."""
    sites = [site["site"] for site in result["runs"][0]["sites"]]
    shapes = [site["probe_shape"] for site in result["runs"][0]["sites"]]
    heads = [f"{site.split('#')[0]} (of {min(shape)})" for site, shape in zip(sites, shapes, strict=True)]
    lines = [
        "| budget | batch | updates | train acc. | test acc. | " + " | ".join(heads) + " |",
        "|---|---|---|---|---|" + "---|" * len(sites),
    ]
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in result["runs"]:
        groups.setdefault((row["budget"], row["batch_size"]), []).append(row)
    for (budget, batch), rows in groups.items():
        cells = []
        for i in range(len(sites)):
            values = [row["sites"][i]["near_rank"] for row in rows]
            cells.append(f"{statistics.mean(values):.0f} ({min(values)}–{max(values)})")
        accuracy = [statistics.mean(row[key] for row in rows) for key in ("train_accuracy", "test_accuracy")]
        numbers = [str(rows[0]["steps"]), *(f"{value:.3f}" for value in accuracy), *cells]
        lines.append(f"| {budget} | {batch} | " + " | ".join(numbers) + " |")
    seeds = len({row["seed"] for row in result["runs"]})
    uncertain = sum(site["lower"] != site["upper"] for row in result["runs"] for site in row["sites"])
    counts = sum(len(row["sites"]) for row in result["runs"])
    lines += [
        "",
        f"LeNet-5 on scikit-learn's digits, SGD with momentum 0.9, learning rate "
        f"{result['runs'][0]['lr']:g} at every batch size; near-rank (rtol {result['rtol']:g}) of each "
        f"layer on one probe batch of {shapes[0][0]} training images at the end of training, mean and "
        f"range over {seeds} seeds. {counts - uncertain} of {counts} counts are certified.",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit code 1 where --check finds a difference."""
    parser = argparse.ArgumentParser(description="Near-rank against batch size on the digits.")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--render", action="store_true", help="only write the README's table")
    parser.add_argument("--check", action="store_true", help="only compare the README's table")
    options = parser.parse_args(arguments)
    if not options.render and not options.check:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(run(options.seeds), indent=1) + "\n", encoding="utf-8")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    new = marked.replaced(text, NAME, table(result))
    if options.check:
        return int(new != text)
    (ROOT / "README.md").write_text(new, encoding="utf-8")
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
