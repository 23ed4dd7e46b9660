"""One run from its options to its files: made, gone on with after a stop, or skipped where it is done."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from bsgap_kernels.lab import results
from bsgap_kernels.lab.checkpoint import FOLDER, Checkpoints
from bsgap_kernels.lab.config import TrainConfig
from bsgap_kernels.lab.data import ImageData
from bsgap_kernels.lab.directories import locked, open_run
from bsgap_kernels.lab.distributed import ALONE, Ranks
from bsgap_kernels.lab.fitted import sentence
from bsgap_kernels.lab.loop import Loop
from bsgap_kernels.lab.progress import Progress
from bsgap_kernels.lab.setup import Setup, resolve_device, set_up
from bsgap_kernels.lab.stop import NEVER, Stop
from bsgap_kernels.lab.summary import summary_of
from bsgap_kernels.lab.threads import use_threads


def train(
    config: TrainConfig,
    directory: Path,
    *,
    data: ImageData | None = None,
    ranks: Ranks = ALONE,
    stop: Stop = NEVER,
) -> dict[str, Any]:
    """Train one network, write its files to `directory`, and return the summary.

    Written are config.yaml, metrics.jsonl, summary.json, weights.pt, and checkpoints while the run works.
    The same call on the same directory goes on at the last checkpoint, wherever the run was stopped or
    killed, and returns the summary of a run that is done. On a CPU, with one process and the same number of
    threads, weights and values, times apart, are bit-identical to those of a run that nothing disturbed; rows
    carry the number of the attempt that wrote them, and none is there twice.

    Batches are drawn without replacement from a new permutation every epoch; the rows left over at the end of
    an epoch are dropped, so that every training batch has the same shape (the shape alone moves a near-rank).

    With several `ranks` every one calls this with the same configuration; each takes its share of every
    batch, of the probe and of the evaluation, numbers are those of one process on the whole batch (up to
    rounding, and without dropout, whose masks are alike on all ranks), and rank 0 writes the files, which all
    ranks read to go on, and shows progress.

    Once `stop` is set, the run ends its step, saves a checkpoint and returns a summary whose status is
    `stopped`. The caller's random state is left as it was.

    Raises:
        UserError: an option does not fit, or `directory` holds something else and `config.overwrite` is not
            set.
    """
    device = resolve_device(config.device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), use_threads(config.threads):
        setup = ranks.together(lambda: set_up(config, data, ranks))
        with closing(setup), ExitStack() as held:
            opened = ranks.together(lambda: _open(config, directory, ranks, held))
            earlier, finished = ranks.from_main(opened)
            if finished is not None:
                if ranks.main:
                    Checkpoints(directory / FOLDER).clear()
                    print(f"{config.run}: done already, nothing is trained again", flush=True)
                return finished
            return _run(setup, directory, stop, earlier=earlier)


def _open(
    config: TrainConfig, directory: Path, ranks: Ranks, held: ExitStack
) -> tuple[bool, dict[str, Any] | None]:
    """What `open_run` finds, on the rank that writes; the directory is locked until `held` ends."""
    if not ranks.main:
        return False, None
    held.enter_context(locked(directory))
    return open_run(directory, config)


def _run(setup: Setup, directory: Path, stop: Stop, *, earlier: bool) -> dict[str, Any]:
    config, ranks = setup.config, setup.ranks
    checkpoints = Checkpoints(directory / FOLDER, config.keep_checkpoints)
    loop = Loop(setup)
    if earlier:
        _go_on(loop, checkpoints)
    status = results.STOPPED
    weights = None
    first_step = loop.done if earlier else None
    with results.open_writer(directory, config.run, first_step, write=ranks.main) as writer:
        try:
            with Progress(setup.steps, config.run, shown=ranks.main) as progress:
                save = _saving(loop, checkpoints, writer)
                if loop.run(writer, progress, stop, save):
                    status = results.FINISHED
                    writer.sync()
                    if ranks.main:
                        weights = results.write_weights(directory / results.WEIGHTS_FILE, setup.model)
        finally:
            # Also after an error: what was measured until then stays readable.
            summary = summary_of(loop, status, weights)
            summary["attempts"] = writer.attempt + 1
            if ranks.main:
                results.write_summary(directory / results.SUMMARY_FILE, summary)
    if status == results.FINISHED and ranks.main:
        checkpoints.clear()
        if config.until_fitted is not None and loop.ended is not None:
            accuracy = loop.evaluation["train_eval.accuracy"]
            print(
                f"{config.run}: {sentence(loop.ended, loop.done, accuracy, config.until_fitted)}", flush=True
            )
    return summary


def _go_on(loop: Loop, checkpoints: Checkpoints) -> None:
    """Load the newest checkpoint that is whole, and say where the run goes on and what is damaged."""
    ranks, run = loop.setup.ranks, loop.setup.config.run
    problems: list[str] = []
    state = ranks.from_main(checkpoints.load(problems) if ranks.main else None)
    if state is not None:
        loop.load_state_dict(state)
    if ranks.main:
        for problem in problems:
            print(f"{run}: {problem}", file=sys.stderr, flush=True)
        print(f"{run}: goes on at step {loop.done}/{loop.setup.steps}", flush=True)


def _saving(loop: Loop, checkpoints: Checkpoints, writer: results.Writer) -> Callable[[], None]:
    """What the loop calls between steps: saves a checkpoint when it is due or the run is asked to stop."""
    config, ranks = loop.setup.config, loop.setup.ranks
    # What is gathered from all ranks they save together, when the clock of rank 0 says.
    together = ranks.world > 1 and loop.setup.method.gathered
    saved = time.monotonic()

    def save() -> None:
        nonlocal saved
        due = config.checkpoint_seconds is not None and time.monotonic() - saved >= config.checkpoint_seconds
        if together and config.checkpoint_seconds is not None:
            due = ranks.from_main(due)
        if not (due or loop.stopping) or not (ranks.main or together):
            return
        state = loop.state_dict()
        if ranks.main:
            writer.sync()
            checkpoints.save(loop.done, state)
        saved = time.monotonic()

    return save
