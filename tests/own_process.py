"""Tests of Triton kernels without a GPU, which need a process in which triton is replaced for good.

`interpreted` tests run their kernels in Triton's interpreter; `stubbed` ones launch them with a driver that
does nothing (stub_driver). A file with such tests starts itself again by `run`.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Literal

import pytest

REPLACED = os.environ.get("BSGAP_TEST_TRITON", "")
"""By what triton is replaced here: "interpreter", "stub" or, where tests start such processes, nothing."""

interpreted = pytest.mark.skipif(REPLACED != "interpreter", reason="runs in a process of its own")
stubbed = pytest.mark.skipif(REPLACED != "stub", reason="runs in a process of its own")
starts = pytest.mark.skipif(
    REPLACED != "" or importlib.util.find_spec("triton") is None, reason="is such a process, or has no triton"
)
PARTS = ("not slow", pytest.param("slow", marks=pytest.mark.slow))


def run(file: str, replaced: Literal["interpreter", "stub"], part: str) -> None:
    """Run the tests of a file that are or are not marked slow; fails with what they print."""
    environment = os.environ | {"BSGAP_TEST_TRITON": replaced}
    if replaced == "interpreter":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", part, file]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "passed" in result.stdout
