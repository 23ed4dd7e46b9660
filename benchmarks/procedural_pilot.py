"""How hard is the procedural set? The lab's `cnn` and a linear classifier at several difficulties.

The default difficulty of `ProceduralOptions` was set by this script: a small batch is to reach 70 to 90 % on
test images and to fit the training images, so that there is a generalisation gap and room on both sides. The
seeds begin at 1000 and are of data and weights alike; studies take theirs from 0, and none of these.

python benchmarks/procedural_pilot.py              # run (some 6 minutes), write the result and the table
python benchmarks/procedural_pilot.py --runs 1     # one run more, towards the result, then stop
python benchmarks/procedural_pilot.py --render     # write the table of docs/lab.md from the committed result
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import marked
import torch
from torch import nn

from bsgap_kernels.bench.machine import describe
from bsgap_kernels.lab.data import ImageData, ProceduralOptions, load_data
from bsgap_kernels.lab.models import build_model

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "procedural_pilot.json"
PAGE = ROOT / "docs" / "lab.md"
NAME = "pilot-table"
STARTED = RESULT.with_name(RESULT.name + ".partial")
SEEDS = (1000, 1001, 1002)
EPOCHS = 15
LATE = 40
"""Epochs of the run that shows that the training images can be fitted."""
PLAN = [
    *((0.75, seed, EPOCHS) for seed in SEEDS),
    *((difficulty, seed, EPOCHS) for difficulty in (0.5, 1.0) for seed in SEEDS[:1]),
    (0.75, SEEDS[0], LATE),
]
"""Difficulty, seed and epochs of every run."""
BATCH = 32
LR = 0.01
LINEAR_LR = 0.001
MOMENTUM = 0.9


def linear(classes: int) -> nn.Module:
    """Softmax regression on the pixels."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, classes))


def accuracy(model: nn.Module, data: ImageData, split: str) -> float:
    """Share of a split that the model gets right."""
    read, total = (
        (data.train, len(data.train_labels)) if split == "train" else (data.test, len(data.test_labels))
    )
    right = 0
    with torch.no_grad():
        for start in range(0, total, 1000):
            images, labels = read(slice(start, start + 1000))
            right += int((model(images).argmax(1) == labels).sum())
    return right / total


def fit(model: nn.Module, data: ImageData, lr: float, seed: int, epochs: int) -> dict[str, Any]:
    """Train with SGD at a constant rate; accuracies at the end, and the time."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM)
    shuffle = torch.Generator().manual_seed(seed)
    total = len(data.train_labels)
    started = time.perf_counter()
    for _ in range(epochs):
        order = torch.randperm(total, generator=shuffle)
        for rows in order[: total - total % BATCH].view(-1, BATCH):
            images, labels = data.train(rows)
            optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return {
        "train_accuracy": accuracy(model, data, "train"),
        "test_accuracy": accuracy(model, data, "test"),
        "seconds": round(time.perf_counter() - started, 1),
    }


def run(difficulty: float, seed: int, epochs: int) -> dict[str, Any]:
    """Both classifiers on one set; `generation_seconds` are of drawing its 30,000 images."""
    started = time.perf_counter()
    data = load_data("procedural", options=ProceduralOptions(difficulty=difficulty, seed=seed))
    generation = round(time.perf_counter() - started, 2)
    row: dict[str, Any] = {"difficulty": difficulty, "seed": seed, "epochs": epochs}
    row["generation_seconds"] = generation
    for name, lr in (("cnn", LR), ("linear", LINEAR_LR)):
        torch.manual_seed(seed)
        shape, classes = data.image_shape, data.classes
        model = linear(classes) if name == "linear" else build_model(name, shape, classes)
        row[name] = fit(model, data, lr, seed, epochs)
    return row


def table(result: dict[str, Any]) -> str:
    """Markdown: a row a difficulty, means over seeds."""
    lines = [
        "| difficulty | epochs | seeds | `cnn` train | `cnn` test | linear test |",
        "|---|---|---|---|---|---|",
    ]
    for difficulty, epochs in sorted({(row["difficulty"], row["epochs"]) for row in result["runs"]}):
        rows = [row for row in result["runs"] if (row["difficulty"], row["epochs"]) == (difficulty, epochs)]
        values = (
            statistics.mean(row[model][key] for row in rows)
            for model, key in (
                ("cnn", "train_accuracy"),
                ("cnn", "test_accuracy"),
                ("linear", "test_accuracy"),
            )
        )
        cells = " | ".join(f"{100 * value:.1f} %" for value in values)
        lines.append(f"| {difficulty:g} | {epochs} | {len(rows)} | {cells} |")
    budget = result["budget"]
    seconds = statistics.median(row["generation_seconds"] for row in result["runs"])
    sizes = result["options"]
    lines += [
        "",
        f"Accuracies on {sizes['train']:,} training and {sizes['test']:,} test images, means over pilot "
        "seeds: the model `cnn`, and softmax regression on the pixels; "
        f"batch {budget['batch']}, momentum {budget['momentum']:g}, learning rate {budget['lr']:g} "
        f"({budget['linear_lr']:g} for the regression). Drawing the images took {seconds:.1f} s on one "
        f"thread of {result['machine']['cpu']}.",
    ]
    return "\n".join(lines)


def page(result: dict[str, Any], text: str) -> str:
    """The page with the result's table in it."""
    return marked.replaced(text, NAME, table(result))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Difficulty of the procedural set.")
    parser.add_argument("--runs", type=int, help="stop after so many more runs")
    parser.add_argument("--render", action="store_true", help="only write the page's table")
    options = parser.parse_args(arguments)
    if not options.render and not measure(options.runs):
        return 0
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    PAGE.write_text(page(result, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(table(result))
    return 0


def measure(most: int | None) -> bool:
    """Do `most` of the runs that are left; whether none is left and the result is written."""
    rows = json.loads(STARTED.read_text(encoding="utf-8")) if STARTED.is_file() else []
    for planned in PLAN[len(rows) :][:most]:
        rows.append(run(*planned))
        STARTED.write_text(json.dumps(rows), encoding="utf-8")
        print(json.dumps(rows[-1]), flush=True)
    if len(rows) < len(PLAN):
        return False
    result = {
        "schema": 1,
        "options": {"train": 10_000, "test": 20_000, "classes": 10},
        "budget": {"batch": BATCH, "momentum": MOMENTUM, "lr": LR, "linear_lr": LINEAR_LR},
        "runs": rows,
        **describe(),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    STARTED.unlink()
    return True


if __name__ == "__main__":
    sys.exit(main())
