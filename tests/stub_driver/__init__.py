"""Triton's launcher with a CUDA driver that does nothing, on CPU tensors: what the host does, counted.

`install()` must come before triton is imported for the first time, and is for good.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

_SOURCE = Path(__file__).resolve().parent / "libcuda.c"


class Stub:
    """The driver: how often it was asked to launch, and where a pointer points."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        for name in ("stub_launches", "stub_pointer_queries"):
            getattr(self._library, name).restype = ctypes.c_uint64

    @property
    def launches(self) -> int:
        """Kernels launched so far."""
        return int(self._library.stub_launches())


def install() -> Stub:
    """Makes CPU tensors those of a device of capability 9.0 whose kernels are compiled and never run."""
    folder = Path(tempfile.mkdtemp(prefix="bsgap-stub-"))
    path = folder / "libcuda.so.1"
    command = [
        "gcc",
        "-O2",
        "-w",
        "-shared",
        "-fPIC",
        "-Wl,-soname,libcuda.so.1",
        "-o",
        str(path),
        str(_SOURCE),
    ]
    subprocess.run(command, check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    stub = Stub(path)  # the launcher that triton compiles finds it loaded
    import triton
    from triton.backends.nvidia.driver import CudaDriver

    class Driver(CudaDriver):  # type: ignore[misc]
        """Triton's own, but for what it asks torch."""

        def __init__(self) -> None:
            super().__init__()
            self.get_current_stream: Any = lambda device: 0
            self.get_current_device: Any = lambda: 0
            self.get_device_capability: Any = lambda device=0: (9, 0)

    triton.runtime.driver.set_active(Driver())
    return stub
