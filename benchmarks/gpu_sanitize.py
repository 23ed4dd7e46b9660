"""Small cases of every op and of every kernel regime, counts checked: what compute-sanitizer runs.

compute-sanitizer --tool racecheck python benchmarks/gpu_sanitize.py
python benchmarks/gpu_sanitize.py --device cpu      # the script itself, without a GPU
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

import bsgap_kernels as bsgap

SIDES = (1, 5, 17, 32, 33, 100, 128, 129, 200)
LARGE_SIDES = (520, 1030)
"""Two block columns and more of the large factorisations; near_rank and its interval only."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
RTOL = 0.3


def matrix(m: int, k: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, int]:
    """A with known near-rank: orthogonal columns scaled so that half lie well above the threshold."""
    generator = torch.Generator().manual_seed(k)
    q = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64))[0]
    count = (k + 1) // 2
    sigma = torch.cat([torch.full((count,), 1.0), torch.full((k - count,), 0.05)]).double()
    return (q * sigma).to(dtype).to(device), count


def checked(name: str, found: Tensor, expected: int) -> None:
    """Fails with the case's name where a count is wrong."""
    if not bool((found == expected).all()):
        raise SystemExit(f"gpu_sanitize: {name}: counted {found.tolist()}, expected {expected}")


def run(device: torch.device, sides: Sequence[int], large: Sequence[int]) -> int:
    """Runs all cases; returns how many counts were checked."""
    done = 0
    group: list[Tensor] = []
    counts: list[int] = []
    for k in sides:
        for dtype in DTYPES:
            A, count = matrix(2 * k + 3, k, dtype, device)
            for name, X in (("tall", A), ("wide", A.mT.contiguous()), ("strided", A.mT)):
                checked(f"near_rank {k} {dtype} {name}", bsgap.near_rank(X, rtol=RTOL), count)
                done += 1
            group.append(A)
            counts.append(count)
        batch = torch.stack([A, A.flip(0), 2 * A])
        checked(f"near_rank batch {k}", bsgap.near_rank(batch, rtol=RTOL), count)
        checked(f"near_rank centred {k}", bsgap.near_rank(A - A, rtol=RTOL, center=True), 0)
        for mode in ("rigorous", "probed"):
            lower, upper = bsgap.near_rank_interval(batch, rtol=RTOL, mode=mode)
            checked(f"interval {mode} {k}", (lower <= count) & (upper >= count), 1)
        thresholds = torch.linspace(0.1, 0.9, 6, dtype=torch.float64, device=device)
        checked(f"counts {k}", bsgap.singular_value_counts(A, thresholds), count)
        summary = bsgap.spectral_summary(batch)
        ratio = bsgap.near_rank_ratio(A, rtol=RTOL)
        gram, covariance = bsgap.gram(A), bsgap.covariance(A)
        state = torch.zeros(k + 1, k + 1, dtype=torch.float64, device=device)
        bsgap.gram_accumulate_(state, A, torch.zeros(k, dtype=torch.float64, device=device))
        finite = [torch.isfinite(x).all() for x in (summary[..., :5], ratio, gram, covariance, state)]
        checked(f"metrics {k}", torch.stack(finite), 1)
        done += 8
    images = [
        torch.randn(3, c, 5, 4, generator=torch.Generator().manual_seed(c)).to(device) for c in (3, 16, 40)
    ]
    views = [x.movedim(1, -1) for x in [*images, *(x.to(memory_format=torch.channels_last) for x in images)]]
    found = bsgap.near_rank_grouped(views, rtol=1e-3)
    checked("grouped convolutions", (found[:3] == found[3:]) & (found[:3] > 0), 1)
    grouped = bsgap.near_rank_grouped(group, rtol=RTOL)
    checked("grouped", grouped - torch.tensor(counts, device=device), 0)
    for k in large:
        A, count = matrix(k + 30, k, torch.bfloat16, device)
        checked(f"near_rank {k}", bsgap.near_rank(A, rtol=RTOL), count)
        lower, upper = bsgap.near_rank_interval(A, rtol=RTOL)
        checked(f"interval {k}", (lower <= count) & (upper >= count), 1)
        done += 2
    bad = torch.full((9, 5), float("nan"), device=device)
    checked("non-finite", bsgap.near_rank(bad, rtol=RTOL), -1)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return done + 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0, or 1 with the first case that is wrong."""
    parser = argparse.ArgumentParser(description="Small cases of every op, for compute-sanitizer.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--small", action="store_true", help="leave out the sides of which each takes seconds"
    )
    options = parser.parse_args(arguments)
    done = run(torch.device(options.device), SIDES, () if options.small else LARGE_SIDES)
    print(f"gpu_sanitize: {done} counts right on {options.device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
