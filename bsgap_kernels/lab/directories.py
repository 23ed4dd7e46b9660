"""Directories of results: made, gone on with, or cleared, and never another one's files destroyed."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from bsgap_kernels.lab.checkpoint import FOLDER, Checkpoints
from bsgap_kernels.lab.config import RunOptions, SweepConfig, TrainConfig, UserError
from bsgap_kernels.lab.files import TEMPORARY, temporaries, write_text
from bsgap_kernels.lab.option_files import read_options
from bsgap_kernels.lab.results import FINISHED, METRICS_FILE, SUMMARY_FILE, WEIGHTS_FILE, read_summary

CONFIG_FILE = "config.yaml"
SWEEP_FILE = "sweep.yaml"
REPORT_FILE = "report.html"
SHARPNESS_FILE = "sharpness.json"
CURVES_FOLDER = "curves"
COMPARISON_FILE = "comparison.json"
# The summary first: a run that is half cleared is not done. The options last: it is still known as a run.
_RUN_FILES = (SUMMARY_FILE, METRICS_FILE, WEIGHTS_FILE, SHARPNESS_FILE, REPORT_FILE, CONFIG_FILE)
_RUN_NAME = re.compile(r"([\w-]+-)?b(\d+|full)-s\d+")
# Options that only files of ours name all of; few of them, so that files of other versions are known too.
_TELLING = {"data", "model", "lr_rule", "probe_size", "unfold", "rtol"}

_Options = TypeVar("_Options", TrainConfig, SweepConfig)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Make a directory and hold it alone inside the block; the system lets go of it when the process ends.

    Raises:
        UserError: it is a file, or another process holds it.
    """
    _refuse_file(directory)
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _at_work(directory) from None
        except OSError:  # a file system without locks
            pass
        # Another process may have cleared it away between the two: then this is not the directory any more.
        if not directory.is_dir() or not os.path.samestat(os.fstat(handle), directory.stat()):
            raise _at_work(directory)
        yield
    finally:
        os.close(handle)


def _at_work(directory: Path) -> UserError:
    return UserError(f"out: another process is at work on {directory}")


def open_run(directory: Path, config: TrainConfig) -> tuple[bool, dict[str, Any] | None]:
    """Make a run's directory with its config.yaml, or find the run that it holds.

    Returns whether it holds an earlier attempt of this run, and that one's summary if it is finished. With
    `config.overwrite` earlier results are removed first.

    Raises:
        UserError: it is a file; it holds something else, or a run with other options; or it holds no results
            to overwrite.
    """
    if config.overwrite:
        clear(directory)
    found = _read_options(directory / CONFIG_FILE, TrainConfig)
    if found is None:
        _make(directory, cleared=config.overwrite)
        write_config(directory / CONFIG_FILE, config)
        return False, None
    if different := config.differences(found):
        raise UserError(
            f"out: {directory} holds a run with other options ({'; '.join(different)}); name another "
            "directory or give --overwrite"
        )
    summary = read_summary(directory / SUMMARY_FILE)
    finished = summary.get("status") == FINISHED and (directory / WEIGHTS_FILE).is_file()
    return True, summary if finished else None


def open_sweep(directory: Path, config: SweepConfig) -> None:
    """Make a sweep's directory with its sweep.yaml, or find one that this sweep can go on with or extend.

    Methods, batch sizes and seeds may differ from the earlier sweep's, which keeps its runs; nothing else.

    Raises:
        UserError: as of `open_run`.
    """
    if config.overwrite:
        with locked(directory):
            clear(directory)
    found = _read_options(directory / SWEEP_FILE, SweepConfig)
    if found is None:
        _make(directory, cleared=config.overwrite)
    elif different := _shared_differences(config, found):
        raise UserError(
            f"out: {directory} holds a sweep with other options ({'; '.join(different)}); name another "
            "directory or give --overwrite"
        )
    write_config(directory / SWEEP_FILE, config)


