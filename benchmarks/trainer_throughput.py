"""Images a second of the trainer, the metric off, beside a bare PyTorch loop of the same training.

    python benchmarks/trainer_throughput.py    # minutes; writes benchmarks/results/trainer_throughput.json

Both train the same network (its initial weights from one seed) with the same batches in the same order and
`torch.optim.SGD` with momentum, in one process, in turns of a few steps: a turn of the trainer, a turn of the
bare loop. The bare loop is rows, forward, loss, backward, update, and reads no number back; the trainer reads
loss and accuracy of every step, writes rows and shows progress, and its tracker has no hooks on the model but
for the probe. Timed is all between the trainer's first step and its last but evaluation, the probe's reading
at the end and checkpoints. At the end the weights of both have to be equal in every bit: the same work was
timed.

`ratio` is the median time of a turn of the trainer over that of the bare loop, `ratio_of_totals` that of the
sums, in which what happens now and then (rows written to the file) counts, and so does other work on the
machine. The target is a ratio of at most 1.05. Exit code 1 where a case misses it, 2 where weights differ.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bsgap_kernels.bench.machine import OtherWork, describe, set_threads
from bsgap_kernels.bench.measure import quartiles
from bsgap_kernels.lab.config import TrainConfig
from bsgap_kernels.lab.data import ImageData, load_data
from bsgap_kernels.lab.files import sha256_of_tensors
from bsgap_kernels.lab.loop import Loop
from bsgap_kernels.lab.models import build_model
from bsgap_kernels.lab.progress import Progress
from bsgap_kernels.lab.results import open_writer
from bsgap_kernels.lab.setup import set_up
from bsgap_kernels.lab.stop import NEVER

RESULT = Path(__file__).resolve().parent / "results" / "trainer_throughput.json"
TARGET = 1.05
WARM_UP = 2
"""Turns that are not counted: what is loaded or allocated once is there then."""


@dataclass(frozen=True)
class Case:
    """What is trained, and in how many turns of how many steps."""

    model: str
    data: str
    batch_size: int
    steps: int
    turns: int


CASES = (
    Case("lenet5", "digits", 16, steps=50, turns=100),
    Case("lenet5", "digits", 128, steps=10, turns=100),
    Case("lenet5", "digits", 1437, steps=1, turns=60),
    Case("resnet56", "random", 64, steps=1, turns=20),
)


def random_data(images: int = 512) -> ImageData:
    """Random images of CIFAR's size; what they show does not change what a step costs."""
    generator = torch.Generator().manual_seed(0)
    shown = torch.randn(images, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (images,), generator=generator)
    return ImageData("random", shown, labels, shown[:64], labels[:64], classes=10, synthetic=True)


class BareLoop:
    """What one writes without a trainer."""

    def __init__(self, config: TrainConfig, data: ImageData) -> None:
        torch.manual_seed(config.seed)
        self.model: nn.Module = build_model(config.model, data.image_shape, data.classes)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=config.lr or 0.0, **config.hyper["sgd"])
        self.data = data
        self.batch_size = int(config.batch_size)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.order = torch.empty(0, dtype=torch.int64)
        self.position = 0

    def step(self) -> None:
        """One update."""
        if self.position + self.batch_size > len(self.order):
            self.order = torch.randperm(len(self.data.train_labels), generator=self.generator)
            self.position = 0
        rows = self.order[self.position : self.position + self.batch_size]
        self.position += self.batch_size
        self.optimizer.zero_grad()
        logits = self.model(self.data.train_images[rows])
        loss = nn.functional.cross_entropy(logits, self.data.train_labels[rows])
        loss.backward()
        self.optimizer.step()


class Turns:
    """What the trainer calls between its steps: every so many of them, as many of the bare loop."""

    def __init__(self, bare: BareLoop, steps: int) -> None:
        self.bare = bare
        self.steps = steps
        self.seconds: dict[str, list[float]] = {"trainer": [], "bare": []}
        self._calls = 0
        self._started = 0.0

    def __call__(self) -> None:
        """Between two steps of the trainer, and before the first."""
        if self._calls % self.steps == 0:
            ended = time.perf_counter()
            if self._calls:
                self.seconds["trainer"].append(ended - self._started)
                for _ in range(self.steps):
                    self.bare.step()
                self.seconds["bare"].append(time.perf_counter() - ended)
            self._started = time.perf_counter()
        self._calls += 1


def measure(case: Case, directory: Path) -> dict[str, Any]:
    """Both loops on one case."""
    data = load_data("digits") if case.data == "digits" else random_data()
    config = TrainConfig(
        model=case.model,
        batch_size=case.batch_size,
        steps=case.steps * (case.turns + WARM_UP),
        every=None,
        probe_every=None,
        probe_size=64,
        eval_every=10**9,
    )
    setup = set_up(config, data)
    turns = Turns(BareLoop(config, data), case.steps)
    other = OtherWork()
    with (
        closing(setup),
        open_writer(directory, config.run) as writer,
        Progress(setup.steps, f"{case.model} {config.run}") as progress,
    ):
        Loop(setup).run(writer, progress, NEVER, turns)
    weights = [sha256_of_tensors(model.state_dict()) for model in (setup.model, turns.bare.model)]
    seconds = {name: times[WARM_UP:] for name, times in turns.seconds.items()}
    images = case.steps * case.batch_size
    medians = {name: quartiles(times)[1] for name, times in seconds.items()}
    paired = quartiles([a / b for a, b in zip(*seconds.values(), strict=True)])
    ratio = medians["trainer"] / medians["bare"]
    return {
        "model": case.model,
        "data": case.data,
        "batch_size": case.batch_size,
        "turns": case.turns,
        "steps_a_turn": case.steps,
        "images_per_second": {name: round(images / median, 1) for name, median in medians.items()},
        "step_ms": {name: round(1e3 * median / case.steps, 4) for name, median in medians.items()},
        "ratio": round(ratio, 4),
        "paired_ratio_quartiles": [round(value, 4) for value in paired],
        "ratio_of_totals": round(sum(seconds["trainer"]) / sum(seconds["bare"]), 4),
        "met": ratio <= TARGET,
        "same_weights": weights[0] == weights[1],
        "other_work": other.share(),
    }


def line(row: dict[str, Any]) -> str:
    """A case's figures in one line."""
    rates = row["images_per_second"]
    return (
        f"{row['model']} batch {row['batch_size']}: trainer {rates['trainer']:.0f} images/s, bare "
        f"{rates['bare']:.0f}, ratio {row['ratio']:.3f} (of totals {row['ratio_of_totals']:.3f}), "
        f"{'met' if row['met'] else 'MISSED'}{'' if row['same_weights'] else ', WEIGHTS DIFFER'}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every case and write the result file."""
    parser = argparse.ArgumentParser(description="The trainer beside a bare PyTorch loop.")
    parser.add_argument("--threads", type=int, default=None, help="of torch; its own number by default")
    parser.add_argument("--case", type=int, nargs="*", help="only these (0 to 3), and no result file")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        set_threads(options.threads)
    rows = []
    for number in range(len(CASES)) if options.case is None else options.case:
        with tempfile.TemporaryDirectory() as directory:
            rows.append(measure(CASES[number], Path(directory)))
        print(line(rows[-1]), flush=True)
    if options.case is None:
        result = {
            "schema": 1,
            "what": "python benchmarks/trainer_throughput.py",
            **describe(),
            "target_ratio": TARGET,
            "cases": rows,
        }
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"result: {RESULT}")
    if not all(row["same_weights"] for row in rows):
        return 2
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
