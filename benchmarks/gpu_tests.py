"""Runs the tests marked `gpu` on several processes, each under a time limit, and keeps each result at once.

python benchmarks/gpu_tests.py RESULTS.jsonl [--workers N] [--limit SECONDS] [--seconds SECONDS]

A process is replaced after a test that outlasts its limit, that ends the process, or that leaves a CUDA error
behind: the context of such a process is lost for all later tests. Needs pytest and nothing beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
WORK = [sys.executable, str(Path(__file__)), "--work"]
STICKY = ("CUDA error", "AcceleratorError", "illegal memory access", "unspecified launch failure")
READY = "ready\n"
START_LIMIT = 90
"""Seconds in which a process has to be ready: they are not taken from its first test."""
PYTEST = ["-q", "-m", "gpu", "-p", "no:cacheprovider"]


def work() -> None:
    """The worker: says that it is ready, then runs the test named on each line of standard input.

    Answers with a line of JSON each.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what tests print goes elsewhere
    import pytest
    import torch

    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
    answers.write(READY)
    answers.flush()

    class Outcome:
        def __init__(self) -> None:
            self.found: dict[str, Any] = {"outcome": "error", "message": "not run"}

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed:
                self.found = {"outcome": "failed", "message": str(report.longrepr)[-3000:]}
            elif report.skipped or report.when == "call":
                self.found = {"outcome": report.outcome, "message": ""}

    for line in sys.stdin:
        outcome = Outcome()
        began = time.monotonic()
        pytest.main([*PYTEST, line.strip()], plugins=[outcome])
        answers.write(json.dumps({**outcome.found, "seconds": round(time.monotonic() - began, 3)}) + "\n")
        answers.flush()


def collect() -> list[str]:
    """Node ids of the tests, of the files that have some: others may need packages that are not there."""
    files = [str(p) for p in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in p.read_text()]
    command = [sys.executable, "-m", "pytest", "--collect-only", *PYTEST, *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    if not tests:
        raise SystemExit(f"gpu_tests: no test was collected\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return tests


class Worker:
    """One process, made anew when its predecessor cannot go on."""

    def __init__(self, log: IO[str]) -> None:
        self.log = log
        self.process: subprocess.Popen[str] | None = None

    def run(self, test: str, limit: float) -> dict[str, Any]:
        """The outcome of one test."""
        if self.process is None:
            self.process = subprocess.Popen(
                WORK, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
            )
            line, seconds, why = self.answer("", START_LIMIT)
            if line != READY:
                self.close()
                return {"outcome": "failed", "message": f"no process for it: {why}", "seconds": seconds}
        line, seconds, why = self.answer(test + "\n", limit)
        if not line:
            self.close()
            return {"outcome": "failed", "message": why, "seconds": seconds}
        found: dict[str, Any] = json.loads(line)
        if found["outcome"] == "failed" and any(sign in found["message"] for sign in STICKY):
            self.close()
        return found

    def answer(self, line: str, limit: float) -> tuple[str, float, str]:
        """The process's next line, after it was given one; how long it took; why there is none."""
        process = self.process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(limit, process.kill)
        began = time.monotonic()
        timer.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            found = process.stdout.readline()
        except BrokenPipeError:
            found = ""
        timer.cancel()
        seconds = round(time.monotonic() - began, 3)
        return found, seconds, f"more than {limit:g} s" if seconds >= limit else "its process ended"

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def run(
    tests: Sequence[str], results: Path, workers: int, limit: float, seconds: float = math.inf
) -> Counter[str]:
    """Run the tests, appending a line of JSON for each as it ends; returns how many had which outcome.

    None is begun after that many seconds: those are "not run".
    """
    ends = time.monotonic() + seconds
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for test in tests:
        waiting.put(test)
    outcomes: Counter[str] = Counter()
    lock = threading.Lock()
    with results.open("a", encoding="utf-8") as file, results.with_suffix(".log").open("a") as log:

        def serve() -> None:
            worker = Worker(log)
            while True:
                try:
                    test = waiting.get_nowait()
                except queue.Empty:
                    break
                if time.monotonic() > ends:
                    found = {"test": test, "outcome": "not run", "message": "", "seconds": 0}
                else:
                    found = {"test": test, **worker.run(test, limit)}
                with lock:
                    outcomes[found["outcome"]] += 1
                    file.write(json.dumps(found) + "\n")
                    file.flush()
                    if found["outcome"] == "failed":
                        print(
                            f"failed: {test}: {found['message'].strip().splitlines()[-1][:160]}", flush=True
                        )
            worker.close()

        threads = [threading.Thread(target=serve) for _ in range(min(workers, len(tests)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 if a test failed."""
    parser = argparse.ArgumentParser(description="Run the tests marked gpu on several processes.")
    parser.add_argument("results", type=Path)
    parser.add_argument("--workers", type=int, default=min(12, len(os.sched_getaffinity(0))))
    parser.add_argument("--limit", type=float, default=45.0, metavar="SECONDS", help="of one test")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no test is begun")
    parser.add_argument("--device", default="cuda", help="cpu: what of them a CPU can run")
    options = parser.parse_args(arguments)
    os.environ["BSGAP_GPU_TEST_DEVICE"] = options.device
    outcomes = run(collect(), options.results, options.workers, options.limit, options.seconds)
    print(", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items())))
    return int(outcomes["failed"] + outcomes["error"] > 0)


if __name__ == "__main__":
    if sys.argv[1:] == ["--work"]:
        work()
    else:
        sys.exit(main())
