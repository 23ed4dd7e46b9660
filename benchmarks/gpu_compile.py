"""Compiles the Gram kernel ahead, on all cores and without a GPU, into Triton's cache (TRITON_CACHE_DIR).

python benchmarks/gpu_compile.py [--capability 90] [--workers N] [--seconds SECONDS]

What a call on the GPU then asks Triton for is there. Variants that serve one matrix, a batch or a site come
here; those of lists of matrices are many, and compiled when they are asked for. What most calls ask for comes
first, and after SECONDS none is begun.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from bsgap_kernels.triton import compiled, config
from bsgap_kernels.triton.compiled import Variant

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (*HALVES, torch.float32, torch.float64)
ALIGNED = (config.SIDE_ALIGNED, config.DEPTH_ALIGNED)


def plain() -> Iterator[Variant]:
    """What one matrix or a batch asks for: a tile, a layout, and a rescue of float32 sums beyond side 64."""
    for size, tile in enumerate(config.TILES):
        for layout in ALIGNED if tile == 128 else range(config.CODE_LAYOUTS):
            codes = 1 << size * config.CODE_LAYOUTS + layout
            for dtype in HALVES if tile == 128 else DTYPES:
                name = f"{dtype} {tile} {layout}"
                if tile < 128:
                    wide = Variant(f"{name} float64", dtype, "float64", codes)
                    yield wide
                    if tile == 64:
                        yield replace(wide, multi=True)
                if dtype == torch.float64:
                    continue
                if tile < 128:
                    yield Variant(f"{name} float32", dtype, "float32", codes)
                if tile >= 64:
                    big = Variant(f"{name} float32 beyond 64", dtype, "float32", codes, multi=True)
                    yield from (big, replace(big, name=f"{name} rescue", rescue=True))


def ahead() -> list[Variant]:
    """All that is compiled ahead: calls, those with a shift, sites."""
    calls = list(plain())
    shifted = [
        replace(variant, name=f"{variant.name}, shift {mode}", shift=mode)
        for mode in (config.BY_VECTOR, config.BY_FIRST_ROW)
        for variant in calls
        if variant.precision == "float64"
    ]
    sites = [
        replace(variant, name=f"{variant.name}, site", accumulate=True, sums=variant.precision == "float64")
        for variant in calls
        if variant.precision == "float64" or variant.rescue or not variant.multi
    ]
    return calls + sites + shifted


def compile_one(job: tuple[Variant, int, float]) -> str:
    """Compile a variant, unless it is too late; returns what came of it."""
    variant, capability, ends = job
    if time.monotonic() > ends:
        return "not begun"
    try:
        compiled.compile_variant(variant, capability)
    except Exception as error:  # whatever the compiler raises
        return f"failed: {variant.name}: {type(error).__name__}: {error}"
    return "compiled"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 if a variant could not be compiled."""
    parser = argparse.ArgumentParser(description="Compile the Gram kernel into Triton's cache.")
    parser.add_argument("--capability", type=int, default=90, choices=sorted(compiled.SHARED_LIMIT))
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which none is begun")
    options = parser.parse_args(arguments)
    ends = time.monotonic() + options.seconds
    jobs = [(variant, options.capability, ends) for variant in ahead()]
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        said = pool.map(compile_one, jobs, chunksize=1)
    for line in said:
        if line.startswith("failed"):
            print(line[:300])
    print(f"gpu_compile: {said.count('compiled')} of {len(said)} variants in Triton's cache")
    return int(any(line.startswith("failed") for line in said))


if __name__ == "__main__":
    sys.exit(main())
