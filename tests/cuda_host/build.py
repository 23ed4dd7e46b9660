"""Compiles the CUDA kernels for the CPU with g++, once for each content of their sources."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
COMPILER = shutil.which("g++")

COMMON = ("-std=c++20", "-g", "-pthread", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas", "-Werror")
MODES: dict[str, tuple[str, ...]] = {
    # Every CUDA thread a fiber: fast, no race detection.
    "fibers": ("-O2",),
    # Every CUDA thread a thread of the operating system.
    "races": ("-O1", "-DBSGAP_HOST_THREADS", "-fsanitize=thread"),
    "addresses": (
        "-O1",
        "-DBSGAP_HOST_THREADS",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
    ),
}


class NoRuntimeError(RuntimeError):
    """The compiler lacks a sanitizer's runtime library."""


def _digest(*parts: str) -> str:
    """Of every source that a build can read, and of how it is built."""
    digest = hashlib.sha256("\0".join(parts).encode())
    sources = [p for folder in (CSRC, HERE) for p in folder.rglob("*") if p.suffix in {".h", ".cuh", ".cpp"}]
    for path in sorted(sources):
        digest.update(str(path).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def build(source: str, mode: str, *defines: str) -> Path:
    """The library (``kernels.cpp``) or program (other sources of this folder), compiled if need be."""
    shared = source == "kernels.cpp"
    options = (*COMMON, *MODES[mode], *(f"-D{d}" for d in defines), *(["-shared", "-fPIC"] if shared else []))
    folder = Path(
        os.environ.get("BSGAP_TEST_BUILD", Path(tempfile.gettempdir()) / f"bsgap-tests-{os.getuid()}")
    )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    target = folder / f"{Path(source).stem}-{_digest(source, *options)}{'.so' if shared else ''}"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / target.name
        command = [str(COMPILER), str(HERE / source), *options, f"-I{CSRC}", f"-I{HERE}", "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "cannot find" in done.stderr and "san" in done.stderr:
            raise NoRuntimeError(f"g++ has no runtime for {mode}")
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        made.replace(target)  # whole or not at all, if two test runs build at once
    return target
