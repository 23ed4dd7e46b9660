"""What recording costs over a long run: memory, bytes a value, time a step.

    python benchmarks/tracking_memory.py    # minutes; writes benchmarks/results/tracking_memory.json

10,000 steps of 55 layers (ResNet-56) go through the `BackgroundWriter` to a JSON-lines file and an alarm, and
1,000 more to every sink that writes files. Steps come as fast as they are written: `step_us` is what the
writer's threads can keep up with, `put_us_median` what the training loop waits, `write_us` the processor time
of one step in each sink. Then a small network of 55 nonlinearities is trained for 10,000 steps with a
`RankTracker` that writes JSON lines. Resident memory is read every hundredth of a run, when all is written.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bsgap_kernels import RankTracker
from bsgap_kernels.bench.machine import describe
from bsgap_kernels.bench.model_sites import model_sites
from bsgap_kernels.tracking.alarms import Alarm, AlarmSink
from bsgap_kernels.tracking.background import BackgroundWriter
from bsgap_kernels.tracking.rows import LineFormatter, Row, Sink
from bsgap_kernels.tracking.sinks import JsonlSink, ParquetSink, TensorBoardSink

RESULT = Path(__file__).resolve().parent / "results" / "tracking_memory.json"
RUN = "resnet56-b1024-s0"
SITES = tuple(f"{site.name}#0" for site in model_sites("resnet56"))
METRICS = tuple(f"batch.{name}" for name in ("near_rank", "ratio", "lower", "upper", "effective_rank"))
READINGS = 100


def rows_of(step: int) -> list[Row]:
    """What a tracker makes of one step, with values of every length that occurs."""
    rows = []
    for number, site in enumerate(SITES):
        near_rank = 1 + (7 * step + number) % 64
        values = (near_rank, near_rank / 64, near_rank, near_rank, near_rank / 1.7)
        rows += [Row(step, site, metric, value) for metric, value in zip(METRICS, values, strict=True)]
    return rows


def resident_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def record(sinks: Sequence[Sink], steps: int) -> dict[str, Any]:
    """Put `steps` steps through a writer and watch memory and time."""
    writer = BackgroundWriter(sinks, capacity=256)
    put_seconds = []
    memory = []
    started = time.perf_counter()
    for step in range(steps):
        before = time.perf_counter()
        writer.put(lambda step=step: rows_of(step))
        put_seconds.append(time.perf_counter() - before)
        if step % 50 == 49:
            # Without a pause nothing but this loop would run, and steps would be dropped.
            writer.flush()
        if (step + 1) % (steps // READINGS) == 0:
            writer.flush()
            memory.append(resident_mib())
    writer.close()
    seconds = time.perf_counter() - started
    return {
        "sinks": [type(sink).__name__ for sink in sinks],
        "steps": steps,
        "values_a_step": len(SITES) * len(METRICS),
        "dropped": writer.dropped,
        "disabled": writer.disabled,
        "step_us": round(seconds / steps * 1e6, 1),
        "put_us_median": round(statistics.median(put_seconds) * 1e6, 2),
        "resident_mib": resident(memory),
    }


def track(path: Path, steps: int) -> dict[str, Any]:
    """Train a network of 55 layers of 8 units on one thread, every layer tracked at every step."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = [module for _ in SITES for module in (nn.Linear(8, 8), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    inputs = torch.randn(64, 8)
    memory = []
    with RankTracker(model, sinks=str(path), run=RUN, verbose=False) as tracker:
        started = time.perf_counter()
        for step in range(steps):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
            tracker.step()
            if (step + 1) % (steps // READINGS) == 0:
                tracker.flush()
                memory.append(resident_mib())
        seconds = time.perf_counter() - started
    with path.open("rb") as file:
        lines = sum(1 for _ in file)
    return {
        "steps": steps,
        "layers": len(SITES),
        "lines": lines,
        "expected_lines": steps * len(SITES) * 2,
        "bytes_a_value": round(path.stat().st_size / lines, 1),
        "step_us": round(seconds / steps * 1e6, 1),
        "resident_mib": resident(memory),
    }


def resident(memory: Sequence[float]) -> dict[str, float]:
    """Readings of resident memory in short."""
    return {
        "start": round(memory[0], 1),
        "middle": round(memory[len(memory) // 2], 1),
        "end": round(memory[-1], 1),
        "largest": round(max(memory), 1),
    }


def write_microseconds(sinks: Sequence[Sink], steps: int = 200) -> dict[str, float]:
    """Processor time of one step's rows in each sink, its end included, on this thread."""
    times = {}
    for sink in sinks:
        batches = [rows_of(step) for step in range(steps)]
        before = time.thread_time()
        for rows in batches:
            sink.write(rows)
        sink.close()
        times[type(sink).__name__] = round((time.thread_time() - before) / steps * 1e6, 1)
    return times


def line_microseconds() -> dict[str, float]:
    """Time of one line by `LineFormatter` and by json.dumps, the fastest of several rounds."""
    line = LineFormatter(RUN, 0).line
    rows = rows_of(1234)

    def by_json() -> list[str]:
        return [json.dumps({"run": RUN, "attempt": 0, **row._asdict()}) + "\n" for row in rows]

    times = {}
    for name, make in (("formatter", lambda: [line(*row) for row in rows]), ("json_dumps", by_json)):
        rounds = []
        for _ in range(50):
            before = time.perf_counter()
            make()
            rounds.append(time.perf_counter() - before)
        times[name] = round(min(rounds) / len(rows) * 1e6, 2)
    return times


def file_sinks(directory: Path) -> list[Sink]:
    """A sink of each kind that writes files."""
    return [
        JsonlSink(directory / "run.jsonl", RUN),
        ParquetSink(directory / "run.parquet", RUN),
        TensorBoardSink(directory / "tensorboard", RUN),
    ]


def main() -> None:
    """Record both runs and write the result file."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        path = directory / "run.jsonl"
        truth = record([AlarmSink([Alarm(below=0.0)]), JsonlSink(path, RUN)], 10_000)
        values = truth["steps"] * truth["values_a_step"]
        truth["file_mib"] = round(path.stat().st_size / 2**20, 1)
        truth["bytes_a_value"] = round(path.stat().st_size / values, 1)
        with path.open("rb") as file:
            lines = sum(1 for _ in file)
        path.unlink()
        every = record(file_sinks(directory / "every"), 1_000)
        tracked = track(directory / "tracked.jsonl", 10_000)
        alone = write_microseconds([AlarmSink([Alarm(below=0.0)]), *file_sinks(directory / "alone")])
    result = {
        "what": "python benchmarks/tracking_memory.py",
        **describe(),
        "layers": len(SITES),
        "write_us": alone,
        "line_us": line_microseconds(),
        "jsonl": truth,
        "every_sink": every,
        "tracker": tracked,
    }
    if tracked["lines"] != tracked["expected_lines"]:
        raise SystemExit(f"{tracked['lines']} lines of the tracker, expected {tracked['expected_lines']}")
    if truth["dropped"] or lines != values:
        raise SystemExit(f"{lines} lines of {values} values, {truth['dropped']} steps dropped")
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
