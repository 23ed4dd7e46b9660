"""The matrices that are timed, each defined once: for `bsgap bench`, `benchmarks/` and the tests."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CONDITION = 1e-4
"""Last over first scale of the decay: half of the singular values lie above 1e-2 of the largest."""
REFLECTIONS = 3
COARSE_RTOL, FINE_RTOL = 1e-2, 1e-3
"""The thresholds of a full run; the finer one is past what float32 sums resolve."""


@dataclass(frozen=True)
class Case:
    """One input. `shapes` holds one entry, or one for each matrix of a list (then the call is grouped)."""

    name: str
    about: str
    shapes: tuple[tuple[int, ...], ...]
    grouped: bool = False
    slow: bool = False
    """Left out by --quick: one round of all contenders takes 10 s and more."""
    calls: int = 1
    """Calls in a row per measurement, without emptying the cache: for calls too short to be timed alone."""
    profile: bool = False
    """Whether the phases of our ops are timed too."""
    dtype: torch.dtype = torch.float32
    image_batch: int = 0
    """Images in the batch where the matrices are the channel unfoldings of a model's square activations."""

    @property
    def matrices(self) -> int:
        """Number of matrices in the input."""
        return sum(torch.Size(shape[:-2]).numel() for shape in self.shapes)

    @property
    def values(self) -> int:
        """Entries of the input."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    def make(self, seed: int = 0, device: torch.device | str = "cpu") -> list[Tensor]:
        """The input, the same for the same seed and device: one tensor, or the matrices of the group."""
        generator = torch.Generator(device).manual_seed(seed)
        return [decaying(shape, generator).to(self.dtype) for shape in self.shapes]


def decaying(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Matrix (*, m, n), float32, with singular values that decay geometrically over about four decades.

    Gaussian entries, the shorter side scaled by a geometric sequence and mixed by Householder reflections:
    dense and correlated at O(m n) cost, where products with orthogonal factors would cost as much as what
    is measured. In a batch each matrix decays at its own rate, so that the counts differ.
    """
    *batch, m, n = shape
    k = min(m, n)
    device = generator.device
    X = torch.randn(shape, generator=generator, device=device)
    rate = torch.ones((*batch, 1), device=device)
    if batch:
        rate.uniform_(0.5, 1.25, generator=generator)
    X = X if n <= m else X.mT
    X *= (CONDITION ** (torch.linspace(0, 1, k, device=device) * rate)).unsqueeze(-2)
    for _ in range(REFLECTIONS):
        v = torch.nn.functional.normalize(
            torch.randn((*batch, k, 1), generator=generator, device=device), dim=-2
        )
        X.sub_((X @ v) * (2 * v.mT))
    return (X if n <= m else X.mT).contiguous()


def resnet56_channel_shapes(batch: int) -> tuple[tuple[int, int], ...]:
    """(batch · height · width, channels) of the 55 convolutions of ResNet-56 on 32 x 32 images."""
    stage = [(32, 16)] * 19 + [(16, 32)] * 18 + [(8, 64)] * 18
    return tuple((batch * side * side, channels) for side, channels in stage)


CASES = (
    Case("32x32", "overhead of a call", ((32, 32),), calls=100),
    Case("65536x64", "tall, few features", ((65536, 64),)),
    Case("65536x512", "tall", ((65536, 512),), profile=True),
    Case("2048x8192", "wide", ((2048, 8192),), slow=True),
    Case("4096x4096", "square", ((4096, 4096),), slow=True),
    Case("4096x256x32", "batch of 4096 matrices 256×32", ((4096, 256, 32),)),
    Case("512x4704", "LeNet-5, first layer, probe batch", ((512, 4704),)),
    Case("1437x4704", "LeNet-5, first layer, all digits", ((1437, 4704),), slow=True),
    Case(
        "resnet56-channel",
        "55 layers of ResNet-56, batch 64, one call",
        resnet56_channel_shapes(64),
        grouped=True,
    ),
)


def select_cases(
    patterns: Sequence[str] = ("*",), *, quick: bool = False, among: Sequence[Case] = CASES
) -> list[Case]:
    """Cases whose name matches a shell pattern, in their order; ValueError for one without a match.

    `quick` leaves out the slow ones, but not one that a pattern names in full.
    """
    names = [case.name for case in among]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"no benchmark case matches {pattern!r}; the cases are {', '.join(names)}")
    return [
        case
        for case in among
        if case.name in patterns
        or (any(fnmatch.fnmatch(case.name, p) for p in patterns) and not (quick and case.slow))
    ]
