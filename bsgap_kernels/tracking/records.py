"""Numbers of a site: which metrics there are, and how they follow from what a site added up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from bsgap_kernels.dispatch import SUMMED_GRAM_MIN_RTOL, device_kind, float32_min_rtol, largest_rank
from bsgap_kernels.ops import SUMMARY_COLUMNS
from bsgap_kernels.tracking.sums import Sums

# As in sums.py, without a frame of Python around it.
_gram_counts: Callable[..., Tensor] = torch.ops.bsgap._gram_counts.default._op
# Columns of its result: what comes before the counts, then three for each rtol.
ROWS, _TRACE, _FROBENIUS, _LARGEST, _FACTS = range(5)

ABOUT_THE_MEAN = ("mean_energy", "centred_near_rank")
METRICS = ("near_rank", *SUMMARY_COLUMNS, *ABOUT_THE_MEAN, "saturation", "dormant_units")
"""What a tracker can record; definitions and sources in bsgap_kernels/reference.py, of the same names."""
DEFAULT_METRICS = ("near_rank", "stable_rank", "participation_ratio", *ABOUT_THE_MEAN)
DEFAULT_RTOLS = (1e-1, 3e-2, 1e-2)
"""What tells sites, steps and batch sizes apart (docs/metrics.md) and costs no eigenvalues."""
_OF_MOMENTS = ("sigma_max", "frobenius_norm", "stable_rank", "participation_ratio")


@dataclass(frozen=True)
class SiteRecord:
    """What one step's reads of one site gave.

    near_rank is #{σ > max(atol, rtol·σ_max)} of the unfolded activation at the first rtol, lower and upper
    its certified bounds (0 and k if the tracker does not certify), ratio near_rank / k; k is min(m, n) of the
    shape (m, n), or min(m - 1, n) if centred. summary holds the other metrics by name, the counts at a
    further rtol as `near_rank@0.03`, their bounds as `lower@0.03`. A non-finite activation gives counts of -1
    and NaN floats. seconds is the time spent in the hooks (on a GPU: the time to launch).
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
    rtols: tuple[float, ...]
    center: bool
    certify: bool
    metrics: tuple[str, ...]

    @cached_property
    def spectrum(self) -> bool:
        """Whether eigenvalues are needed."""
        return any(metric in SUMMARY_COLUMNS and metric not in _OF_MOMENTS for metric in self.metrics)

    @cached_property
    def about_mean(self) -> bool:
        """Whether the centred Gram matrix is counted beside the other."""
        return any(metric in ABOUT_THE_MEAN for metric in self.metrics)

    @cached_property
    def sums(self) -> bool:
        """Whether column sums are needed."""
        return self.center or self.about_mean or "saturation" in self.metrics

    @cached_property
    def exact(self) -> bool:
        """Whether more is asked than float32 sums resolve: then sums are float64."""
        return self.center or self.spectrum or "saturation" in self.metrics or self.atol > 0

    @cached_property
    def magnitudes(self) -> bool:
        """Whether sums of absolute values are needed."""
        return "dormant_units" in self.metrics


@dataclass
class Numbers:
    """Answers on the device, one entry a site, all of one device."""

    counts: Tensor  # float64, as `_gram_counts` returns them
    spectra: list[Tensor]
    centred_counts: Tensor | None
    centred_spectra: list[Tensor]
    magnitudes: list[Tensor]
    resolved: float  # least rtol that the sums resolve

    def map(self, function: Callable[[Tensor], Tensor]) -> Numbers:
        """The same with every tensor put through a function."""

        def each(tensors: list[Tensor]) -> list[Tensor]:
            return [function(x) for x in tensors]

        return Numbers(
            function(self.counts),
            each(self.spectra),
            None if self.centred_counts is None else function(self.centred_counts),
            each(self.centred_spectra),
            each(self.magnitudes),
            self.resolved,
        )


def ask(sites: Sequence[Sums], question: Question, *, float32_sums: bool = False) -> Numbers:
    """Count everything that was asked of sites on one device; nothing waits for it.

    float32_sums: some sites may hold such, where the question allows them.
    Cost: one factorisation a site and rtol, or small matrices eight at a time, and as much again about the
    mean; metrics that are not `_OF_MOMENTS` need the eigenvalues.
    """
    saturation = "saturation" in question.metrics
    about_mean = [s.centred() for s in sites] if question.about_mean or saturation else []
    answered = sites
    if question.center:
        answered = [s.centred() if s.features_side else s for s in sites]
    # In one call: small matrices are counted side by side, large ones on all threads.
    counts = _counts([*answered, *about_mean] if question.about_mean else answered, question)
    return Numbers(
        counts[: len(sites)],
        _spectra(answered) if question.spectrum else [],
        counts[len(sites) :] if question.about_mean else None,
        _spectra(about_mean) if saturation else [],
        [s.magnitudes.clone() for s in sites if s.magnitudes is not None],
        _resolved(sites[0].gram, question) if float32_sums else SUMMED_GRAM_MIN_RTOL,
    )


