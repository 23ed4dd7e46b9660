"""Runs the benchmark: every case, every contender, one result that is printed and written as JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch

from . import machine, measure, tables
from .cases import CASES, Case, select_cases
from .contenders import CONTENDERS, MATRIX_RANK, PHASES, Contender, Result
from .truth import Truth, Verdict, judge, truth

SCHEMA = 1
"""Version of the JSON written; it goes up when a reader would have to change."""
DEVICES = ("cpu", "cuda")
QUICK_ROUNDS = 5
QUICK_BUDGET_S = 2.0


@dataclass(frozen=True)
class BenchConfig:
    """Settings of a benchmark run."""

    json: Path | None = None
    """Result file (JSON). Until the run is complete it is FILE.partial, rewritten after every case."""
    cases: list[str] = field(default_factory=lambda: ["*"])
    """Names of cases, or shell patterns such as '65536*'."""
    quick: bool = False
    """Leave out the slow cases and take few rounds: a look, not a measurement."""
    rounds: int = 20
    """Most rounds of a contender in a case."""
    budget: float = 10.0
    """Seconds of timed rounds of a contender in a case; a slow one gets fewer rounds, at least 3."""
    rtol: float = 1e-2
    """Threshold, relative to the largest singular value."""
    threads: int | None = None
    """Threads of torch and of NumPy's BLAS; what they are set to if not given."""
    seed: int = 0
    """Seed of the inputs and of the order within the rounds."""
    device: str = "cpu"
    """cpu, or cuda: then the cases, peers and floors are those of bench/cuda."""
    time_limit: float | None = None
    """On cuda: nothing new is begun after this many seconds."""

    def problem(self) -> str | None:
        """What is wrong with the settings, in a sentence, or None."""
        if self.rounds < 1:
            return f"rounds must be at least 1, got {self.rounds}"
        if not self.budget >= 0:
            return f"budget must be a number of seconds, got {self.budget}"
        if not 0 < self.rtol < 1:
            return f"rtol must lie between 0 and 1, got {self.rtol}"
        if self.threads is not None and self.threads < 1:
            return f"threads must be at least 1, got {self.threads}"
        if not 0 <= self.seed < 2**63:
            return f"seed must lie in 0 ... 2^63 - 1, got {self.seed}"
        if self.json is not None and (self.json.is_dir() or not self.json.absolute().parent.is_dir()):
            return f"json must name a file in an existing folder, got {self.json}"
        if self.device not in DEVICES:
            return f"device must be one of {', '.join(DEVICES)}, got {self.device!r}"
        if self.device == "cuda" and not torch.cuda.is_available():
            return "device cuda: torch sees no CUDA device here"
        if self.time_limit is not None and not self.time_limit > 0:
            return f"time-limit must be a positive number of seconds, got {self.time_limit}"
        try:
            select_cases(self.cases, quick=self.quick, among=_cases_of(self.device))
        except ValueError as error:
            return str(error)
        return None


def _cases_of(device: str) -> Sequence[Case]:
    if device == "cpu":
        return CASES
    cases: Sequence[Case] = importlib.import_module("bsgap_kernels.bench.cuda.cases").GPU_CASES
    return cases


