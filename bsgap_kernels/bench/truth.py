"""What the counts should be, from float64 singular values, and the verdict on each contender's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .contenders import Result

BAND = 0.01
"""A count may differ by the singular values within this relative distance of τ and is then no error."""
TRUTH_MARGIN = 1e-10
"""float64 SVD is exact to far less than this share of σ_max; a proven interval gets this much leeway."""


@dataclass(frozen=True)
class Truth:
    """Counts (one entry a matrix) at τ, at the ends of the 1 % band and at those of the SVD's own error."""

    counts: Tensor
    band: tuple[Tensor, Tensor]
    certain: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Verdict:
    """How many matrices were counted right, differ within the band, or are wrong.

    Of intervals: how many are a single number, and the largest upper - lower.
    """

    equal: int
    near_tau: int
    wrong: int
    proven: int | None = None
    widest: int | None = None

    @property
    def word(self) -> str:
        """One word for tables."""
        return "WRONG" if self.wrong else "near tau" if self.near_tau else "equal"


def truth(inputs: list[Tensor], rtol: float, *, centred: bool = False) -> Truth:
    """From float64 singular values of the input as it is (or less its column means)."""
    return truth_at(singular_values(inputs, centred=centred), rtol)


def singular_values(inputs: list[Tensor], *, centred: bool = False) -> list[Tensor]:
    """float64 singular values of the input as it is (or less its column means), for `truth_at`."""
    doubles = (A.double() for A in inputs)
    return [torch.linalg.svdvals(X - X.mean(-2, keepdim=True) if centred else X) for X in doubles]


def truth_at(singular_values: list[Tensor], rtol: float) -> Truth:
    """The truth about one threshold."""
    parts = []
    for sigma in singular_values:
        top = sigma[..., :1]
        tau = rtol * top
        bounds = (tau, tau * (1 + BAND), tau * (1 - BAND), tau + TRUTH_MARGIN * top, tau - TRUTH_MARGIN * top)
        parts.append(torch.stack([(sigma > b).sum(-1).flatten() for b in bounds]))
    counts, few, many, at_least, at_most = torch.cat(parts, 1)
    return Truth(counts, (few, many), (at_least, at_most))


def truth_of_grams(inputs: list[Tensor], rtol: float, *, centred: bool = False) -> Truth:
    """`truth` from float64 Gram matrices of the smaller side, where an SVD would take minutes.

    An eigenvalue is off by a few k units of roundoff of the largest, so a singular value near τ = rtol·σ_max
    by about k·1e-16/rtol of σ_max: within TRUTH_MARGIN for rtol ≥ 1e-2 and k ≤ 8192.
    """
    roots = []
    for A in inputs:
        X = A.double()
        if centred:
            X = X - X.mean(-2, keepdim=True)
        gram = X.mT @ X if X.shape[-1] <= X.shape[-2] else X @ X.mT
        del X
        roots.append(torch.linalg.eigvalsh(gram).clamp_min_(0).sqrt_().flip(-1).cpu())
    return truth_at(roots, rtol)


def judge(result: Result, expected: Truth) -> Verdict:
    """Compares the result of a contender with the truth. A result of another shape is wrong altogether."""
    if isinstance(result, tuple):
        lower, upper = result[0].flatten(), result[1].flatten()
        if lower.shape != expected.counts.shape or upper.shape != lower.shape:
            return Verdict(0, 0, expected.counts.numel())
        # The true count lies between the certain ones; an interval that meets none of them excludes it.
        wrong = (lower > expected.certain[1]) | (upper < expected.certain[0])
        proven = int(((lower == upper) & ~wrong).sum())
        return Verdict(int((~wrong).sum()), 0, int(wrong.sum()), proven, int((upper - lower).max()))
    counts = result.flatten()
    if counts.shape != expected.counts.shape:
        return Verdict(0, 0, expected.counts.numel())
    equal = counts == expected.counts
    inside = (counts >= expected.band[0]) & (counts <= expected.band[1]) & ~equal
    return Verdict(int(equal.sum()), int(inside.sum()), int((~equal & ~inside).sum()))
