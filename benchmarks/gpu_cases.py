"""Small cases of every family of GPU kernels, counts checked: the smoke test, and what sanitizers run.

python benchmarks/gpu_cases.py "large sides"          # one family, or several; all by default
python benchmarks/gpu_cases.py --device cpu           # the script itself, without a GPU
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

import bsgap_kernels as bsgap
from bsgap_kernels.tracking import RankTracker

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
        raise SystemExit(f"gpu_cases: {name}: counted {found.tolist()}, expected {expected}")


def counts(device: torch.device, sides: Sequence[int], dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    """Near-rank of tall, wide, strided and batched matrices."""
    for k in sides:
        for dtype in dtypes:
            A, count = matrix(2 * k + 3, k, dtype, device)
            for name, X in (("tall", A), ("wide", A.mT.contiguous()), ("strided", A.mT)):
                checked(f"near_rank {k} {dtype} {name}", bsgap.near_rank(X, rtol=RTOL), count)
        batch = torch.stack([A, A.flip(0), 2 * A])
        checked(f"near_rank batch {k}", bsgap.near_rank(batch, rtol=RTOL), count)
        checked(f"near_rank centred {k}", bsgap.near_rank(A - A, rtol=RTOL, center=True), 0)
    checked("non-finite", bsgap.near_rank(torch.full((9, 5), float("nan"), device=device), rtol=RTOL), -1)


def spectra(device: torch.device, sides: Sequence[int]) -> None:
    """Many thresholds, summaries, Gram and covariance matrices."""
    for k in sides:
        A, count = matrix(2 * k + 3, k, torch.float32, device)
        thresholds = torch.linspace(0.1, 0.9, 6, dtype=torch.float64, device=device)
        checked(f"counts {k}", bsgap.singular_value_counts(A, thresholds), count)
        state = torch.zeros(k + 1, k + 1, dtype=torch.float64, device=device)
        bsgap.gram_accumulate_(state, A, torch.zeros(k, dtype=torch.float64, device=device))
        found = (bsgap.spectral_summary(A)[:5], bsgap.gram(A), bsgap.covariance(A), state)
        checked(f"metrics {k}", torch.stack([torch.isfinite(x).all() for x in found]), 1)


def bounds(device: torch.device, sides: Sequence[int], mode: str) -> None:
    """Certified intervals."""
    for k in sides:
        A, count = matrix(k + 30, k, torch.bfloat16, device)
        lower, upper = bsgap.near_rank_interval(A, rtol=RTOL, mode=mode)
        checked(f"interval {mode} {k}", (lower <= count) & (upper >= count), 1)


def grouped(device: torch.device) -> None:
    """Lists of matrices, and convolutions in both memory formats."""
    images = [
        torch.randn(3, c, 5, 4, generator=torch.Generator().manual_seed(c)).to(device) for c in (3, 16, 40)
    ]
    views = [x.movedim(1, -1) for x in [*images, *(x.to(memory_format=torch.channels_last) for x in images)]]
    found = bsgap.near_rank_grouped(views, rtol=1e-3)
    checked("grouped convolutions", (found[:3] == found[3:]) & (found[:3] > 0), 1)
    pairs = [matrix(2 * k + 3, k, dtype, device) for k in (5, 33, 129) for dtype in DTYPES]
    counted = bsgap.near_rank_grouped([A for A, _ in pairs], rtol=RTOL)
    checked("grouped", counted - torch.tensor([count for _, count in pairs], device=device), 0)


def hooks(device: torch.device) -> None:
    """A tracker's step: activations read as they appear, then one count."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 20, 3), torch.nn.ReLU()).to(device)
    x = torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(1)).to(device)
    with RankTracker(model, rtol=RTOL, certify=True, verbose=False) as tracker:
        activation = model(x)
        (record,) = tracker.collect().values()
    sigma = torch.linalg.svdvals(activation.detach().double().movedim(1, -1).flatten(0, -2).cpu())
    checked("hook path", torch.tensor(record.near_rank), int((sigma > RTOL * sigma[0]).sum()))


FAMILIES: dict[str, Callable[[torch.device], None]] = {
    "sides up to 32": partial(counts, sides=(1, 5, 17, 32)),
    "sides up to 128": partial(counts, sides=(33, 100, 128)),
    "sides beyond 128": partial(counts, sides=(129, 200)),
    "spectra": partial(spectra, sides=(5, 33, 129)),
    "bounds": partial(bounds, sides=(17, 100, 200), mode="rigorous"),
    "probes": partial(bounds, sides=(430,), mode="probed"),
    "groups": grouped,
    "hook path": hooks,
    "large sides": lambda device: (counts(device, (520,), DTYPES[:1]), bounds(device, (1030,), "rigorous"))[
        0
    ],
}
REDUCED = ("sides up to 32", "bounds", "spectra", "hook path")
"""Under a sanitizer each launch takes long."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0, or 1 with the first case that is wrong."""
    parser = argparse.ArgumentParser(description="Small cases of every family of GPU kernels.")
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--reduced", action="store_true", help=", ".join(REDUCED))
    options = parser.parse_args(arguments)
    chosen = options.families or (REDUCED if options.reduced else FAMILIES)
    for name in chosen:
        if name not in FAMILIES:
            parser.error(f"no family {name!r}; there are {', '.join(FAMILIES)}")
        FAMILIES[name](torch.device(options.device))
        if options.device == "cuda":
            torch.cuda.synchronize()
        print(f"gpu_cases: {name}: right on {options.device}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
