"""Peak memory of training at full batch: in passes of a fixed number of rows, and in one pass.

    python benchmarks/full_batch_memory.py    # a minute; writes benchmarks/results/full_batch_memory.json

The lab's `cnn` is trained with `batch_size=full` on random images of CIFAR's size, held as bytes, with
standard augmentation and near-rank of every layer at every step. Each size of the data is a process of its
own, and so is each of the two ways: `micro_batch` 128, and none. A first run on a few images loads what is
loaded once, and the allocator is told to give back what is freed. Then two peaks are taken, both beside what
was resident when the data was there, so that the bytes of the data are not in them:

- `steps_bytes`: from before the first update to after the last;
- `run_bytes`: of all, with the probe and the evaluation of both whole sets at the end.

`peak_bytes` is the same peak of the whole process, with the data (`data_bytes`) and the libraries.

Criterion, fixed before measuring: in passes, neither peak of the largest data (8 times the smallest) exceeds
1.1 times that of the smallest; and in one pass `steps_bytes` grows at least fourfold, or else the measurement
does not see activations. What may grow is a handful of numbers an image (the order of the rows, where each is
cropped). `met` says whether both hold; exit code 1 where they do not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from bsgap_kernels.bench.machine import describe, set_threads
from bsgap_kernels.bench.memory import MALLOC, status_bytes
from bsgap_kernels.lab.config import TrainConfig
from bsgap_kernels.lab.data import ImageData
from bsgap_kernels.lab.data.images import byte_data
from bsgap_kernels.lab.loop import Loop
from bsgap_kernels.lab.progress import Progress
from bsgap_kernels.lab.results import open_writer
from bsgap_kernels.lab.setup import set_up
from bsgap_kernels.lab.stop import NEVER

RESULT = Path(__file__).resolve().parent / "results" / "full_batch_memory.json"
IMAGES = (1024, 2048, 4096, 8192)
MICRO_BATCH = 128
STEPS = 2
MOST_GROWTH = 1.1
LEAST_GROWTH_OF_ONE_PASS = 4.0


def random_data(images: int) -> ImageData:
    """Random bytes in CIFAR's shape; what they show does not change what a step takes."""
    generator = torch.Generator().manual_seed(0)
    shown = torch.randint(256, (images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (images,), generator=generator)
    return byte_data("random", shown, labels, shown[:256].clone(), labels[:256].clone(), classes=10)


class Peaks:
    """What the trainer calls between its steps: forgets the peak before the first, reads it in the end."""

    def __init__(self) -> None:
        self.before = status_bytes("VmRSS")
        self.of_setup = self.of_steps = 0
        self._calls = 0

    def __call__(self) -> None:
        """Between two steps of the trainer, before the first and after the last."""
        if self._calls == 0:
            self.of_setup = status_bytes("VmHWM")
            forget_peak()
        if self._calls == STEPS:
            self.of_steps = status_bytes("VmHWM")
        self._calls += 1

    def figures(self) -> dict[str, int]:
        """The largest of the updates and of all until now, beside what was resident at the beginning."""
        of_all = max(self.of_setup, status_bytes("VmHWM"))
        return {"steps_bytes": self.of_steps - self.before, "run_bytes": of_all - self.before}


def forget_peak() -> None:
    """Let VmHWM begin anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def train(data: ImageData, micro_batch: int | None, directory: Path) -> dict[str, int]:
    """One run at full batch and its peaks."""
    config = TrainConfig(
        model="cnn",
        batch_size="full",
        micro_batch=micro_batch,
        augment="standard",
        unfold="channel",
        steps=STEPS,
        probe_every=None,
        probe_size=MICRO_BATCH,
        eval_every=STEPS,
    )
    forget_peak()
    peaks = Peaks()
    setup = set_up(config, data)
    with (
        closing(setup),
        open_writer(directory, config.run) as writer,
        Progress(setup.steps, config.run) as progress,
    ):
        Loop(setup).run(writer, progress, NEVER, peaks)
    return peaks.figures()


def measure_here(images: int, micro_batch: int | None) -> dict[str, Any]:
    """One size in one way, in a process that has done nothing else."""
    few = random_data(2 * MICRO_BATCH)
    with tempfile.TemporaryDirectory() as directory:
        train(few, micro_batch, Path(directory))
    data = random_data(images)
    tensors = (data.train_images, data.train_labels, data.test_images, data.test_labels)
    with tempfile.TemporaryDirectory() as directory:
        figures = train(data, micro_batch, Path(directory))
    return {
        "images": images,
        "micro_batch": micro_batch,
        "data_bytes": sum(tensor.nbytes for tensor in tensors),
        **figures,
        "peak_bytes": status_bytes("VmHWM"),
    }


def measure(images: int, micro_batch: int | None, threads: int) -> dict[str, Any]:
    """One size in one way, in a fresh process."""
    asked = ["--images", str(images), "--threads", str(threads)]
    if micro_batch is not None:
        asked += ["--micro-batch", str(micro_batch)]
    done = subprocess.run(
        [sys.executable, __file__, *asked],
        env={**os.environ, **MALLOC},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{images} images: {(done.stderr.splitlines() or ['no reason given'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def verdict(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Growth from the smallest data to the largest, and whether it is as the criterion asks."""
    growth = {}
    for name, key, passes in (
        ("steps_in_passes", "steps_bytes", True),
        ("run_in_passes", "run_bytes", True),
        ("steps_in_one_pass", "steps_bytes", False),
    ):
        values = [row[key] for row in rows if (row["micro_batch"] is not None) == passes]
        growth[name] = round(values[-1] / values[0], 3)
    met = max(growth["steps_in_passes"], growth["run_in_passes"]) <= MOST_GROWTH
    seen = growth["steps_in_one_pass"] >= LEAST_GROWTH_OF_ONE_PASS
    return {"growth": growth, "met": met and seen}


def line(row: dict[str, Any]) -> str:
    """A size's figures in one line."""
    way = "in one pass" if row["micro_batch"] is None else f"in passes of {row['micro_batch']}"
    steps, run, data, peak = (
        row[key] / 2**20 for key in ("steps_bytes", "run_bytes", "data_bytes", "peak_bytes")
    )
    return (
        f"{row['images']} images {way}: updates {steps:.1f} MiB, run {run:.1f} MiB, beside data of "
        f"{data:.1f} MiB; peak of the process {peak:.1f} MiB"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every size in both ways and write the result file."""
    parser = argparse.ArgumentParser(description="Peak memory of training at full batch.")
    parser.add_argument("--threads", type=int, default=1, help="of torch; each has buffers of its own")
    parser.add_argument("--images", type=int, help="only this many, measured in this process, as JSON")
    parser.add_argument("--micro-batch", type=int, help="rows of a pass, with --images; all by default")
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    if options.images is not None:
        print(json.dumps(measure_here(options.images, options.micro_batch)))
        return 0
    rows = []
    for micro_batch in (MICRO_BATCH, None):
        for images in IMAGES:
            rows.append(measure(images, micro_batch, options.threads))
            print(line(rows[-1]), flush=True)
    found = verdict(rows)
    result = {
        "schema": 1,
        "what": "python benchmarks/full_batch_memory.py",
        **describe(),
        "model": "cnn",
        "steps": STEPS,
        "criterion": {
            "most_growth_in_passes": MOST_GROWTH,
            "least_growth_in_one_pass": LEAST_GROWTH_OF_ONE_PASS,
        },
        **found,
        "rows": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{found['growth']}: {'met' if found['met'] else 'MISSED'}\nresult: {RESULT}")
    return 0 if found["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
