"""Where the runs of a sweep are run: in this process, side by side in processes of their own, or by Ray."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from bsgap_kernels.lab.config import SweepConfig, TrainConfig, UserError
from bsgap_kernels.lab.data import ImageData
from bsgap_kernels.lab.optional import require
from bsgap_kernels.lab.results import FINISHED
from bsgap_kernels.lab.saved import load_run
from bsgap_kernels.lab.setup import data_of
from bsgap_kernels.lab.sharpness_run import SharpnessOptions, is_measured, sharpness_of
from bsgap_kernels.lab.stop import Stop, StoppedError, on_signals
from bsgap_kernels.lab.threads import use_threads
from bsgap_kernels.lab.train import train


@dataclass(frozen=True)
class Job:
    """A run and its directory."""

    config: TrainConfig
    directory: Path
    sharpness: SharpnessOptions | None = None
    """Measured at its end unless it is there already."""


@dataclass(frozen=True)
class Outcome:
    """What became of a run: its summary, or what went wrong."""

    run: str
    summary: dict[str, Any] | None
    problem: str = ""
    stopped: bool = False
    """Whether its process was asked to stop before the run, its sharpness included, was done."""


def launch(jobs: Sequence[Job], config: SweepConfig, data: ImageData, stop: Stop) -> Iterator[Outcome]:
    """Run jobs as the sweep's options say, and give each one's outcome when it ends.

    Once `stop` is set no further run starts, and those under way save a checkpoint and stop.
    """
    if config.launcher == "ray":
        yield from _by_ray(jobs, config, stop)
    elif config.jobs == 1:
        yield from _one_after_another(jobs, data, stop)
    else:
        threads = config.threads or max(1, cores() // config.jobs)
        yield from _side_by_side(jobs, config.jobs, threads, stop)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_job(job: Job, data: ImageData | None, stop: Stop) -> Outcome:
    """Do one run and its sharpness here, loading data if None; what fails becomes the outcome's problem.

    Of anything but a mistake of the user (no memory left, a bug) the traceback goes to stderr.
    """
    try:
        summary = train(job.config, job.directory, data=data, stop=stop)
        if summary["status"] != FINISHED:
            return Outcome(job.config.run, summary, stopped=True)
        if job.sharpness is not None and not is_measured(job.directory, job.sharpness):
            with use_threads(job.config.threads):
                sharpness_of(job.directory, job.sharpness, saved=load_run(job.directory, data), stop=stop)
            print(f"{job.config.run}: sharpness measured", flush=True)
        return Outcome(job.config.run, summary)
    except StoppedError:
        return Outcome(job.config.run, summary, stopped=True)
    except (UserError, OSError) as error:
        return Outcome(job.config.run, None, " ".join(str(error).split()))
    except Exception as error:
        traceback.print_exc()
        return Outcome(job.config.run, None, f"{type(error).__name__}: {' '.join(str(error).split())}")


def _one_after_another(jobs: Sequence[Job], data: ImageData, stop: Stop) -> Iterator[Outcome]:
    for job in jobs:
        if stop:
            return
        yield run_job(job, data, stop)


# -- side by side


def _side_by_side(jobs: Sequence[Job], count: int, threads: int, stop: Stop) -> Iterator[Outcome]:
    """At most `count` runs at a time, each worker process taking the next when it is done with one.

    A worker that dies (the kernel kills it for memory, say) costs its run, which a later sweep goes on with;
    another takes its place.
    """
    waiting = list(reversed(jobs))
    workers: list[_Worker] = []
    try:
        while True:
            idle = [worker for worker in workers if worker.job is None]
            while waiting and not stop and (idle or len(workers) < count):
                if not idle:
                    idle.append(_Worker(threads))
                    workers.append(idle[0])
                idle.pop().start(waiting.pop())
            busy = [worker for worker in workers if worker.job is not None]
            if not busy:
                return
            # Woken by a signal too: PEP 475 goes on waiting after the handler, so the wait is short.
            ready = wait([worker.connection for worker in busy], timeout=0.5)
            if stop:
                for worker in busy:
                    worker.ask_to_stop()
            for worker in busy:
                if worker.connection in ready:
                    outcome = worker.outcome()
                    if worker.dead:
                        workers.remove(worker)
                        # Asked before it could listen: the run was not begun.
                        if stop and outcome.summary is None:
                            continue
                    yield outcome
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process that does one run after another."""

    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.job: Job | None = None
        self.dead = False
        self._asked = False
        self._process: BaseProcess = context.Process(target=_work, args=(theirs, threads), daemon=False)
        self._process.start()
        # The worker's end is its alone, so that its death is seen here as the end of the pipe.
        theirs.close()

    def start(self, job: Job) -> None:
        self.job = job
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # dead while idle: outcome() says so
            self.connection.send(job)

    def outcome(self) -> Outcome:
        """Of the run that ended, or whose process did."""
        assert self.job is not None
        run, self.job = self.job.config.run, None
        try:
            outcome: Outcome = self.connection.recv()
            self.dead = outcome.stopped
        except (EOFError, ConnectionResetError):
            self.dead = True
            self._process.join()
            return Outcome(run, None, f"its process died with exit code {self._process.exitcode}")
        if self.dead:
            self._process.join()
        return outcome

    def ask_to_stop(self) -> None:
        if not self._asked and self._process.pid is not None:
            self._asked = True
            os.kill(self._process.pid, signal.SIGTERM)

    def end(self) -> None:
        """End the process: at once if it is idle, after its checkpoint if it is at work."""
        if self.job is not None:
            self.ask_to_stop()
        self.connection.close()
        self._process.join()


