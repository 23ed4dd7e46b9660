"""When a run ends: once it fits its training set, when it has stopped improving, or with its budget."""

from __future__ import annotations

import math
from typing import Any

FITTED, STALLED, BUDGET = "fitted", "stalled", "budget"
TARGET = 0.99
"""Train accuracy of `--until-fitted` alone."""


class UntilFitted:
    """Decides after each evaluation whether a run ends there.

    Fitted is a run whose accuracy on the whole training set, in eval mode, is at least the target. Stalled is
    one whose training loss was not lower than ever before in `patience` evaluations in a row, or is not
    finite.

    Args:
        target: accuracy, from 0 to 1; None never ends a run.
        patience: evaluations; None for no limit.
    """

    def __init__(self, target: float | None, patience: int | None) -> None:
        self._target = target
        self._patience = patience
        self._lowest = math.inf
        self._since = 0

    def after(self, loss: float, accuracy: float) -> str | None:
        """`FITTED` or `STALLED` if the run ends with this evaluation, else None."""
        if self._target is None:
            return None
        if accuracy >= self._target:
            return FITTED
        if loss < self._lowest:
            self._lowest, self._since = loss, 0
        else:
            self._since += 1
        lost = not math.isfinite(loss)
        return STALLED if lost or (self._patience is not None and self._since >= self._patience) else None

    def state_dict(self) -> dict[str, Any]:
        """What later decisions depend on."""
        return {"lowest": self._lowest, "since": self._since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._lowest, self._since = float(state["lowest"]), int(state["since"])


def sentence(ended: str, steps: int, accuracy: float, target: float) -> str:
    """How a run with a target ended, in words."""
    reached = f"train accuracy {accuracy:.3f} after {steps} updates"
    if ended == FITTED:
        return f"fitted: {reached}"
    why = "its loss stopped falling" if ended == STALLED else "its budget is spent"
    return f"not fitted: {why}, {reached} (target {target:g})"
