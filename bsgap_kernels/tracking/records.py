"""Numbers of a site: which metrics there are, and how they follow from what a site added up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bsgap_kernels.dispatch import largest_rank
from bsgap_kernels.ops import SUMMARY_COLUMNS
from bsgap_kernels.tracking.sums import Sums

# As in sums.py, without a frame of Python around it.
_gram_counts: Callable[..., Tensor] = torch.ops.bsgap._gram_counts.default._op

METRICS = ("near_rank", *SUMMARY_COLUMNS, "saturation", "dormant_units")
"""What a tracker can record; definitions and sources in bsgap_kernels/reference.py, of the same names."""


@dataclass(frozen=True)
class SiteRecord:
    """What one step's reads of one site gave.

    near_rank is #{σ > max(atol, rtol·σ_max)} of the unfolded activation, lower and upper its certified
    bounds (0 and k if the tracker does not certify), ratio near_rank / k; k is min(m, n) of the shape (m, n),
    or min(m - 1, n) if centred. summary holds the other metrics by name. A non-finite activation gives
    near_rank -1 and NaN floats. seconds is the time spent in the hooks (on a GPU: the time to launch).
    """

    shape: tuple[int, int]
    near_rank: int
    lower: int
    upper: int
    ratio: float
    summary: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Question:
    """What is asked of every site."""

    atol: float
    rtol: float
    center: bool
    certify: bool
    metrics: tuple[str, ...]

    @cached_property
    def spectrum(self) -> bool:
        """Whether eigenvalues are needed."""
        return any(metric in SUMMARY_COLUMNS for metric in self.metrics)

    @cached_property
    def sums(self) -> bool:
        """Whether column sums are needed."""
        return self.center or "saturation" in self.metrics

    @cached_property
    def magnitudes(self) -> bool:
        """Whether sums of absolute values are needed."""
        return "dormant_units" in self.metrics


@dataclass
class Numbers:
    """Answers on the device, one entry a site, all of one device."""

    counts: Tensor  # float64 (sites, 4): near-rank, lower and upper bound, rows
    spectra: list[Tensor]
    centred_spectra: list[Tensor]
    magnitudes: list[Tensor]

    def map(self, function: Callable[[Tensor], Tensor]) -> Numbers:
        """The same with every tensor put through a function."""

        def each(tensors: list[Tensor]) -> list[Tensor]:
            return [function(x) for x in tensors]

        return Numbers(
            function(self.counts),
            each(self.spectra),
            each(self.centred_spectra),
            each(self.magnitudes),
        )


def ask(sites: Sequence[Sums], question: Question) -> Numbers:
    """Count everything that was asked of sites on one device; nothing waits for it.

    Cost: of near-rank alone one factorisation a site, or small matrices eight at a time; other metrics need
    the eigenvalues.
    """
    answered = sites
    if question.center:
        answered = [s.centred() if s.features_side else s for s in sites]
    counts, spectra = _count(answered, question, question.certify, question.spectrum)
    centred: list[Tensor] = []
    if "saturation" in question.metrics:
        _, centred = _count([s.centred() for s in sites], question, False, True)
    magnitudes = [s.magnitudes.clone() for s in sites if s.magnitudes is not None]
    return Numbers(counts, spectra, centred, magnitudes)


def _count(
    sites: Sequence[Sums], question: Question, certify: bool, spectrum: bool
) -> tuple[Tensor, list[Tensor]]:
    grams, totals = [s.gram for s in sites], [s.totals for s in sites]
    counts = _gram_counts(grams, totals, question.atol, question.rtol, certify)
    if not spectrum:
        return counts, []
    return counts, list(torch.ops.bsgap._gram_eigenvalues(grams).split([s.side for s in sites]))


def record_of(index: int, numbers: Numbers, n: int, question: Question, seconds: float) -> SiteRecord:
    """The record of one site of n features from numbers on the host."""
    near_rank, lower, upper, m = (round(value) for value in numbers.counts[index].tolist())
    k = largest_rank(m, n, question.center)
    if m * n == 0:
        near_rank = lower = upper = 0
    near_rank = min(near_rank, k)
    if near_rank < 0:
        lower = upper = near_rank
    elif not question.certify:
        lower, upper = 0, k
    ratio = math.nan if near_rank < 0 else near_rank / k if k else 0.0
    summary: dict[str, float] = {}
    columns: dict[str, float] = {}
    if question.spectrum:
        columns = dict(zip(SUMMARY_COLUMNS, _columns(numbers.spectra[index], m, n), strict=True))
    for metric in question.metrics:
        if metric == "saturation":
            pca_rank = _columns(numbers.centred_spectra[index], m, n)[SUMMARY_COLUMNS.index("pca_rank")]
            summary[metric] = pca_rank / n if n else 0.0
        elif metric == "dormant_units":
            summary[metric] = _dormant(numbers.magnitudes[index]) if m else 0.0
        elif metric != "near_rank":
            summary[metric] = columns[metric]
    return SiteRecord((m, n), near_rank, max(lower, -1), min(upper, k), ratio, summary, seconds)


def _columns(eigenvalues: Tensor, m: int, n: int) -> list[float]:
    """`spectral_summary`'s columns from the eigenvalues, ascending, of a Gram matrix of side >= min(m, n)."""
    k = min(m, n)
    if k == 0:
        return [0.0] * (len(SUMMARY_COLUMNS) - 1) + [math.nan]
    largest = eigenvalues[-k:].contiguous()
    if bool(torch.isnan(largest[-1])):
        return [math.nan] * len(SUMMARY_COLUMNS)
    summary = torch.ops.bsgap._summarize(largest[None], None, m, n)
    row: list[float] = summary[0].tolist()
    return row


def _dormant(magnitudes: Tensor) -> float:
    """Units with no activity at all (τ = 0 of Sokar et al. 2023, definition 3.1)."""
    if not bool(torch.isfinite(magnitudes).all()):
        return math.nan
    return float((magnitudes <= 0).sum())
