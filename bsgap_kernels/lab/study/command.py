"""`bsgap study`: run the study of plan.yaml, or what is left of it, and print its verdicts."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from bsgap_kernels.lab.checks import UserError, one_sentence
from bsgap_kernels.lab.launchers import cores
from bsgap_kernels.lab.optional import require
from bsgap_kernels.lab.stop import Stop, StoppedError, on_signals
from bsgap_kernels.lab.study.page import verdicts
from bsgap_kernels.lab.study.plan import PLAN, load_plan
from bsgap_kernels.lab.study.run import RESULT_FILE, cells, run_study, write_result


class _Parser(argparse.ArgumentParser):
    """A mistake is one sentence, as everywhere on our command line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0; 2 for a mistake; 128 + the signal's number when stopped."""
    try:
        with on_signals() as stop:
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise UserError("one process runs this command; start it without torchrun")
            return _study(_options(arguments), stop)
    except UserError as error:
        print(f"bsgap study: {one_sentence(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"bsgap study: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except StoppedError as error:
        print(f"bsgap study: {error}", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("bsgap study: stopped; what was measured until then is kept", file=sys.stderr)
        return 130


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="bsgap study",
        description="Run the study of large batches as its plan declares it; the same command goes on where "
        "it was stopped.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="directory of the results")
    parser.add_argument("--plan", type=Path, default=PLAN, help="the plan; the default is the package's own")
    parser.add_argument(
        "--jobs",
        type=int,
        default=cores(),
        help="runs side by side (%(default)s)",
    )
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        raise UserError(f"jobs: got {options.jobs}, expected an integer of at least 1")
    return options


def _study(options: argparse.Namespace, stop: Stop) -> int:
    # Asked for first, so that a missing library does not show after the training.
    require("scipy")
    report = require("bsgap_kernels.lab.report")
    plan = load_plan(options.plan)
    print(f"Study of {options.plan} into {options.out}", flush=True)
    result = run_study(
        plan, options.out, jobs=options.jobs, stop=stop, say=lambda text: print(text, flush=True)
    )
    if result is None:
        print("bsgap study: stopped, and checkpoints saved; the same command goes on there", file=sys.stderr)
        return stop.exit_code
    write_result(options.out / RESULT_FILE, result)
    for _, _, name in cells(plan):
        print(f"report: {report.write_report(options.out / name)}")
    print()
    print(verdicts(plan, result))
    print(f"result: {options.out / RESULT_FILE}")
    return 0
