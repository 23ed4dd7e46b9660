"""The command `bsgap`: trains, compares, reports, measures; `bsgap --help` lists its commands.

Beyond the package itself, which needs torch, a command imports what it uses when it runs, and `bsgap --help`
nothing. A user's mistake is one sentence on stderr and exit code 2; a traceback is a bug of ours.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from bsgap_kernels.lab.checks import UserError, one_sentence
from bsgap_kernels.lab.optional import require
from bsgap_kernels.lab.stop import StoppedError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from bsgap_kernels.lab.config import RunOptions, SweepConfig

# At this rate every batch size gets there, so that one rate serves all. Of the full batch, whose updates take
# most of the time, every fifth is evaluated: often enough to end in time.
DEMO = {"lr": 0.02, "max_evaluations": 200, "probe_every": 10, "unfold": "flatten"}
DEMO_STEPS = 1000

_COMMANDS = {
    "train": "train one network and log the near-rank of every layer at every step",
    "sweep": "train at several batch sizes and seeds, print the table, write report.html",
    "compare": "train by several methods at a large batch, and by plain SGD at a small one, side by side",
    "report": "write an HTML report for a sweep, a run, or what RankTracker wrote",
    "demo": "sweep of LeNet-5 on digits at batch 16, 128 and full, in under two minutes on two cores",
    "sharpness": "how sharp the minimum of a run is, and the loss along curves between two runs",
    "study": "run the study of large batches as its plan declares it",
    "bench": "time the ops beside torch's and NumPy's, with the counts checked",
    "overhead": "time a training step without tracking, with naive hooks, with ours",
    "roofline": "bytes, operations and floor times of tracking a model on a GPU",
    "info": "versions, build and backends",
}
# Commands with a parser of their own, so that they run without the trainer's dependencies.
_SELF_PARSED = {
    "bench": "bsgap_kernels.bench.command",
    "study": "bsgap_kernels.lab.study.command",
    "overhead": "bsgap_kernels.bench.overhead_command",
    "roofline": "bsgap_kernels.bench.roofline_report",
    "sharpness": "bsgap_kernels.lab.sharpness_command",
}
# Commands that write files of their own and would write them once for each process.
_ALONE = ("sweep", "compare", "report", "demo")
# What `bsgap compare` takes where a sweep's option is not given. The learning rate is tuned at the reference.
_COMPARED = {
    "methods": "sgd,legw,autowu,fb-reg,conadv,decentlam,rank-reg",
    "batch_sizes": "256",
    "reference": 16,
    "base_batch_size": 16,
    "sharpness": True,
    "every": None,
    "max_probes": 100,
}
_COMPARED_EPOCHS = 60
_TYPE_NAMES = {"int": "an integer", "float": "a number", "bool": "true or false", "NoneType": "null"}
_Options = TypeVar("_Options", bound="RunOptions")
_EXIT_MISTAKE = 2
_EXIT_INTERRUPTED = 130
_EXIT_TERMINATED = 143
_STOPPED = "stopped, and a checkpoint saved; the same command on the same --out goes on there"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(_usage())
        return 0
    if command not in _COMMANDS:
        return _mistake("bsgap", f"got the command {command!r}, expected one of {', '.join(_COMMANDS)}")
    handler: dict[str, Callable[[list[str]], int | None]] = {
        "train": _train,
        "sweep": _sweep,
        "compare": _compare,
        "report": _report,
        "demo": _demo,
        "info": _info,
    }
    if command in _SELF_PARSED:
        return int(importlib.import_module(_SELF_PARSED[command]).main(arguments[1:]))
    try:
        if command in _ALONE and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("one process runs this command; under torchrun run bsgap train")
        return handler[command](arguments[1:]) or 0
    except UserError as error:
        return _mistake(f"bsgap {command}", str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _mistake(f"bsgap {command}", f"{where}{error.strerror or error}")
    except StoppedError as error:
        print(f"bsgap {command}: {error}", file=sys.stderr)
        return _EXIT_TERMINATED
    except KeyboardInterrupt:
        print(f"bsgap {command}: stopped; what was measured until then is kept", file=sys.stderr)
        return _EXIT_INTERRUPTED


def _usage() -> str:
    width = max(map(len, _COMMANDS))
    lines = [f"  {name.ljust(width)}  {text}" for name, text in _COMMANDS.items()]
    return "\n".join(
        [
            "usage: bsgap COMMAND [options]",
            "",
            *lines,
            "",
            "bsgap COMMAND --help lists the options of a command.",
        ]
    )


def _mistake(program: str, message: str) -> int:
    # Under torchrun every process finds the same mistake: one of them says so.
    if os.environ.get("RANK", "0") == "0":
        print(f"{program}: {one_sentence(message)}", file=sys.stderr)
    return _EXIT_MISTAKE


# -- options


def _parser(command: str) -> ArgumentParser:
    jsonargparse = require("jsonargparse")

    class Parser(jsonargparse.ArgumentParser):  # type: ignore[name-defined, misc]
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            names = [option for action in self._actions for option in action.option_strings]
            raise UserError(_explain(message, names)) from ex

    parser: ArgumentParser = Parser(prog=f"bsgap {command}", description=_COMMANDS[command])
    return parser


def _explain(message: str, names: list[str]) -> str:
    """jsonargparse's message in the words of our own checks: the option, what came, what is expected."""
    text = " ".join(message.split())
    if match := re.match(r"Parser key \"(\w+)\": .*Subtypes: \[<class '[\w.]+Options'>", text):
        # An option that is a group of options: the parser of the group has explained its own mistake.
        name = match[1]
        if inner := re.search(r"Errors: - (\w+: (?:got|unknown) .*?) - Expected a <class", text):
            return f"{name}.{inner[1].replace('--', f'--{name}.')}"
        value = text.rpartition("Given value: ")[2]
        return f"{name}: got {value!r}, expected its options one by one, as in --help, or null"
    if match := re.match(r"Parser key \"([\w.]+)\": .*?(?:Got|Given) value: (.*)", text):
        types = [_TYPE_NAMES.get(name, name) for name in re.findall(r"Expected a <class '(\w+)'>", text)]
        if types:
            group, dot, option = match[1].rpartition(".")
            name = group.replace("_", "-") + dot + option  # the parser's names have no hyphens
            return f"{name}: got {match[2]!r}, expected {' or '.join(dict.fromkeys(types))}"
    if match := re.match(r"unrecognized arguments: (\S+)|Option '(\S+)' is not accepted", text):
        name = (match[1] or "--" + match[2]).partition("=")[0]
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"; the nearest is {near[0]}" if near else ""
        return f"{name.removeprefix('--') if match[2] else name}: unknown option{hint}"
    return text.split(" Note:")[0]


