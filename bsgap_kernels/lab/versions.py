"""Versions of what a result depends on."""

from __future__ import annotations

import platform
from importlib import metadata


def versions() -> dict[str, str | None]:
    """Version of this package, Python, torch, Triton, NumPy and torchvision; None for what is not installed.

    Read from the installed metadata, so nothing heavy is imported.
    """
    found: dict[str, str | None] = {}
    for package in ("bsgap_kernels", "torch", "triton", "numpy", "torchvision"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return {"python": platform.python_version(), **found}
