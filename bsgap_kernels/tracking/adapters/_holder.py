"""What the callbacks share: one RankTracker, attached when training begins and closed however it ends."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..tracker import RankTracker

if TYPE_CHECKING:
    from typing_extensions import Self

Part = str | Callable[[nn.Module], nn.Module] | None


class TrackerHolder:
    """A RankTracker that lives as long as one training run.

    `tracker` is None before the first run, and after a run the closed tracker of it.
    """

    def __init__(self, part: Part, options: dict[str, Any]) -> None:
        # A misspelt option fails here, and not when training begins.
        inspect.signature(RankTracker).bind(None, **options)
        if not (part is None or isinstance(part, str) or callable(part)):
            raise TypeError(
                f"part: got {type(part).__name__}, expected a submodule's name or a function of the model"
            )
        self.part = part
        self.options = options
        self.tracker: RankTracker | None = None
        self._open = False
        self._attempt = 0
        self._state: dict[str, Any] = {}  # of the tracker before this one, or of a checkpoint

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the tracker off the model and write its last rows; does nothing if there is none."""
        if self.tracker is not None and self._open:
            self._state = self._saved()
            self._open = False
            self.tracker.close()

    def _saved(self) -> dict[str, Any]:
        """What a resumed run needs, in plain numbers; empty before the first run."""
        if self.tracker is None or not self._open:
            return self._state
        return {"tracker": self.tracker.state_dict(), "attempt": self._attempt}

    def _flush(self) -> None:
        """Let the rows before a checkpoint outlive it, as far as sinks do not hang."""
        if self.tracker is not None and self._open:
            self.tracker.flush(timeout=60.0)

    def _attach(self, model: nn.Module, *, more_sinks: Sequence[Any] = (), **defaults: Any) -> None:
        """Track `model`, going on from the state if there is one; `defaults` are options below the user's."""
        if self._state:
            defaults["first_step"] = self._state["tracker"]["step"]
            defaults["attempt"] = self._state["attempt"] + 1
        options = {"attempt": 0, **defaults, **self.options}
        if more_sinks:
            sinks = options.get("sinks", ())
            options["sinks"] = [*(sinks if isinstance(sinks, (list, tuple)) else [sinks]), *more_sinks]
        self.tracker = RankTracker(self._part_of(unwrapped(model)), **options)
        self._open = True
        self._attempt = options["attempt"]
        if self._state:
            self.tracker.load_state_dict(self._state["tracker"])

    def _part_of(self, model: nn.Module) -> nn.Module:
        if self.part is None:
            return model
        if not isinstance(self.part, str):
            return self.part(model)
        try:
            return model.get_submodule(self.part)
        except AttributeError:
            names = [name for name, _ in model.named_children()]
            raise ValueError(
                f"part: {type(model).__name__} has no submodule {self.part!r}; it has {', '.join(names)}"
            ) from None


class NewestRatios:
    """A sink that keeps the ratios of the newest step, for a trainer's loggers to take on its own thread."""

    def __init__(self) -> None:
        self._rows: tuple[int, dict[str, float]] | None = None

    def write(self, rows: Sequence[Any]) -> None:
        """Keep the ratios, named `near_rank_ratio/<site>`."""
        ratios = [row for row in rows if row.metric == "batch.ratio"]
        if ratios:
            step = max(row.step for row in ratios)
            # One assignment, so that the other thread sees a whole step.
            self._rows = (
                step,
                {f"near_rank_ratio/{row.site}": row.value for row in ratios if row.step == step},
            )

    def take(self) -> tuple[int, dict[str, float]] | None:
        """Return step and ratios, once for each step."""
        rows, self._rows = self._rows, None
        return rows

    def flush(self) -> None:
        """Rows are kept, not written."""

    def close(self) -> None:
        """The last rows are still to be taken."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside what data parallelism and `torch.compile` wrapped around it."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model
