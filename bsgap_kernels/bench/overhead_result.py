"""What a measurement of tracking overhead found, and its targets."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .overhead_ways import NAIVE, NONE, OURS
from .target_rows import Record, at_least, at_most, over

MOST_PERCENT = 5.0
"""Of a step without tracking, for every site at every step."""
LEAST_FACTOR = 10.0
"""Cost of naive hooks over ours."""
EQUAL, NEAR_TAU, WRONG = "equal", "near tau", "WRONG"


@dataclass(frozen=True)
class WayTimes:
    """Times of the training step under one way of tracking.

    added_ms: median less the median without tracking; noise can make it negative. inside_ms: median time
    inside its hooks and at the end of the step, taken in steps of their own; None where hooks cannot be timed
    apart. cost_ms: of ours the larger of the two, of the others the smaller, so that neither noise nor work
    outside the hooks is in our favour.
    """

    name: str
    rounds: int = 0
    median_ms: float | None = None
    lower_quartile_ms: float | None = None
    upper_quartile_ms: float | None = None
    added_ms: float | None = None
    inside_ms: float | None = None
    cost_ms: float | None = None
    percent: float | None = None
    """cost_ms in percent of the median without tracking."""
    steps_per_sample: int = 1
    sites_ms: dict[str, float] = field(default_factory=dict)
    """Median time inside each hook, by site."""
    error: str | None = None


@dataclass(frozen=True)
class SiteCount:
    """Near-rank of one site in one step, counted by both ways of the same activation.

    `expected` comes from float64 singular values. Verdict: `equal`; `near tau` where the two differ but each
    is off by no more than the singular values within 1 % of the threshold; else `WRONG`.
    """

    site: str
    shape: tuple[int, int]
    ours: int
    naive: int
    expected: int
    verdict: str


@dataclass(frozen=True)
class OverheadResult:
    """Step times under every way of tracking, time of every site, and whether the counts agree."""

    ways: tuple[WayTimes, ...]
    counts: tuple[SiteCount, ...]
    other_work: float | None = None
    """Share of the machine that other processes had meanwhile."""

    def way(self, name: str) -> WayTimes:
        """The times of a way by its name; empty if it was not measured."""
        return next((way for way in self.ways if way.name == name), WayTimes(name))

    @property
    def step_ms(self) -> float | None:
        """Median time of a step without tracking."""
        return self.way(NONE).median_ms

    @property
    def equal(self) -> int:
        """Sites where both ways count the same."""
        return sum(count.verdict == EQUAL for count in self.counts)

    @property
    def wrong(self) -> list[str]:
        """Sites where the counts differ by more than the threshold's neighbourhood explains."""
        return [count.site for count in self.counts if count.verdict == WRONG]

    def targets(self, about: str) -> list[Record]:
        """The targets of tracking every site at every step, `about` named first."""
        ours, naive = self.way(OURS), self.way(NAIVE)
        return [
            at_most(f"{about}: cost of every site at every step", ours.percent, MOST_PERCENT, "% of a step"),
            at_least(f"{about}: naive hooks over ours", over(naive.cost_ms, ours.cost_ms), LEAST_FACTOR),
        ]

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "step_ms": self.step_ms,
            "ways": [asdict(way) for way in self.ways],
            "counts": {
                "sites": len(self.counts),
                "equal": self.equal,
                "wrong": self.wrong,
                "by_site": [asdict(count) for count in self.counts],
            },
            "other_work": self.other_work,
        }