def run(
    config: BenchConfig,
    *,
    contenders: Sequence[Contender] = CONTENDERS,
    cases: Sequence[Case] | None = None,
    out: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Times and checks every case, prints tables through `out`, writes `config.json`, returns the result.

    `cases` and `contenders` replace those of the package. Raises ValueError for settings that make no sense.
    """
    wrong = config.problem()
    if wrong is not None:
        raise ValueError(wrong)
    if config.threads is not None:
        machine.set_threads(config.threads)
    chosen = select_cases(config.cases, quick=config.quick) if cases is None else cases
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "complete": False,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **machine.describe(),
        "settings": settings_of(config),
        "cases": [],
    }
    flush = measure.CacheFlush()
    out(_headline(result))
    for number, case in enumerate(chosen, 1):
        progress = Progress(f"[{number}/{len(chosen)}] {case.name}")
        record = measure_case(case, config, contenders, flush, progress)
        progress.done()
        result["cases"].append(record)
        result["complete"] = number == len(chosen)
        write_result(config.json, result)
        out("\n" + tables.text_table(record))
    if config.json is not None:
        out(f"\nWritten: {config.json}")
    return result


def measure_case(
    case: Case,
    config: BenchConfig,
    contenders: Sequence[Contender],
    flush: Callable[[], None],
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """One case: its input, the truth about it, the timed rounds, and the verdict on every contender."""
    progress("input")
    inputs = case.make(config.seed)
    taking_part = [c for c in contenders if c.suits(case.shapes)]
    expected: dict[bool, Truth] = {}
    for centred in sorted({c.centred for c in taking_part}):
        progress("float64 SVD" + (", centred" if centred else ""))
        expected[centred] = truth(inputs, config.rtol, centred=centred)
    verdicts: dict[str, Verdict] = {}
    by_name = {c.name: c for c in taking_part}

    def check(name: str, result: object) -> None:
        answer: Result = result  # type: ignore[assignment]
        verdicts[name] = judge(answer, expected[by_name[name].centred])

    rounds = min(config.rounds, QUICK_ROUNDS) if config.quick else config.rounds
    timing = partial(
        measure.interleave,
        rounds=rounds,
        budget_s=min(config.budget, QUICK_BUDGET_S) if config.quick else config.budget,
        calls=case.calls,
        flush=flush,
        progress=progress,
        seed=config.seed,
    )
    others = machine.OtherWork()
    samples = timing({c.name: partial(c, inputs, config.rtol) for c in taking_part}, on_result=check)
    record: dict[str, Any] = {
        "name": case.name,
        "about": case.about,
        "shapes": [list(shape) for shape in case.shapes],
        "matrices": case.matrices,
        "dtype": "float32",
        "rtol": config.rtol,
        "cache": "warm" if case.calls > 1 else "cold",
        "counts": {
            "lowest": int(expected[False].counts.min()) if False in expected else None,
            "highest": int(expected[False].counts.max()) if False in expected else None,
        },
        "contenders": [contender_row(c, samples[c.name], verdicts.get(c.name)) for c in taking_part],
    }
    compare(record)
    if case.profile:
        phases = {f: partial(f, inputs[0], config.rtol) for p in PHASES for f in (p.upto, p.less) if f}
        parts = timing({f.__name__: call for f, call in phases.items()})
        record["profile"] = profile_rows(parts)
    record["other_work"] = others.share()
    return record


class Named(Protocol):
    """What a row says of whom it is about."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def ours(self) -> bool: ...  # noqa: D102


def contender_row(contender: Named, samples: measure.Samples, verdict: Verdict | None) -> dict[str, Any]:
    """Times and verdict of a contender, or why there are none."""
    row: dict[str, Any] = {"name": contender.name, "ours": contender.ours}
    if samples.error is not None or verdict is None or not samples.times_ms:
        return {**row, "error": samples.error or "not timed"}
    low, median, high = samples.quartiles
    return {
        **row,
        "rounds": len(samples.times_ms),
        "median_ms": round(median, 5),
        "lower_quartile_ms": round(low, 5),
        "upper_quartile_ms": round(high, 5),
        "times_ms": [round(t, 5) for t in samples.times_ms],
        "check": {**asdict(verdict), "verdict": verdict.word},
    }


def compare(record: dict[str, Any]) -> None:
    """Adds the best peer (the quickest with no wrong count) and how many times as fast each is as it."""
    rows = [row for row in record["contenders"] if "error" not in row]
    peers = [r for r in rows if not r["ours"] and r["name"] != MATRIX_RANK and not r["check"]["wrong"]]
    best = min(peers, key=lambda r: float(r["median_ms"]), default=None)
    standard = next((r for r in rows if r["name"] == MATRIX_RANK), None)
    record["best_peer"] = best["name"] if best else None
    for row in rows:
        row["vs_matrix_rank"] = round(standard["median_ms"] / row["median_ms"], 3) if standard else None
        row["vs_best_peer"] = round(best["median_ms"] / row["median_ms"], 3) if best else None


def profile_rows(parts: dict[str, measure.Samples]) -> list[dict[str, Any]]:
    """Median milliseconds of each phase of our ops and its share of the op, without phases that failed."""
    rows: list[dict[str, Any]] = []
    for phase in PHASES:
        needed = [parts[f.__name__] for f in (phase.upto, phase.less) if f]
        if any(samples.error is not None for samples in needed):
            continue
        medians = [samples.quartiles[1] for samples in needed]
        rows.append(
            {"op": phase.op, "phase": phase.name, "median_ms": round(medians[0] - sum(medians[1:]), 5)}
        )
    for row in rows:
        # A difference of medians can come out below 0 where the phase is shorter than the noise.
        whole = sum(max(other["median_ms"], 0) for other in rows if other["op"] == row["op"])
        row["share"] = round(max(row["median_ms"], 0) / whole, 4) if whole > 0 else 0.0
    return rows


def settings_of(config: BenchConfig) -> dict[str, Any]:
    """The settings as they go into a result."""
    return {k: v for k, v in asdict(config).items() if k not in ("json", "threads")}


def _headline(result: dict[str, Any]) -> str:
    threads, versions = result["threads"], result["versions"]
    line = (
        f"{result['machine']['cpu']}, {result['machine']['cores']} cores; torch {versions['torch']} on "
        f"{threads['torch']} threads, NumPy {versions['numpy']} on {threads['numpy'] or 'unknown'}"
    )
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        line += f"\nWarning: the load is {load:.1f} already; figures taken beside other work are distorted."
    return line


def write_result(path: Path | None, result: dict[str, Any]) -> None:
    """Writes FILE.partial, which becomes FILE once the result is complete."""
    if path is None:
        return
    unfinished = unfinished_path(path)
    unfinished.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if result["complete"]:
        unfinished.replace(path)


def unfinished_path(path: Path) -> Path:
    """Where the finished cases of a run are until it is complete."""
    return path.with_name(path.name + ".partial")


class Progress:
    """What is being timed: one line that is overwritten on a terminal, one line a case elsewhere."""

    def __init__(self, title: str) -> None:
        self._title, self._live, self._width = title, sys.stderr.isatty(), 0
        if not self._live:
            print(title, file=sys.stderr, flush=True)

    def __call__(self, text: str) -> None:
        """Says what goes on."""
        if self._live:
            line = f"{self._title}: {text}"
            print("\r" + line.ljust(self._width), end="", file=sys.stderr, flush=True)
            self._width = len(line)

    def done(self) -> None:
        """Clears the line."""
        if self._live:
            print("\r" + " " * self._width + "\r", end="", file=sys.stderr, flush=True)


class _Parser(argparse.ArgumentParser):
    """A mistake is one sentence, as everywhere on our command line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0; 1 if one of our counts is wrong or fails; 2 for senseless settings."""
    defaults = BenchConfig()
    parser = _Parser(prog="bsgap bench", description="Times our ops beside their peers.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="result file; FILE.partial until complete")
    parser.add_argument("--cases", nargs="+", default=defaults.cases, metavar="GLOB", help="such as '65536*'")
    parser.add_argument(
        "--quick", action="store_true", help="fewer cases and rounds: a look, not a measurement"
    )
    parser.add_argument(
        "--rounds", type=int, default=defaults.rounds, metavar="N", help="default %(default)s"
    )
    parser.add_argument(
        "--budget", type=float, default=defaults.budget, metavar="SECONDS", help="default %(default)s"
    )
    parser.add_argument("--rtol", type=float, default=defaults.rtol, help="default %(default)s")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="of torch and NumPy; default: as they are set"
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, help="default %(default)s")
    parser.add_argument("--device", default=defaults.device, help="cpu or cuda; default %(default)s")
    parser.add_argument(
        "--time-limit", type=float, metavar="SECONDS", help="cuda: begin nothing new after this"
    )
    return execute(BenchConfig(**vars(parser.parse_args(arguments))))


def execute(config: BenchConfig) -> int:
    """Runs a configuration for a command line and returns its exit code; a mistake is one sentence."""
    wrong = config.problem()
    if wrong is not None:
        print(f"bsgap bench: {wrong}", file=sys.stderr)
        return 2
    try:
        if config.device == "cuda":
            result = importlib.import_module("bsgap_kernels.bench.cuda.run").run(config)
        else:
            result = run(config)
    except KeyboardInterrupt:
        kept = f"; the finished cases are in {unfinished_path(config.json)}" if config.json else ""
        print(f"\nbsgap bench: interrupted{kept}", file=sys.stderr)
        return 130
    ours = [row for case in result["cases"] for row in case.get("contenders", ()) if row["ours"]]
    failed = [row["name"] for row in ours if "error" in row or row["check"]["wrong"]]
    failed += [f"{row['name']} as a graph" for row in ours if _graph_failed(row.get("graph", {}))]
    failed += [f"the case {case['name']}" for case in result["cases"] if "error" in case]
    if failed:
        print(
            f"bsgap bench: wrong counts or failures of ours: {', '.join(sorted(set(failed)))}",
            file=sys.stderr,
        )
    return 1 if failed else 0


def _graph_failed(graph: dict[str, Any]) -> bool:
    return "error" in graph or bool(graph.get("wrong"))