def _parse_options(
    command: str,
    options: type[_Options],
    arguments: list[str],
    defaults: Mapping[str, Any] = MappingProxyType({}),
    epochs: int | None = None,
) -> _Options:
    from bsgap_kernels.lab import methods
    from bsgap_kernels.lab.fitted import TARGET

    parser = _parser(command)
    parser.add_argument(
        "--config", action="config", help="YAML file of these options; those on the command line win"
    )
    parser.add_class_arguments(options, as_group=False, skip={"hyper"})
    switches = {field.name for field in dataclasses.fields(options) if isinstance(field.default, bool)}
    for name, method in methods.REGISTRY.items():
        parser.add_class_arguments(method.hyper_type, name, as_group=False)
        fields = dataclasses.fields(method.hyper_type)
        group = name.replace("-", "_")  # as the parser names it
        switches |= {f"{group}.{field.name}" for field in fields if isinstance(field.default, bool)}
    parser.set_defaults(dict(defaults))
    for action in parser._actions:
        if command == "compare" and action.dest == "batch_sizes":
            action.help = f"{action.help} Also written --batch."
        if epochs is not None and action.dest == "epochs":
            action.help = str(action.help).replace("(20 if", f"({epochs} if")
        if action.dest in switches:
            # `--overwrite` alone means true; a value is still possible.
            action.nargs, action.const = "?", True
        elif action.dest == "until_fitted":
            action.nargs, action.const, action.metavar = "?", TARGET, "ACCURACY"
        elif action.metavar is None and action.option_strings and action.nargs != 0:
            action.metavar = "VALUE"
    given = [_underscored(argument) for argument in arguments]
    sources = _sources(given)
    try:
        values: dict[str, Any] = parser.parse_args(given).as_dict()
        values.pop("config", None)
        if values["epochs"] is None and values["steps"] is None and values["until_fitted"] is None:
            values["epochs"] = epochs
        return options.from_mapping(values)
    except UserError as error:
        option = re.match(r"[\w-]+", str(error))
        source = sources.get(option[0].replace("-", "_")) if option else None
        if source is None:
            raise
        raise UserError(f"{source}: {error}") from error


