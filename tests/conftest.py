"""Settings of every test run: one thread, and tests marked ``gpu`` only where there is a GPU."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import proven
import pytest
import torch

pytest.register_assert_rewrite("tracker_models")


def pytest_configure(config: pytest.Config) -> None:
    """Runs torch on one thread unless BSGAP_TEST_THREADS says otherwise.

    The matrices are small, and threads that wait for each other on a busy two-core machine cost up to 50
    times the work. Tests of threaded code ask for threads by the fixture ``use_threads``.
    """
    torch.set_num_threads(int(os.environ.get("BSGAP_TEST_THREADS", "1")))
    if os.environ.get("BSGAP_VIRTUAL_GPU") == "1":
        import virtual_gpu

        virtual_gpu.install()
    proven.begin()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hands the notes of a worker on to the process that prints them."""
    if hasattr(session.config, "workerinput"):
        proven.end()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says which GPU kernels were proven without a GPU, and which a run on the virtual GPU launched."""
    lines = proven.end()
    if lines:
        terminalreporter.section("GPU kernels proven without a GPU")
        for line in lines:
            terminalreporter.write_line(line)
    if os.environ.get("BSGAP_VIRTUAL_GPU") == "1":
        import virtual_gpu

        for kernel, count in sorted(virtual_gpu.launches().items()):
            terminalreporter.write_line(f"virtual GPU: {count} x {kernel}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts tests that fork first, then the longest, and skips those marked ``gpu`` without a CUDA device.

    A forked process cannot run backward where autograd has had threads before the fork, as it has after some
    compiled models. A long test that starts last keeps one core busy while the others have nothing to run.
    BSGAP_GPU_TEST_DEVICE=cpu runs what of the ``gpu`` tests a CPU can.
    """

    def place(item: pytest.Item) -> int:
        if _forks(item.path):
            return 0
        return 1 if item.get_closest_marker("slow") or "test_in_the_interpreter" in item.name else 2

    items.sort(key=place)
    if torch.cuda.is_available() or os.environ.get("BSGAP_GPU_TEST_DEVICE") == "cpu":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@functools.cache
def _forks(file: Path) -> bool:
    text = file.read_text(encoding="utf-8")
    return any(sign in text for sign in ("on_two_ranks(", 'get_context("fork")', "ddp_fork"))


@pytest.fixture
def use_threads() -> Iterator[Callable[[int], None]]:
    """A function that sets torch's number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
