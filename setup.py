"""Builds the compiled parts.

`_cpu` and, where nvcc fits torch, `_cuda` are torch ops on the stable ABI; `_core` serves NumPy.
TORCH_CUDA_ARCH_LIST chooses the GPUs; BSGAP_CUDA=0 leaves `_cuda` out, BSGAP_CUDA=1 insists on it.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError as error:  # pragma: no cover - only without build isolation
    raise SystemExit(
        f"bsgap_kernels: building needs torch >= 2.11 in this environment ({error}). "
        "Install it first, or let pip build in isolation (without --no-build-isolation)."
    ) from None

try:
    import pybind11

    PYBIND11 = [pybind11.get_include()]
except ImportError:
    # torch brings a copy among its headers, which every extension built by its helpers finds.
    PYBIND11 = []

# 2.10 is the first release whose stable ABI has all we call; one binary then serves every later torch.
STABLE_ABI = "0x020a000000000000"
HEADERS = str(Path(__file__).resolve().parent / "csrc")
DEPENDS = sorted(str(p) for p in Path("csrc").rglob("*.*h"))  # part of a source distribution too
FLAGS = ["-O3", "-std=c++20", "-fopenmp-simd", "-Wall", "-Wextra", "-Wno-psabi", "-fvisibility=hidden"]
NVCC_FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xcompiler", "-fvisibility=hidden"]
# Machine code of 8.0 serves 8.6 and 8.9, of 10.0 also 10.3; what comes later compiles the PTX.
CUDA_ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"


NVCC = Path(CUDA_HOME or "", "bin", "nvcc")


def cuda_obstacle() -> str | None:
    """Why `_cuda` cannot be built here, or None. A GPU need not be there."""
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    if not CUDA_HOME or not NVCC.exists():
        return "no nvcc found (CUDA_HOME names the toolkit)"
    text = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release (\d+)\.\d+", text)
    major = torch.version.cuda.split(".")[0]
    if version is None or version[1] != major:
        found = version[0] if version else "an unknown release"
        return f"nvcc is of {found}, torch of CUDA {torch.version.cuda}: their majors must match"
    return None


def cuda_library_dirs() -> list[str]:
    """Where libcudart is: nvcc knows, also where the one found first is a script that calls another."""
    dry_run = subprocess.run(
        [NVCC, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull],
        capture_output=True, text=True, check=False,
    ).stderr  # fmt: skip
    here = re.search(r"_HERE_=(\S+)", dry_run)
    toolkit = Path(here[1]).parent if here else NVCC.parents[1]
    candidates = [toolkit / "lib64", toolkit / "lib", toolkit / "targets" / "x86_64-linux" / "lib"]
    return [str(path) for path in candidates if path.is_dir()]


def cuda_extensions() -> list[CUDAExtension]:
    wanted = os.environ.get("BSGAP_CUDA", "auto")
    obstacle = "BSGAP_CUDA=0" if wanted == "0" else cuda_obstacle()
    if obstacle is not None:
        if wanted == "1":
            raise SystemExit(f"bsgap_kernels: BSGAP_CUDA=1, but the CUDA kernels cannot be built: {obstacle}")
        print(f"bsgap_kernels: building without CUDA kernels: {obstacle}")
        return []
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
    abi = [f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-DUSE_CUDA"]
    return [
        CUDAExtension(
            "bsgap_kernels._cuda",
            ["csrc/cuda/spectra.cu"],
            include_dirs=[HEADERS],
            library_dirs=cuda_library_dirs(),
            extra_compile_args={"cxx": [*FLAGS, *abi], "nvcc": [*NVCC_FLAGS, *abi]},
            py_limited_api=True,
            depends=DEPENDS,
        )
    ]


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
            ["csrc/cpu/spectra.cpp", "csrc/cpu/site_sums.cpp"],
            include_dirs=[HEADERS],
            extra_compile_args=[*FLAGS, f"-DTORCH_TARGET_VERSION={STABLE_ABI}"],
            py_limited_api=True,
            depends=DEPENDS,
        ),
        CppExtension(
            "bsgap_kernels._core",
            ["csrc/bindings/core.cpp"],
            include_dirs=[HEADERS, *PYBIND11],
            extra_compile_args=FLAGS,
            depends=DEPENDS,
        ),
        *cuda_extensions(),
    ],
    cmdclass={"build_ext": Build.with_options(no_python_abi_suffix=False)},
)
