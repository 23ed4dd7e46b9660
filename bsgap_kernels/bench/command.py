"""The command line of the benchmark: `bsgap bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from .. import build_info
from .cases import CASES
from .config import BenchConfig
from .cuda.cases import GPU_CASES
from .cuda.run import run as run_on_gpu
from .isa import BENCH, measure_each, path_for
from .result import unfinished_path
from .run import run as run_on_cpu


class _Parser(argparse.ArgumentParser):
    """A mistake is one sentence, as everywhere on our command line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0; 1 if one of our counts is wrong or fails; 2 for senseless settings."""
    defaults = BenchConfig()
    first = _Parser(prog="bsgap bench", add_help=False, allow_abbrev=False)
    first.add_argument(
        "--isa",
        metavar="NAME",
        help="avx512, avx2, or all that this processor has: processes of their own, with torch, MKL and "
        "OpenBLAS held to it; default: this process as it is",
    )
    parser = _Parser(prog="bsgap bench", description="Times our ops beside their peers.", parents=[first])
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="result file, with the instruction set for {isa}; FILE.partial until complete",
    )
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
    parser.add_argument(
        "--rtol", type=float, nargs="+", help="default 0.01 0.001; 0.01 with --quick and on cuda"
    )
    parser.add_argument(
        "--measure",
        nargs="*",
        metavar="NAME",
        help="beside the cases; default: everything in a run of all cases, else nothing",
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="of torch and NumPy; default: as they are set"
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, help="default %(default)s")
    parser.add_argument("--device", default=defaults.device, help="cpu or cuda; default %(default)s")
    parser.add_argument(
        "--time-limit", type=float, metavar="SECONDS", help="cuda: begin nothing new after this"
    )
    options = vars(parser.parse_args(arguments))
    isa = options.pop("isa")
    if isa is not None:
        try:
            if options["device"] != "cpu":
                raise ValueError(f"isa is an option of the device cpu, got {options['device']!r}")
            return measure_each(isa, BENCH, first.parse_known_args(arguments)[1])
        except ValueError as error:
            print(f"bsgap bench: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:  # the process that measures says so
            return 130
    options["json"] = path_for(options["json"], build_info()["instruction_set"])
    return execute(BenchConfig(**options))


def execute(config: BenchConfig) -> int:
    """Runs a configuration for a command line and returns its exit code; a mistake is one sentence."""
    on_gpu = config.device == "cuda"
    wrong = config.problem(GPU_CASES if on_gpu else CASES)
    if wrong is not None:
        print(f"bsgap bench: {wrong}", file=sys.stderr)
        return 2
    try:
        result = run_on_gpu(config) if on_gpu else run_on_cpu(config)
    except KeyboardInterrupt:
        kept = f"; the finished cases are in {unfinished_path(config.json)}" if config.json else ""
        print(f"\nbsgap bench: interrupted{kept}", file=sys.stderr)
        return 130
    failed = failures(result)
    if failed:
        print(f"bsgap bench: wrong counts or failures of ours: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def failures(result: dict[str, Any]) -> list[str]:
    """What of ours is wrong or fails in a result."""
    ours = [row for case in result["cases"] for row in case.get("contenders", ()) if row["ours"]]
    failed = {row["name"] for row in ours if "error" in row or row["check"]["wrong"]}
    failed |= {f"{row['name']} as a graph" for row in ours if _graph_failed(row.get("graph", {}))}
    failed |= {f"the case {case['name']}" for case in result["cases"] if "error" in case}
    for name, measured in result.get("measurements", {}).items():
        if "error" in measured or any(row.get("wrong") for row in measured["rows"]):
            failed.add(f"the measurement {name}")
    return sorted(failed)


def _graph_failed(graph: dict[str, Any]) -> bool:
    return "error" in graph or bool(graph.get("wrong"))