def _work(connection: Connection, threads: int) -> None:
    torch.set_num_threads(threads)
    data: ImageData | None = None
    with on_signals() as stop:
        threading.Thread(target=_stop_with_parent, args=(stop,), daemon=True).start()
        while True:
            try:
                job: Job = connection.recv()
            except EOFError:
                return
            try:
                data = data_of(job.config) if data is None else data
                outcome = run_job(job, data, stop)
            except (UserError, OSError) as error:
                outcome = Outcome(job.config.run, None, " ".join(str(error).split()))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # nobody waits for it any more
                connection.send(outcome)
            if outcome.stopped:
                return


def _stop_with_parent(stop: Stop) -> None:
    """A worker whose sweep was killed would hold its run, which the next sweep wants to go on with."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        stop.ask(signal.SIGTERM)


# -- Ray


def _by_ray(jobs: Sequence[Job], config: SweepConfig, stop: Stop) -> Iterator[Outcome]:
    """Each run a Ray task with some CPUs, and a GPU if it trains on one; all machines share the directory."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would send statistics to its makers
    ray = require("ray")
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(address=config.ray_address, log_to_driver=True, include_dashboard=False)
    threads = config.threads or max(1, cores() // config.jobs)
    gpus = 1 if config.device.startswith("cuda") else 0
    remote = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=3)(_ray_job)
    names = {}
    try:
        for job in jobs:
            absolute = dataclasses.replace(job, directory=job.directory.resolve())
            names[remote.remote(absolute, threads)] = job.config.run
        left = list(names)
        asked = False
        while left:
            done, left = ray.wait(left, timeout=0.5)
            for reference in done:
                try:
                    yield ray.get(reference)
                except ray.exceptions.RayError as error:
                    if not stop:  # else it was not begun
                        yield Outcome(names[reference], None, f"Ray: {' '.join(str(error).split())}")
            if stop and not asked:
                # To a task that runs this is a SIGINT: it saves a checkpoint, and is waited for.
                asked = True
                for reference in left:
                    ray.cancel(reference)
    finally:
        if started_here:
            ray.shutdown()


def _ray_job(job: Job, threads: int) -> Outcome:
    torch.set_num_threads(threads)
    with on_signals() as stop:
        return run_job(job, None, stop)