def _shared_differences(config: SweepConfig, other: SweepConfig) -> list[str]:
    """Options that differ between runs of both; a method and a batch size may bring a learning rate."""
    kinds, others = (
        {(run.method, run.batch_size): run for run in options.runs()} for options in (config, other)
    )
    found: dict[str, None] = {}
    for kind, run in kinds.items():
        for other_kind, earlier in others.items():
            apart = ["batch_size:", "seed:"]
            if kind != other_kind:
                apart.append("lr:")
            if kind[0] != other_kind[0]:
                apart += ["method:", f"{kind[0]}:", f"{other_kind[0]}:"]
            texts = run.differences(earlier)
            found |= dict.fromkeys(text for text in texts if not text.startswith(tuple(apart)))
    return list(found)


def clear(directory: Path) -> None:
    """Take the files of earlier results out of a directory of the caller's alone, if it is there.

    It has to be a run's or a sweep's by its options, which a stranger's config.yaml does not hold; of a sweep
    the runs are cleared too. Only files that this package writes are removed, so a mistyped path cannot cost
    anything else.

    Raises:
        UserError: it is a file, it holds something and no results, or a process is at work on one of its
            runs; then nothing is removed.
    """
    _refuse_file(directory)
    if not directory.is_dir() or not any(directory.iterdir()):
        return
    is_sweep = _holds_options(directory / SWEEP_FILE)
    if not is_sweep and not _holds_options(directory / CONFIG_FILE):
        raise UserError(
            f"out: {directory} holds no {CONFIG_FILE} or {SWEEP_FILE} of this program, so it is not "
            "overwritten"
        )
    inside = directory.glob(f"*/{CONFIG_FILE}") if is_sweep else ()
    runs = [path.parent for path in inside if _RUN_NAME.fullmatch(path.parent.name) and _holds_options(path)]
    with ExitStack() as held:
        for run in runs:
            held.enter_context(locked(run))
        for run in runs:
            _clear_run(run)
            if not any(run.iterdir()):
                run.rmdir()
    if not is_sweep or _holds_options(directory / CONFIG_FILE):
        _clear_run(directory)
    for name in (REPORT_FILE, COMPARISON_FILE):
        (directory / name).unlink(missing_ok=True)
    curves = directory / CURVES_FOLDER
    if curves.is_dir():
        for pattern in ("*--*.json", f"*--*.json.*{TEMPORARY}"):
            for file in curves.glob(pattern):
                file.unlink(missing_ok=True)
        if not any(curves.iterdir()):
            curves.rmdir()
    (directory / SWEEP_FILE).unlink(missing_ok=True)


def _clear_run(run: Path) -> None:
    Checkpoints(run / FOLDER).clear()
    for name in _RUN_FILES:
        (run / name).unlink(missing_ok=True)
        for file, _ in temporaries(run / name):
            file.unlink(missing_ok=True)


def _holds_options(path: Path) -> bool:
    """Whether a file is one that `write_config` wrote, by the options that it names."""
    try:
        return read_options(path).keys() >= _TELLING
    except (OSError, UserError):
        return False


def _make(directory: Path, *, cleared: bool) -> None:
    """Make a directory for results; what is not ours stays in one that was cleared of earlier ones."""
    _refuse_file(directory)
    # A kill while the options were written leaves a temporary file.
    others = directory.is_dir() and any(path.suffix != TEMPORARY for path in directory.iterdir())
    if others and not cleared:
        raise UserError(
            f"out: {directory} already exists and is not empty; name another one or give --overwrite"
        )
    directory.mkdir(parents=True, exist_ok=True)


def _refuse_file(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise UserError(f"out: {directory} is a file, expected a directory or a new path")


def write_config(path: Path, config: RunOptions) -> None:
    """Write the resolved options as YAML; the same file can be given back by --config.

    Without `overwrite`, which was meant for what there was: given back, it would remove these results.
    """
    import yaml

    values = {**config.mapping(), "overwrite": False}
    write_text(path, yaml.safe_dump(values, sort_keys=False, default_flow_style=None))


def read_config(path: Path) -> TrainConfig:
    """The options of a run, from its config.yaml.

    Raises:
        UserError: the file is missing or holds something else.
    """
    config = _read_options(path, TrainConfig)
    if config is None:
        raise UserError(f"{path}: there is no such file, expected the options of a run")
    return config


def _read_options(path: Path, kind: type[_Options]) -> _Options | None:
    try:
        content = read_options(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return kind.from_mapping(content)
    except (UserError, TypeError) as error:
        raise UserError(f"{path}: {error}") from error
