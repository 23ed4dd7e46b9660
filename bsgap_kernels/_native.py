"""Loads the compiled kernels: `_cpu` always, `_cuda` where it was built and torch has CUDA.

A library that is there and does not load raises: never a silent fallback. `BSGAP_ISA=generic`, `avx2` or
`avx512` keeps the CPU kernels from using more than that (csrc/core/isa.h); `bsgap info` prints what they use.
"""

from __future__ import annotations

import functools
import importlib.util
import platform
import sys
import warnings
from pathlib import Path

import torch

from . import schema  # noqa: F401 - the schemas must be defined before their implementations


def _library_path(name: str) -> Path | None:
    spec = importlib.util.find_spec(f"bsgap_kernels.{name}")
    return None if spec is None or spec.origin is None else Path(spec.origin)


LIBRARY_PATH = _library_path("_cpu")
if LIBRARY_PATH is None:
    raise ImportError(
        "bsgap_kernels: the compiled kernels are missing. Install with 'pip install .' "
        "(needs a C++20 compiler), or in a checkout run 'python setup.py build_ext --inplace'."
    )
torch.ops.load_library(str(LIBRARY_PATH))

# A library linked to torch_cuda cannot load in a torch without CUDA, where no tensor could ask for it.
CUDA_LIBRARY_PATH = _library_path("_cuda") if torch.version.cuda is not None else None
if CUDA_LIBRARY_PATH is not None:
    torch.ops.load_library(str(CUDA_LIBRARY_PATH))


@functools.cache
def has_cuda_kernels() -> bool:
    """Return whether the CUDA C++ kernels are there; a warning says once what their absence costs."""
    if CUDA_LIBRARY_PATH is None:
        warnings.warn(
            "bsgap_kernels was installed without nvcc: counts on CUDA tensors go through "
            "torch.linalg.eigvalsh, which waits for the device and cannot be captured in a CUDA graph; "
            "certified intervals and summaries go through the CPU. Install the CUDA toolkit of torch's "
            "CUDA major and reinstall.",
            stacklevel=2,
        )
    return CUDA_LIBRARY_PATH is not None


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
        "backends": "cpu" if CUDA_LIBRARY_PATH is None else "cpu, cuda",
    }