def _resolved(gram: Tensor, question: Question) -> float:
    limit = float32_min_rtol(device_kind(gram))
    float64 = question.exact or question.certify or min(question.rtols) < limit
    return SUMMED_GRAM_MIN_RTOL if float64 else limit


def _counts(sites: Sequence[Sums], question: Question) -> Tensor:
    grams, totals = [s.gram for s in sites], [s.totals for s in sites]
    return _gram_counts(grams, totals, question.atol, question.rtols, question.certify)


def _spectra(sites: Sequence[Sums]) -> list[Tensor]:
    eigenvalues = torch.ops.bsgap._gram_eigenvalues([s.gram for s in sites])
    return list(eigenvalues.split([s.side for s in sites]))


class _Count(NamedTuple):
    """A near-rank with its certified bounds, or with 0 and k."""

    near_rank: int
    lower: int
    upper: int


def _counts_of(row: Sequence[float], k: int, question: Question) -> list[_Count]:
    """The counts at each rtol from a row of `_gram_counts`."""
    found = []
    for first in range(_FACTS, len(row), 3):
        near_rank, lower, upper = (round(value) for value in row[first : first + 3])
        near_rank = min(near_rank, k)
        if near_rank < 0:
            lower = upper = near_rank
        elif not question.certify:
            lower, upper = 0, k
        found.append(_Count(near_rank, max(lower, -1), min(upper, k)))
    return found


def record_of(index: int, numbers: Numbers, n: int, question: Question, seconds: float) -> SiteRecord:
    """The record of one site of n features from numbers on the host."""
    row: list[float] = numbers.counts[index].tolist()
    m = round(row[ROWS])
    k = largest_rank(m, n, question.center)
    first, *others = _counts_of(row, k, question)
    ratio = math.nan if first.near_rank < 0 else first.near_rank / k if k else 0.0
    summary: dict[str, float] = {}
    for rtol, count in zip(question.rtols[1:], others, strict=True):
        summary |= _named("", f"@{rtol:g}", count, question)
    columns: dict[str, float] = {}
    if question.spectrum:
        columns = dict(zip(SUMMARY_COLUMNS, _columns(numbers.spectra[index], m, n), strict=True))
    else:
        columns = _of_moments(row[_TRACE], row[_FROBENIUS], row[_LARGEST])
    about_mean: list[float] = [] if numbers.centred_counts is None else numbers.centred_counts[index].tolist()
    for metric in question.metrics:
        if metric == "saturation":
            pca_rank = _columns(numbers.centred_spectra[index], m, n)[SUMMARY_COLUMNS.index("pca_rank")]
            summary[metric] = pca_rank / n if n else 0.0
        elif metric == "dormant_units":
            summary[metric] = _dormant(numbers.magnitudes[index]) if m else 0.0
        elif metric == "mean_energy":
            summary[metric] = _mean_energy(row[_TRACE], about_mean[_TRACE])
        elif metric == "centred_near_rank":
            summary |= _centred_counts(row, about_mean, largest_rank(m, n, True), question, numbers.resolved)
        elif metric != "near_rank":
            summary[metric] = columns[metric]
    return SiteRecord((m, n), *first, ratio, summary, seconds)


def _named(prefix: str, suffix: str, count: _Count, question: Question) -> dict[str, float]:
    found: dict[str, float] = {f"{prefix}near_rank{suffix}": count.near_rank}
    if question.certify:
        found |= {f"{prefix}lower{suffix}": count.lower, f"{prefix}upper{suffix}": count.upper}
    return found


def _centred_counts(
    row: Sequence[float], about_mean: Sequence[float], k: int, question: Question, resolved: float
) -> dict[str, float]:
    """The counts about the mean, but for those that the sums do not resolve.

    The error of the sums is a share of the whole largest eigenvalue, which the centred one can be far below.
    """
    largest, own = row[_LARGEST], about_mean[_LARGEST]
    limit = resolved * math.sqrt(largest / own) if own > 0 else 0.0
    found: dict[str, float] = {}
    for place, (rtol, count) in enumerate(
        zip(question.rtols, _counts_of(about_mean, k, question), strict=True)
    ):
        if question.certify or question.atol > 0 or not rtol < limit:
            found |= _named("centred_", f"@{rtol:g}" if place else "", count, question)
    return found


def _mean_energy(trace: float, centred_trace: float) -> float:
    """The share of the squares that the column means hold; 0 of a zero matrix."""
    if not trace > 0:
        return trace * 0.0  # NaN stays NaN
    return min(max(1.0 - centred_trace / trace, 0.0), 1.0)


def _of_moments(trace: float, frobenius: float, largest: float) -> dict[str, float]:
    """`spectral_summary`'s columns that trace, Frobenius norm and largest eigenvalue of AᵀA give."""
    nothing = trace == 0
    stable = 0.0 if nothing else trace / largest if largest > 0 else math.nan
    participation = 0.0 if nothing else (trace / frobenius) ** 2 if frobenius > 0 else math.nan
    values = math.sqrt(max(largest, 0.0)), math.sqrt(max(trace, 0.0)), stable, participation
    if math.isnan(trace):
        values = (math.nan,) * 4
    return dict(zip(_OF_MOMENTS, values, strict=True))


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
