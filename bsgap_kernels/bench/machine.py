"""What a figure has to be read with: processor, versions, commit, threads, and what else was running."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__, build_info
from .isa import VARIABLES
from .measure import last_level_cache_bytes


def describe() -> dict[str, Any]:
    """Machine, versions and commit, as they go into a result file. No host name, no path."""
    commit, modified = source_commit()
    return {
        "machine": {
            "cpu": cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "last_level_cache_mib": round(last_level_cache_bytes() / 2**20, 1),
            "system": f"{platform.system()} {platform.machine()}",
            "instruction_set": build_info()["instruction_set"],
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_blas": "MKL" if "BLAS_INFO=mkl" in torch.__config__.show() else "not MKL",
            "numpy": np.__version__,
            "bsgap_kernels": __version__,
        },
        "peers": peers(),
        "threads": {"torch": torch.get_num_threads(), "numpy": numpy_threads()},
        "commit": commit,
        "modified": modified,
    }


def cpu_name() -> str:
    """The processor's name as the system knows it, with family and model: a virtual one may be "AMD EPYC"."""
    found: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    if "model name" not in found:
        return platform.processor() or platform.machine()
    numbers = [
        f"{part} {found[key]}" for part, key in (("family", "cpu family"), ("model", "model")) if key in found
    ]
    return f"{found['model name']} ({', '.join(numbers)})" if numbers else found["model name"]


ISA_NAMES = {"avx512": "AVX-512", "avx2": "AVX2", "generic": "plain code"}
"""As a page writes what `build_info` calls an instruction set, the widest first."""


def processor(result: dict[str, Any]) -> str:
    """Processor and instruction set of a result, as a page that quotes its figures names them."""
    machine = result["machine"]
    return f"{machine['cpu']} with {ISA_NAMES[machine['instruction_set']]}"


def set_threads(threads: int) -> None:
    """Threads of torch and, where threadpoolctl is installed (scikit-learn brings it), of NumPy's BLAS."""
    torch.set_num_threads(threads)
    pools = _threadpoolctl()
    if pools is not None:
        pools.threadpool_limits(threads, user_api="blas")


def numpy_threads() -> int | None:
    """Threads of NumPy's OpenBLAS; None where threadpoolctl is missing or NumPy has another BLAS."""
    return max((pool["num_threads"] for pool in _openblas()), default=None)


def peers() -> dict[str, Any]:
    """Instruction sets of the peers, and the variables that set them.

    `openblas` is the kernel that NumPy's library took; None as `numpy_threads`.
    """
    return {
        "torch": torch.backends.cpu.get_cpu_capability(),
        "openblas": next((pool["architecture"] for pool in _openblas()), None),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _openblas() -> list[dict[str, Any]]:
    """Return threadpoolctl's entries for OpenBLAS, NumPy's first; none where it is not installed."""
    pools = _threadpoolctl()
    found: list[dict[str, Any]] = [] if pools is None else pools.threadpool_info()
    return [pool for pool in found if pool["internal_api"] == "openblas"]


def _threadpoolctl() -> Any:
    """The module, or None where it is not installed."""
    try:
        return importlib.import_module("threadpoolctl")
    except ImportError:
        return None


def source_commit() -> tuple[str | None, bool | None]:
    """Commit of the checkout that holds this package and whether its sources differ; None when installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or not (root / "setup.py").exists():
        return None, None
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return None, None
    changes = _git(root, "status", "--porcelain", "--", "bsgap_kernels", "csrc", "setup.py")
    return commit, None if changes is None else bool(changes)


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


BUSY = 0.05
"""Other processes above this share of the machine: figures are marked."""


class OtherWork:
    """Share of the machine's cores that other processes used since this object was made (Linux)."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        try:
            fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        user, nice, system, _idle, _iowait, irq, softirq, steal = (int(f) for f in fields)
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy, time.process_time()

    def share(self) -> float | None:
        """0 for a machine of our own, 1 where others took all of it; None where the system does not say."""
        now = self._now()
        if now is None or self._start is None:
            return None
        wall, busy, own = (b - a for a, b in zip(self._start, now, strict=True))
        return (
            round(min(max((busy - own) / (wall * (os.cpu_count() or 1)), 0.0), 1.0), 3) if wall > 0 else None
        )
