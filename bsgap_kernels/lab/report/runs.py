"""What the report knows of runs, their layers and their values over steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bsgap_kernels.lab.fitted import FITTED
from bsgap_kernels.lab.report.landscape import Curve, Sharpness
from bsgap_kernels.lab.report.warmup import Warmup

# The method of a run that names none.
PLAIN_METHOD = "sgd"


@dataclass
class Site:
    """What one layer ended with on the probe batch; None where the files do not say.

    The null is the count of one Gaussian matrix of the probe's shape, the law what Marchenko and Pastur's
    predicts for it.
    """

    name: str
    probe_shape: tuple[int, int] | None = None
    near_rank: float | None = None
    lower: float | None = None
    upper: float | None = None
    ratio: float | None = None
    null_near_rank: float | None = None
    null_ratio: float | None = None
    law_near_rank: float | None = None


@dataclass
class Trajectory:
    """Near-rank of one layer on the probe at every step that has one; NaN where it was null or −1."""

    steps: NDArray[np.int64]
    near_rank: NDArray[np.float64]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    ratio: NDArray[np.float64]

    def thinned(self, limit: int) -> Trajectory:
        """At most `limit` steps, evenly spaced in the recorded ones, first and last kept, no averages."""
        if len(self.steps) <= limit:
            return self
        kept = np.unique(np.linspace(0, len(self.steps) - 1, limit).round().astype(np.int64))
        return Trajectory(
            self.steps[kept], self.near_rank[kept], self.lower[kept], self.upper[kept], self.ratio[kept]
        )


@dataclass(frozen=True)
class Reached:
    """When the test accuracy first reached a target: training time and updates; None where not said."""

    seconds: float
    steps: int | None
    epochs: float | None


@dataclass
class Run:
    """One run; None where the files do not say."""

    name: str
    method: str = PLAIN_METHOD
    batch_size: int | None = None
    full_batch: bool = False
    seed: int | None = None
    status: str | None = None
    # Train accuracy at which it was to end, and why it ended: fitted, stalled, budget.
    until_fitted: float | None = None
    ended: str | None = None
    steps: int | None = None
    epochs: float | None = None
    train_accuracy: float | None = None
    test_accuracy: float | None = None
    gap: float | None = None
    # NaN where training diverged.
    train_loss: float | None = None
    step_ms: float | None = None
    metric_ms: float | None = None
    metric_percent: float | None = None
    # What arithmetic leaves of metric_ms at best.
    floor_ms: float | None = None
    # Of one reading of the probe, of which there were so many.
    probe_ms: float | None = None
    probes: int | None = None
    images_per_second: float | None = None
    # Images whose gradient was taken, every pass of every update counted.
    gradient_images: int | None = None
    train_seconds: float | None = None
    # By target accuracy; None where the run never reached it.
    time_to_accuracy: dict[float, Reached | None] = field(default_factory=dict)
    synthetic: bool = False
    sharpness: Sharpness | None = None
    warmup: Warmup | None = None
    label: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    sites: dict[str, Site] = field(default_factory=dict)
    trajectories: dict[str, Trajectory] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def diverged(self) -> bool:
        """Whether the training loss at the end is not finite: its accuracy is then no result."""
        return self.train_loss is not None and not math.isfinite(self.train_loss)

    @property
    def unfitted(self) -> bool:
        """Whether it was to train until fitted, and ended before."""
        return self.until_fitted is not None and self.ended != FITTED

    @property
    def usual_images(self) -> int | None:
        """Images whose gradient is taken where every update takes that of its batch once."""
        return None if self.steps is None or self.batch_size is None else self.steps * self.batch_size

    @property
    def batch_label(self) -> str:
        """Batch size in words: `128`, `1437 (full)`, `full`, or the run's name where it is unknown."""
        if self.batch_size is None:
            return "full" if self.full_batch else self.name
        return f"{self.batch_size} (full)" if self.full_batch else str(self.batch_size)


@dataclass
class Results:
    """Every run of a directory, ordered by batch size, method and seed."""

    directory: Path
    runs: list[Run]
    problems: list[str] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)

    @property
    def sites(self) -> list[str]:
        """Every layer, in forward order."""
        return list(dict.fromkeys(name for run in self.runs for name in (*run.sites, *run.trajectories)))

    @property
    def methods(self) -> list[str]:
        """Every method, plain SGD first."""
        return sorted({run.method for run in self.runs}, key=lambda method: (method != PLAIN_METHOD, method))

    @property
    def labels(self) -> list[str]:
        """Every group of runs that differ by their seed alone, in words, smallest batch first."""
        return list(dict.fromkeys(run.label for run in self.runs))

    @property
    def batch_labels(self) -> list[str]:
        """Every batch size in words, smallest first."""
        return list(dict.fromkeys(run.batch_label for run in self.runs))

    def of(self, label: str) -> list[Run]:
        """The runs of one label, one a seed."""
        return [run for run in self.runs if run.label == label]

    def sized(self, method: str | None = None) -> list[tuple[int, str, list[Run]]]:
        """(batch size, label, runs) of one method, or of all; runs without a batch size are left out."""
        groups = [(self.of(label)[0], label) for label in self.labels]
        return [
            (first.batch_size, label, self.of(label))
            for first, label in groups
            if first.batch_size and method in (None, first.method)
        ]
