"""`bsgap overhead`: what tracking costs the training step of the lab's models."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

import torch

from .. import build_info
from ..lab.config import MODELS
from ..tracking import RankTracker
from . import machine
from .isa import OVERHEAD, measure_each, path_for
from .overhead import BUDGET_S, ROUNDS, measure_overhead
from .overhead_report import text_report, write_chart
from .overhead_result import OverheadResult
from .overhead_subjects import DIGITS, RANDOM, Subject
from .overhead_ways import DELVE, OURS
from .progress import Progress
from .result import write_result

SCHEMA = 1
UNFOLDS = ("channel", "flatten", "pool")


class _Parser(argparse.ArgumentParser):
    """A mistake is one sentence, as everywhere on our command line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0; 1 if our counts are wrong or our tracker failed; 2 for a mistake."""
    first = _Parser(prog="bsgap overhead", add_help=False, allow_abbrev=False)
    first.add_argument(
        "--isa",
        metavar="NAME",
        help="avx512, avx2, or all that this processor has: processes of their own, with torch held to it; "
        "default: this process as it is",
    )
    try:
        options = _options(arguments, first)
        if options.isa is not None:
            if options.device != "cpu":
                raise ValueError(f"isa: an option of the device cpu, got {options.device}")
            return measure_each(options.isa, OVERHEAD, first.parse_known_args(arguments)[1])
        subjects = [
            Subject(model, options.batch, options.data, options.device, options.compile, options.seed)
            for model in options.model
        ]
        for subject in subjects:  # a mistake costs no measuring
            model, _ = subject.build()
            RankTracker(model, layers=options.layers).close()
    except ValueError as error:
        print(f"bsgap overhead: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # a process that measures says so
        return 130
    try:
        return 1 if run(options, subjects) else 0
    except KeyboardInterrupt:
        print("\nbsgap overhead: interrupted", file=sys.stderr)
        return 130


def run(
    options: argparse.Namespace, subjects: Sequence[Subject], *, out: Callable[[str], None] = print
) -> list[str]:
    """Measure every subject, print and write what was found; returns what of ours is wrong."""
    if options.threads is not None:
        machine.set_threads(options.threads)
    settings = {k: v for k, v in vars(options).items() if k not in ("json", "chart", "threads", "isa")}
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": "overhead",
        "complete": False,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **machine.describe(),
        "settings": settings,
        "models": [],
        "targets": [],
    }
    if options.device == "cuda":
        record["machine"]["gpu"] = torch.cuda.get_device_name()
    results: list[tuple[str, OverheadResult]] = []
    for subject in subjects:
        progress = Progress(subject.title)
        model: Any
        model, step = (subject.build, None) if subject.compile else subject.build()
        result = measure_overhead(
            model,
            step,
            unfold=options.unfold,
            rtol=options.rtol,
            layers=options.layers,
            every=options.every,
            max_overhead=options.max_overhead,
            ways=(OURS,) if options.quick else None,
            check=not options.quick,
            rounds=options.rounds,
            budget_s=options.budget,
            seed=options.seed,
            progress=progress,
        )
        progress.done()
        results.append((subject.title, result))
        record["models"].append(
            {"name": subject.title, "model": subject.model, "data": subject.feed, **result.as_dict()}
        )
        record["targets"] += result.targets(subject.title)
        write_result(options.json, record)
        out(text_report(subject.title, result) + "\n")
    if not any(way.name == DELVE for _, result in results for way in result.ways):
        out("delve is not installed, so it was not measured: pip install delve")
    record["complete"] = True
    write_result(options.json, record)
    if options.chart is not None:
        write_chart(options.chart, results)
    for path in (options.json, options.chart):
        if path is not None:
            out(f"Written: {path}")
    failed = [f"{name}: {OURS}" for name, result in results if result.way(OURS).error is not None]
    return failed + [f"{name}: {site}" for name, result in results for site in result.wrong]


def _options(arguments: Sequence[str] | None, first: argparse.ArgumentParser) -> argparse.Namespace:
    parser = _Parser(
        prog="bsgap overhead",
        description="What tracking costs a training step: without, with naive hooks (matrix_rank), with "
        "delve where it is installed, with ours; in turns, per layer and in all.",
        parents=[first],
    )
    add = parser.add_argument
    add("--model", nargs="+", default=["resnet56"], metavar="NAME", help=f"some of {', '.join(MODELS)}")
    add("--batch", type=int, default=128, help="images of a batch; default %(default)s")
    add("--data", help=f"{DIGITS} or {RANDOM} images; default: digits for lenet5, else random")
    add("--unfold", default="channel", help=f"{', '.join(UNFOLDS)}; default %(default)s")
    add("--rtol", type=float, default=1e-2, help="default %(default)s")
    add("--layers", nargs="+", metavar="GLOB", help="modules to read; default: every nonlinearity")
    add("--every", type=int, default=1, help="ours: track every so many steps; default %(default)s")
    add("--max-overhead", type=float, metavar="SHARE", help="ours: such as 0.01; adapts the cadence")
    add("--rounds", type=int, default=ROUNDS, help="samples of a way at most; default %(default)s")
    add(
        "--budget",
        type=float,
        default=BUDGET_S,
        metavar="SECONDS",
        help="of timed steps of a way; default %(default)s",
    )
    add("--threads", type=int, metavar="N", help="of torch and NumPy; default: as they are set")
    add("--compile", action="store_true", help="torch.compile the model; a model for every way")
    add("--device", default="cpu", help="cpu or cuda; default %(default)s")
    add("--seed", type=int, default=0, help="default %(default)s")
    add("--quick", action="store_true", help="no tracking and ours only, without checking counts")
    add("--json", type=Path, metavar="FILE", help="write the result as JSON, the instruction set for {isa}")
    add("--chart", type=Path, metavar="FILE", help="write bars as one HTML file (needs bokeh)")
    options = parser.parse_args(arguments)
    options.json = path_for(options.json, build_info()["instruction_set"])
    for model in options.model:
        _one_of("model", model, MODELS)
    _one_of("unfold", options.unfold, UNFOLDS)
    _one_of("device", options.device, ("cpu", "cuda"))
    if options.data is not None:
        _one_of("data", options.data, (DIGITS, RANDOM))
    for name in ("batch", "every", "rounds", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}: got {value}, expected an integer of at least 1")
    for name in ("rtol", "max_overhead"):
        value = getattr(options, name)
        if value is not None and not 0 < value < 1:
            raise ValueError(f"{name.replace('_', '-')}: got {value}, expected a number between 0 and 1")
    if not options.budget >= 0:
        raise ValueError(f"budget: got {options.budget}, expected a number of seconds")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got cuda, and torch sees no CUDA device here")
    for name in ("json", "chart"):
        path = getattr(options, name)
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ValueError(f"{name}: got {path}, expected a file in an existing folder")
    if options.chart is not None:
        _require_bokeh()
    return options


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(known)}")


def _require_bokeh() -> None:
    from ..lab.optional import require

    require("bokeh")
