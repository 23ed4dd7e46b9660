"""Instruction sets of this processor: each is measured in a process of its own, the peers held to it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .. import _core

TAKEN_DOWN = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
    },
}
"""Environment that holds torch, MKL, oneDNN and OpenBLAS to an instruction set below the processor's best.

MKL obeys on Intel's processors; on AMD's it was seen to take AVX2 whatever it is told: the ceilings record
what products of the peers reach (`gemm_flops`). NumPy's own loops serve no product and no eigenvalue.
"""
VARIABLES = ("BSGAP_ISA", *TAKEN_DOWN["avx2"], "OPENBLAS_L2_SIZE")
"""Set here alone in a process that measures: at the best instruction set each library chooses for itself."""


def measured_sets(available: Sequence[str]) -> list[str]:
    """Those that are measured of what a processor has, best first: plain code only if there is no other."""
    return [isa for isa in available if isa != "generic"] or list(available)


def environment(isa: str, available: Sequence[str], present: Mapping[str, str]) -> dict[str, str]:
    """Environment of a process that measures an instruction set: of ours, and of the peers."""
    rest = {name: value for name, value in present.items() if name not in VARIABLES}
    return {**rest, "BSGAP_ISA": isa, **(TAKEN_DOWN[isa] if isa != available[0] else {})}


BENCH, OVERHEAD = ("bsgap_kernels.bench",), ("bsgap_kernels", "overhead")
"""The module that measures, and its command if it has several."""


def measure_each(wanted: str, program: Sequence[str], arguments: Sequence[str]) -> int:
    """Run a program with the arguments for each instruction set, or the one that is wanted.

    Returns the worst exit code; one past 1, which is no result, ends it. Raises ValueError for an instruction
    set that is not measured on this processor.
    """
    available = _core.instruction_sets()
    sets = measured_sets(available)
    if wanted not in ("all", *sets):
        raise ValueError(f"isa must be one of all, {', '.join(sets)} on this processor, got {wanted!r}")
    worst = 0
    for isa in sets if wanted == "all" else [wanted]:
        command = [sys.executable, "-m", *program, *arguments]
        code = subprocess.run(command, env=environment(isa, available, os.environ), check=False).returncode
        worst = max(worst, code)
        if code not in (0, 1):
            break
    return worst


def path_for(path: Path | None, isa: str) -> Path | None:
    """A result's path, with the instruction set where it says {isa}."""
    return None if path is None else Path(str(path).replace("{isa}", isa))
