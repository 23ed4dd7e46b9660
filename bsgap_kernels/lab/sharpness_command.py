"""`bsgap sharpness RUN [RUN]`: how sharp the minima of finished runs are, and the loss between two."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from bsgap_kernels.lab.checks import UserError, one_sentence
from bsgap_kernels.lab.directories import SHARPNESS_FILE
from bsgap_kernels.lab.objective import CHUNK
from bsgap_kernels.lab.saved import load_run
from bsgap_kernels.lab.sharpness import EPSILONS, ITERATIONS, SUBSPACE
from bsgap_kernels.lab.sharpness_run import SharpnessOptions, curves_of, sharpness_of
from bsgap_kernels.lab.stop import Stop, StoppedError, on_signals

_NOTE = (
    "φ: rise of the loss within the box of size ε, in % of 1 + train loss, as far as L-BFGS-B climbs; it\n"
    "compares at equal ε and similar train loss alone. At bound: share of the directions in which the\n"
    "search came to the box's border. Eval mode: running statistics, no dropout."
)


class _Parser(argparse.ArgumentParser):
    """A mistake is one sentence, as everywhere on our command line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0; 2 for a mistake; 128 + the signal's number when stopped."""
    with on_signals() as stop:
        try:
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise UserError("one process runs this command; start it without torchrun")
            runs, options, as_json = _options(arguments)
            _run(runs, options, as_json, stop)
        except UserError as error:
            return _mistake(str(error))
        except OSError as error:
            return _mistake(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        except (StoppedError, KeyboardInterrupt):
            print("bsgap sharpness: stopped; files that were written are whole", file=sys.stderr)
            return stop.exit_code
    return 0


def _mistake(message: str) -> int:
    if os.environ.get("RANK", "0") == "0":
        print(f"bsgap sharpness: {one_sentence(message)}", file=sys.stderr)
    return 2


def _run(runs: list[Path], options: SharpnessOptions, as_json: bool, stop: Stop) -> None:
    saved = [load_run(run) for run in runs]  # a mistake in the second one costs no measuring
    files = [run / SHARPNESS_FILE for run in runs]
    curves = None
    if len(runs) == 2:
        # First, since this is where two runs turn out not to fit.
        both = (saved[0], saved[1])
        path, curves = curves_of(runs[0], runs[1], options, saved=both, say=_say, stop=stop)
        files.append(path)
    records = [
        sharpness_of(run, options, saved=loaded, say=partial(_say, of=f"{run}: "), stop=stop)
        for run, loaded in zip(runs, saved, strict=True)
    ]
    if as_json:
        # From the files, where what is not finite is null.
        written = [json.loads(path.read_text(encoding="utf-8")) for path in files]
        between = written[2] if curves is not None else None
        print(json.dumps({"runs": written[: len(runs)], "curves": between}, indent=2))
        return
    print(format_sharpness(records))
    if curves is not None:
        print()
        print(format_curves(curves))
    for path in files:
        print(f"Written: {path}")


def _say(what: str, of: str = "") -> None:
    print(f"bsgap sharpness: {of}{what}", file=sys.stderr, flush=True)


def format_sharpness(records: Sequence[dict[str, Any]]) -> str:
    """The table of φ, one row a run under each space and ε, with ε and train loss beside every φ."""
    header = ["run", "space", "ε", "train loss", "max loss", "φ", "at bound"]
    header += ["iterations", "evaluations", "seconds"]
    rows, remarks = [], []
    for index, first in enumerate(records[0]["sharpness"]):
        for record in records:
            one = record["sharpness"][index]
            space = "full" if first["space"] == "full" else f"subspace {one['dimension']}"
            row = [record["run"], space, f"{one['epsilon']:g}"]
            row += [_number(one[key]) for key in ("loss", "max_loss", "phi", "at_bound")]
            row += [str(one["iterations"]), str(one["evaluations"]), f"{one['seconds']:.1f}"]
            rows.append(row)
            if one["phi"] is None:
                remarks.append(f"{record['run']}, {space}, ε {one['epsilon']:g}: {one['message']}")
    for record in records:
        rows_used = f"{record['images']} of {record['of']} training images"
        line = f"{record['run']}: {rows_used}, train accuracy {_number(record['train_accuracy'])}"
        if hessian := record["hessian"]:
            value, residual = _number(hessian["max_eigenvalue"]), _number(hessian["residual"])
            line += (
                f"; largest Hessian eigenvalue {value} (residual {residual}, {hessian['products']} products)"
            )
            if hessian["max_eigenvalue"] is None:
                remarks.append(f"{record['run']}: {hessian['message']}")
        remarks.append(line)
    return "\n".join([*_table(header, rows), *remarks, _NOTE])


def format_curves(curves: dict[str, Any]) -> str:
    """Loss and accuracy at both ends, and the highest training loss between them, for either curve."""
    header = ["curve", "run", "α", "train loss", "train acc", "test loss", "test acc"]
    rows = []
    for curve in curves["curves"]:
        alphas = curve["alpha"]
        inside = [i for i, alpha in enumerate(alphas) if 0 < alpha < 1]
        highest = max(inside, key=lambda i: _height(curve["train_loss"][i]))
        for name, index in ((curves["a"], alphas.index(0.0)), ("highest between", highest)):
            rows.append(_point(curve, name, index))
        rows.append(_point(curve, curves["b"], alphas.index(1.0)))
    lines = _table(header, rows)
    if curves["batch_norm"]:
        lines.append("Batch norm's statistics are estimated anew at every point, the ends included.")
    return "\n".join(lines)


def _point(curve: dict[str, Any], name: str, index: int) -> list[str]:
    keys = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
    return [curve["kind"], name, f"{curve['alpha'][index]:g}", *(_number(curve[key][index]) for key in keys)]


def _height(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in [header, *rows]
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.4g}"


def _options(arguments: Sequence[str] | None) -> tuple[list[Path], SharpnessOptions, bool]:
    parser = _Parser(
        prog="bsgap sharpness",
        description="Sharpness φ of a finished run's minimum in the full space and in a random subspace, and "
        "the Hessian's largest eigenvalue; of two runs also the loss along a line and an arc between them.",
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="directory of a run; one or two")
    add("--epsilon", default=",".join(f"{e:g}" for e in EPSILONS), metavar="LIST", help="default %(default)s")
    add(
        "--subspace",
        type=int,
        default=SUBSPACE,
        metavar="K",
        help="columns of the random matrix; 0 leaves the subspace out; default %(default)s",
    )
    add("--iterations", type=int, default=ITERATIONS, help="of L-BFGS-B; default %(default)s")
    add("--images", type=int, metavar="N", help="training images to use; default: all")
    add("--seed", type=int, default=0, help="of the random matrix and of Lanczos; default %(default)s")
    add("--no-hessian", action="store_true", help="leave the Hessian's eigenvalue out")
    add("--double", action="store_true", help="run the network in float64")
    add("--chunk", type=int, default=CHUNK, help="images of one pass; default %(default)s")
    add("--device", help="cpu or cuda; default: that of the run")
    add("--json", action="store_true", help="print one JSON object instead of tables")
    parsed = parser.parse_args(arguments)
    runs = [Path(run).expanduser() for run in parsed.runs]
    if len(runs) > 2:
        raise UserError(f"runs: got {len(runs)}, expected one or two directories")
    for run in runs:
        if not run.is_dir():
            raise UserError(f"runs: looked at {run} and found no such directory, expected a run")
    options = SharpnessOptions(
        epsilons=_numbers(parsed.epsilon),
        subspace=parsed.subspace,
        iterations=parsed.iterations,
        images=parsed.images,
        seed=parsed.seed,
        hessian=not parsed.no_hessian,
        double=parsed.double,
        chunk=parsed.chunk,
        device=parsed.device,
    )
    return runs, options, parsed.json


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(item) for item in text.split(",") if item.strip())
    except ValueError as error:
        raise UserError(f"epsilon: got {text!r}, expected numbers separated by commas") from error