def _sources(arguments: list[str]) -> dict[str, Path]:
    """The file of each option that a --config file gives and the command line does not."""
    from bsgap_kernels.lab.option_files import read_options

    files = [value for name, value in itertools.pairwise(arguments) if name == "--config"]
    files += [
        argument.removeprefix("--config=") for argument in arguments if argument.startswith("--config=")
    ]
    sources: dict[str, Path] = {}
    for file in map(Path, files):
        try:
            options = read_options(file)
        except FileNotFoundError:
            raise UserError(f"config: looked at {file} and found no such file") from None
        sources |= {name.replace("-", "_"): file for name in options}
    own = [re.split("[=.]", argument.removeprefix("--"))[0] for argument in arguments if argument[:2] == "--"]
    return {name: file for name, file in sources.items() if name not in own}


def _underscored(argument: str) -> str:
    """Accept --batch-size beside --batch_size: the options are the fields of the dataclass."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _directory(command: str, out: str | None) -> Path:
    return Path(out).expanduser() if out else Path("runs") / f"{command}-{time.strftime('%Y%m%d-%H%M%S')}"


# -- commands


def _train(arguments: list[str]) -> int:
    from bsgap_kernels.lab.config import TrainConfig

    config = _parse_options("train", TrainConfig, arguments)
    directory = _directory("train", config.out)
    from bsgap_kernels.lab.distributed import launched
    from bsgap_kernels.lab.results import FINISHED
    from bsgap_kernels.lab.stop import on_signals
    from bsgap_kernels.lab.sweep import format_table
    from bsgap_kernels.lab.train import train

    with launched(config.device) as ranks, on_signals() as stop:
        summary = train(config, directory, ranks=ranks, stop=stop)
    if ranks.main:
        print(format_table([summary]))
        print(f"results: {directory}")
    if summary["status"] == FINISHED:
        return 0
    if ranks.main:
        print(f"bsgap train: {_STOPPED}", file=sys.stderr)
    return stop.exit_code or _EXIT_TERMINATED  # another rank may have got the signal


def _sweep(arguments: list[str]) -> int:
    from bsgap_kernels.lab.config import SweepConfig

    config = _parse_options("sweep", SweepConfig, arguments)
    return _run_sweep(config, _directory("sweep", config.out), "sweep")


def _compare(arguments: list[str]) -> int:
    from bsgap_kernels.lab.config import SweepConfig

    arguments = [re.sub(r"^--batch([-_]size)?(?=$|=)", "--batch-sizes", argument) for argument in arguments]
    config = _parse_options("compare", SweepConfig, arguments, _COMPARED, epochs=_COMPARED_EPOCHS)
    return _run_sweep(config, _directory("compare", config.out), "compare")


def _run_sweep(config: SweepConfig, directory: Path, command: str) -> int:
    # Asked for first, so that a missing library does not show after the training.
    if config.sharpness:
        require("scipy")
    report = require("bsgap_kernels.lab.report")
    from bsgap_kernels.lab.stop import on_signals
    from bsgap_kernels.lab.sweep import FailedRunsError, format_table, sweep

    failed: FailedRunsError | None = None
    with on_signals() as stop:
        try:
            summaries = sweep(config, directory, stop=stop)
        except FailedRunsError as error:
            failed, summaries = error, error.summaries
    if stop:
        print(f"bsgap {command}: {_STOPPED}", file=sys.stderr)
        return stop.exit_code
    if failed and not summaries:
        raise failed
    path = report.write_report(directory)
    print()
    if command == "compare":
        from bsgap_kernels.lab.comparison import compare, format_comparison

        print(format_comparison(compare(summaries, directory)))
    else:
        print(format_table(summaries))
    print(f"report: {path}")
    if failed:
        raise failed
    return 0


def _demo(arguments: list[str]) -> int:
    parser = _parser("demo")
    parser.add_argument(
        "--out", type=str, default=None, help="directory of the results; null: a new one under runs/"
    )
    parser.add_argument(
        "--seeds", type=str, default="0", help="seeds separated by commas; each adds about half a minute"
    )
    parser.add_argument("--steps", type=int, default=DEMO_STEPS, help="most updates of a run")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results in that directory")
    options = parser.parse_args([_underscored(argument) for argument in arguments]).as_dict()
    from bsgap_kernels.lab.config import SweepConfig
    from bsgap_kernels.lab.fitted import TARGET

    fixed = {**DEMO, "until_fitted": TARGET, "batch_sizes": "16,128,full"}
    config = SweepConfig.from_mapping({**options, **fixed})
    directory = _directory("demo", config.out)
    print(
        "Training LeNet-5 on scikit-learn's digits (1437 training and 360 test images, 28×28) at batch 16,\n"
        f"128 and full batch at learning rate {config.lr:g}, each until it has learnt its training images\n"
        f"({config.budget}), so that equally trained networks are compared.\n"
        "The near-rank of a layer, how many singular values of its activations exceed "
        f"{config.rtol:g} of the largest\n"
        "one, is counted at every step on the training batch; and every "
        f"{config.probe_every} steps, with proven bounds and\n"
        f"spectral summaries, on one fixed probe batch of {config.probe_size} images.\n"
        f"Results go to {directory}\n",
        flush=True,
    )
    return _run_sweep(config, directory, "demo")


def _report(arguments: list[str]) -> None:
    parser = _parser("report")
    add = parser.add_argument
    add(
        "path",
        nargs="+",
        help="directory of a sweep or of a run; or a RankTracker's .jsonl or .parquet files, or a folder of "
        "them, several to compare",
    )
    add("--out", metavar="FILE", help="of a RankTracker's files: the report; default: beside the first")
    options = parser.parse_args(arguments)
    paths = [Path(path).expanduser() for path in options.path]
    for path in paths:
        if not path.exists():
            raise UserError(
                f"path: looked at {path} and found nothing, expected a sweep, a run or a tracker's file"
            )
    report = require("bsgap_kernels.lab.report")
    try:
        if report.is_tracked(paths):
            path = report.write_tracked_report(paths, Path(options.out).expanduser() if options.out else None)
        elif len(paths) > 1 or options.out:
            raise UserError("path: got a directory of the trainer's, expected it alone and without --out")
        else:
            path = report.write_report(paths[0])
    except ValueError as error:
        raise UserError(str(error)) from error
    print(f"report: {path}")


def _info(arguments: list[str]) -> None:
    parser = _parser("info")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    as_json = parser.parse_args(arguments).json
    from bsgap_kernels.lab.versions import versions

    torch = importlib.import_module("torch")
    package = importlib.import_module("bsgap_kernels")
    build_info = getattr(package, "build_info", None)
    information: dict[str, Any] = {
        "versions": versions(),
        "build": build_info() if callable(build_info) else None,
        "backends": {
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        },
    }
    if as_json:
        print(json.dumps(information, indent=2, default=str))
        return
    for section, content in information.items():
        print(section)
        items = content.items() if isinstance(content, dict) else [("", content)]
        for name, value in items:
            print(
                f"  {name}: {'-' if value is None else value}"
                if name
                else f"  {'-' if value is None else value}"
            )
