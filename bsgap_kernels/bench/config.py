"""Settings of a benchmark run, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .cases import COARSE_RTOL, FINE_RTOL, Case, select_cases
from .measurements import MEASUREMENTS

DEVICES = ("cpu", "cuda")
QUICK_ROUNDS = 5
QUICK_BUDGET_S = 1.0


@dataclass(frozen=True)
class BenchConfig:
    """Settings of a benchmark run."""

    json: Path | None = None
    """Result file (JSON). Until the run is complete it is FILE.partial, rewritten after every case."""
    cases: list[str] = field(default_factory=lambda: ["*"])
    """Names of cases, or shell patterns such as '65536*'."""
    quick: bool = False
    """Leave out the slow cases and take few rounds: a look, not a measurement."""
    rounds: int = 15
    """Most rounds of a contender in a case."""
    budget: float = 2.0
    """Seconds of timed rounds of a contender in a case; a slow one gets fewer samples, at least 3."""
    rtol: list[float] | None = None
    """Thresholds, relative to the largest singular value; see `thresholds`."""
    measure: list[str] | None = None
    """Names of what is measured beside the cases; see `other_measurements`."""
    threads: int | None = None
    """Threads of torch and of NumPy's BLAS; what they are set to if not given."""
    seed: int = 0
    """Seed of the inputs and of the order within the rounds."""
    device: str = "cpu"
    """cpu, or cuda: then the cases, peers and floors are those of bench/cuda."""
    time_limit: float | None = None
    """On cuda: nothing new is begun after this many seconds."""

    @property
    def thresholds(self) -> list[float]:
        """`rtol`; if not given 1e-2 and, on a CPU unless in a hurry, 1e-3."""
        if self.rtol is not None:
            return self.rtol
        return [COARSE_RTOL] if self.quick or self.device == "cuda" else [COARSE_RTOL, FINE_RTOL]

    @property
    def other_measurements(self) -> list[str]:
        """`measure`; if not given all of them in a run of all cases on a CPU, else none."""
        if self.measure is not None:
            return self.measure
        everything = self.device == "cpu" and self.cases == ["*"] and not self.quick
        return list(MEASUREMENTS) if everything else []

    @property
    def most_rounds(self) -> int:
        """Rounds of a contender at most, fewer where quick."""
        return min(self.rounds, QUICK_ROUNDS) if self.quick else self.rounds

    @property
    def seconds(self) -> float:
        """Timed seconds of a contender at most, fewer where quick."""
        return min(self.budget, QUICK_BUDGET_S) if self.quick else self.budget

    def problem(self, cases: Sequence[Case]) -> str | None:
        """What is wrong with the settings, in a sentence, or None. `cases` are those of the device."""
        if self.rounds < 1:
            return f"rounds must be at least 1, got {self.rounds}"
        if not self.budget >= 0:
            return f"budget must be a number of seconds, got {self.budget}"
        for rtol in self.thresholds:
            if not 0 < rtol < 1:
                return f"rtol must lie between 0 and 1, got {rtol}"
        if not self.thresholds or len(set(self.thresholds)) < len(self.thresholds):
            return f"rtol must be different numbers, got {self.thresholds}"
        for name in self.other_measurements:
            if name not in MEASUREMENTS:
                return f"measure must be some of {', '.join(MEASUREMENTS)}, got {name!r}"
        if self.threads is not None and self.threads < 1:
            return f"threads must be at least 1, got {self.threads}"
        if not 0 <= self.seed < 2**63:
            return f"seed must lie in 0 ... 2^63 - 1, got {self.seed}"
        if self.json is not None and (self.json.is_dir() or not self.json.absolute().parent.is_dir()):
            return f"json must name a file in an existing folder, got {self.json}"
        if self.device not in DEVICES:
            return f"device must be one of {', '.join(DEVICES)}, got {self.device!r}"
        if self.device == "cuda":
            if not torch.cuda.is_available():
                return "device cuda: torch sees no CUDA device here"
            if len(self.thresholds) > 1 or self.other_measurements:
                return "device cuda takes one rtol and nothing to measure beside the cases"
        if self.time_limit is not None and not self.time_limit > 0:
            return f"time-limit must be a positive number of seconds, got {self.time_limit}"
        try:
            select_cases(self.cases, quick=self.quick, among=cases)
        except ValueError as error:
            return str(error)
        return None

    def recorded(self) -> dict[str, Any]:
        """The settings as they go into a result."""
        settings = {k: v for k, v in asdict(self).items() if k not in ("json", "threads")}
        return {**settings, "rtol": self.thresholds, "measure": self.other_measurements}
