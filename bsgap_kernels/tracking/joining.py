"""Steps without the ranks that have run out of input, under `torch.distributed.algorithms.join`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

FIRST = (
    "RankTracker: it is the first of Join([...]), whose first member tells of each forward pass; give the "
    "DistributedDataParallel model before it: Join([model, tracker])"
)
UNAWARE = (
    "RankTracker: the model runs in join(), where ranks without input no longer call step(), so that the "
    "tracker would wait for them; use `with Join([model, tracker]):` of torch.distributed.algorithms.join"
)


@dataclass
class JoinedSteps:
    """The hook that `Join` calls on a rank that has run out of input, once for each pass of the others.

    It ends a step, of no rows, wherever the others do. passes: forward passes in a step.
    """

    end_step: Callable[[], Any]
    passes: Callable[[], int]
    _seen: int = 0

    def main_hook(self) -> None:
        """Called at each forward pass of the ranks that go on."""
        self._seen += 1
        if self._seen >= self.passes():
            self._seen = 0
            self.end_step()

    def post_hook(self, is_last_joiner: bool) -> None:
        """Called once all ranks have run out; their last step is read as any other."""


def in_join() -> bool:
    """Whether this runs in the forward of a DistributedDataParallel whose ranks may stop one by one."""
    ddp: Any = nn.parallel.DistributedDataParallel._active_ddp_module
    config = None if ddp is None else ddp._join_config
    return config is not None and config.enable and not config.throw_on_early_termination
