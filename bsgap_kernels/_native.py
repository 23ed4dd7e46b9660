"""Loads the compiled CPU kernels.

A library that is there and does not load raises: never a silent fallback.
"""

from __future__ import annotations

import importlib.util
import platform
import sys
from pathlib import Path

import torch

from . import schema  # noqa: F401 - the schemas must be defined before their implementations


def _library_path() -> Path:
    spec = importlib.util.find_spec("bsgap_kernels._cpu")
    if spec is None or spec.origin is None:
        raise ImportError(
            "bsgap_kernels: the compiled kernels are missing. Install with 'pip install .' "
            "(needs a C++20 compiler), or in a checkout run 'python setup.py build_ext --inplace'."
        )
    return Path(spec.origin)


LIBRARY_PATH = _library_path()
torch.ops.load_library(str(LIBRARY_PATH))


def build_info() -> dict[str, str]:
    """Versions and build facts, for bug reports and `bsgap info`."""
    from . import __version__, _core

    return {
        "bsgap_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{sys.platform} {platform.machine()}",
        "instruction_set": _core.instruction_set(),
        "torch_threads": str(torch.get_num_threads()),
        "backends": "cpu",
    }
