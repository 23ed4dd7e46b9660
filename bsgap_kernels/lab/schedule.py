"""A learning rate over the updates of a run: a linear warm-up, then a decay."""

from __future__ import annotations

import math
from dataclasses import dataclass

DECAYS = ("constant", "cosine", "polynomial")


@dataclass(frozen=True)
class Schedule:
    """Learning rate of update t, from 0: a ramp peak · t / warmup, then peak · d((t − warmup) / horizon).

    d(x) is 1 (constant), (1 + cos πx) / 2 (cosine) or (1 − x)^power (polynomial), and stays at d(1) after
    x = 1. With a warm-up the first update has rate 0: the ramp begins there.

    Args:
        peak: the rate at the end of the warm-up.
        warmup: updates of the ramp; 0 begins at the peak.
        decay: one of `DECAYS`.
        horizon: updates from the end of the warm-up to the end of the decay, positive.
        power: of the polynomial.
    """

    peak: float
    warmup: int = 0
    decay: str = "constant"
    horizon: float = 1.0
    power: float = 1.0

    def at(self, step: int) -> float:
        """The learning rate of update `step`."""
        if step < self.warmup:
            return self.peak * step / self.warmup
        x = min((step - self.warmup) / self.horizon, 1.0)
        if self.decay == "cosine":
            return self.peak * (1 + math.cos(math.pi * x)) / 2
        return self.peak * ((1 - x) ** self.power if self.decay == "polynomial" else 1.0)
