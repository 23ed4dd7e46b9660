"""Builds the compiled parts: `_cpu` (torch ops, stable ABI) and `_core` (NumPy bindings, pybind11)."""

import shutil
from pathlib import Path

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:  # pragma: no cover - only without build isolation
    raise SystemExit(
        f"bsgap_kernels: building needs torch >= 2.11 in this environment ({error}). "
        "Install it first, or let pip build in isolation (without --no-build-isolation)."
    ) from None
import pybind11

# 2.10 is the first release whose stable ABI has all we call; one binary then serves every later torch.
STABLE_ABI = "0x020a000000000000"
HEADERS = str(Path(__file__).resolve().parent / "csrc")
DEPENDS = sorted(str(p) for p in Path("csrc").rglob("*.h"))  # part of a source distribution too
FLAGS = ["-O3", "-std=c++20", "-fopenmp-simd", "-Wall", "-Wextra", "-Wno-psabi", "-fvisibility=hidden"]


class Build(BuildExtension):
    """Says in one sentence what is missing, where torch's build would print a page."""

    def build_extensions(self) -> None:
        compiler = self.compiler.compiler_cxx[0]
        if shutil.which(compiler) is None:
            raise SystemExit(
                f"bsgap_kernels: no C++ compiler found (looked for '{compiler}'). "
                "Install one that knows C++20, for example 'apt-get install g++', or name it in CXX."
            )
        super().build_extensions()


setup(
    ext_modules=[
        CppExtension(
            "bsgap_kernels._cpu",
            ["csrc/cpu/spectra.cpp"],
            include_dirs=[HEADERS],
            extra_compile_args=[*FLAGS, f"-DTORCH_TARGET_VERSION={STABLE_ABI}"],
            py_limited_api=True,
            depends=DEPENDS,
        ),
        CppExtension(
            "bsgap_kernels._core",
            ["csrc/bindings/core.cpp"],
            include_dirs=[HEADERS, pybind11.get_include()],
            extra_compile_args=FLAGS,
            depends=DEPENDS,
        ),
    ],
    cmdclass={"build_ext": Build.with_options(no_python_abi_suffix=False)},
)
