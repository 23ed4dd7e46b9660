"""What every CUDA kernel takes of a GPU, by ahead-of-time compilation: no GPU needed, only nvcc.

``python benchmarks/cuda_resources.py`` compiles the kernels for every architecture served and writes
registers, spills, stack and shared memory to ``benchmarks/results/cuda_resources.json``;
tests/test_cuda_aot.py asserts that they fit. A new kernel is a new entry of ``KERNELS``.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
RESULT = Path(__file__).parent / "results" / "cuda_resources.json"

# Shared memory that a block may ask for, in KB (CUDA C++ Programming Guide, table of compute capabilities).
ARCHITECTURES = {"80": 163, "86": 99, "89": 99, "90a": 227, "100": 227, "120": 99}


@dataclass(frozen=True)
class Kernel:
    """A kernel of csrc/cuda. ``threads`` and ``shared`` are C++ expressions in namespace bsgap::cuda."""

    header: str
    name: str
    """As it is launched; with template arguments it is instantiated here."""
    threads: str
    shared: str
    """Most dynamic shared memory that a launch asks for, in bytes."""
    parameters: str = ""
    """Types of the parameters; needed of templates only."""


KERNELS = (
    Kernel(
        "count_small.cuh",
        "count_small_kernel",
        "kSmallThreads",
        "small_shared_bytes(kSmallSide, kNarrowSide)",
    ),
    Kernel("large_matrix.cuh", "describe_kernel", "kLargeThreads", "detail::kPlanShared"),
    Kernel("ldlt.cuh", "ldlt_begin_kernel", "kLargeThreads", "0"),
    Kernel("ldlt.cuh", "ldlt_panel_kernel", "kLargeThreads", "detail::kPanelShared"),
    Kernel("ldlt.cuh", "ldlt_update_kernel", "detail::kUpdateThreads", "detail::kUpdateShared"),
    Kernel("ldlt.cuh", "ldlt_finish_kernel", "kLargeThreads", "detail::kPlanShared"),
    Kernel("lanczos.cuh", "lanczos_start_kernel", "kLargeThreads", "detail::kLanczosShared"),
    Kernel("lanczos.cuh", "lanczos_step_kernel", "kLargeThreads", "detail::kLanczosShared"),
    Kernel("lanczos.cuh", "ritz_vector_kernel", "kLargeThreads", "detail::kLanczosShared"),
    Kernel("lanczos.cuh", "rayleigh_kernel", "kLargeThreads", "detail::kLanczosShared"),
    Kernel("large_plan.cuh", "plan_top_kernel", "kLargeThreads", "detail::kPlanShared"),
    Kernel("large_plan.cuh", "plan_thresholds_kernel", "kLargeThreads", "detail::kPlanShared"),
    Kernel("large_plan.cuh", "plan_retry_kernel", "kLargeThreads", "detail::kRetryShared"),
    Kernel("large_plan.cuh", "write_counts_kernel", "kLargeThreads", "0"),
    Kernel("tridiagonal_large.cuh", "householder_kernel", "kLargeThreads", "detail::kLanczosShared"),
    Kernel("tridiagonal_large.cuh", "bisection_kernel", "kLargeThreads", "detail::kLanczosShared"),
    Kernel("tridiagonal_large.cuh", "sturm_counts_kernel", "kLargeThreads", "detail::kLanczosShared"),
    Kernel("summary.cuh", "summary_kernel", "kSummaryThreads", "0"),
    Kernel("table_fill.cuh", "fill_table_kernel", "kFillThreads", "0"),
)


@dataclass(frozen=True)
class Resources:
    """One kernel on one architecture. Bytes, except registers (of a thread)."""

    kernel: str
    architecture: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    static_shared: int
    dynamic_shared: int
    threads: int


def nvcc() -> str | None:
    """The CUDA compiler, or None."""
    return shutil.which("nvcc")


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _source(kernels: tuple[Kernel, ...]) -> str:
    """Every kernel, and a main that prints threads and dynamic shared memory of each."""
    lines = ["#include <cstdio>"]
    lines += [f'#include "cuda/{header}"' for header in dict.fromkeys(k.header for k in kernels)]
    lines += ["namespace bsgap::cuda {"]
    lines += [f"template __global__ void {k.name}({k.parameters});" for k in kernels if "<" in k.name]
    lines += ["void print_launches() {"]
    lines += [
        f'  std::printf("%lld %lld\\n", (long long)({k.threads}), (long long)({k.shared}));' for k in kernels
    ]
    lines += ["}", "}", "int main() { bsgap::cuda::print_launches(); }"]
    return "\n".join(lines) + "\n"


def _parse(log: str, kernels: tuple[Kernel, ...], launches: list[tuple[int, int]]) -> list[Resources]:
    """What `ptxas -v` says of the kernels."""
    names = {k.name.replace(" ", ""): launch for k, launch in zip(kernels, launches, strict=True)}
    result = []
    for block in log.split("Compiling entry function ")[1:]:
        mangled, architecture = re.match(r"'(\S+)' for 'sm_(\w+)'", block).groups()  # type: ignore[union-attr]
        plain = _run(["c++filt", mangled]).strip().replace("bsgap::cuda::", "").replace(" ", "")
        name = re.sub(r"^void(?=.*>\()", "", plain).split("(")[0] if "<" not in plain else plain
        found = next((n for n in names if name == n or name.startswith((n + "(", "void" + n + "("))), None)
        if found is None:
            continue
        stack, stores, loads = re.search(  # type: ignore[union-attr]
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block
        ).groups()
        registers = re.search(r"Used (\d+) registers", block).group(1)  # type: ignore[union-attr]
        static = re.search(r"(\d+) bytes smem", block)
        threads, shared = names[found]
        result.append(
            Resources(
                kernel=found,
                architecture=architecture,
                registers=int(registers),
                stack=int(stack),
                spill_stores=int(stores),
                spill_loads=int(loads),
                static_shared=int(static.group(1)) if static else 0,
                dynamic_shared=shared,
                threads=threads,
            )
        )
    return sorted(
        result, key=lambda r: (list(names).index(r.kernel), list(ARCHITECTURES).index(r.architecture))
    )


def measure(kernels: tuple[Kernel, ...] = KERNELS) -> list[Resources]:
    """Compiles the kernels for every architecture and reads what they take."""
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("nvcc is not on PATH")
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "kernels.cu", Path(folder) / "kernels"
        source.write_text(_source(kernels), encoding="utf-8")
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
        options = ["-std=c++20", "--expt-relaxed-constexpr", "-Xptxas", "-v", "--threads", "2", f"-I{CSRC}"]
        log = _run([compiler, str(source), *options, *targets, "-o", str(program)])
        launches = [tuple(map(int, line.split())) for line in _run([str(program)]).splitlines()]
    return _parse(log, kernels, launches)  # type: ignore[arg-type]


def main() -> None:
    """Prints and writes the result."""
    rows = measure()
    for r in rows:
        print(
            f"{r.kernel:40} sm_{r.architecture:4} {r.registers:3} registers, {r.threads} threads, "
            f"{r.static_shared + r.dynamic_shared} bytes shared, {r.spill_stores} + {r.spill_loads} spilled"
        )
    version = re.search(r"release (\S+),", _run([str(nvcc()), "--version"]))
    result: dict[str, Any] = {"schema": 1, "nvcc": version.group(1) if version else "unknown"}
    result["kernels"] = [asdict(r) for r in rows]
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
