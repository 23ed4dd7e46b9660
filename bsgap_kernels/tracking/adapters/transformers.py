"""RankCallback: near-rank of every layer at every optimizer step of a Hugging Face Trainer run.

>>> from bsgap_kernels.tracking.adapters.transformers import RankCallback
>>> with RankCallback(rtol=1e-2, mask="attention_mask") as ranks:
...     trainer = Trainer(model, arguments, train_dataset=data, callbacks=[ranks])
...     result = trainer.train()
>>> ranks.tracker.sites()
['transformer.h.0.mlp.act#0', 'transformer.h.1.mlp.act#0']

Needs `transformers`: `pip install 'bsgap_kernels[transformers]'`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ._holder import NewestRatios, Part, TrackerHolder
from ._optional import need

if TYPE_CHECKING:
    TrainerCallback = object
else:
    TrainerCallback = need("transformers", "transformers").TrainerCallback


# Not the class's name: the Trainer would replace a callback of that name by one made without its options.
_KEY = "bsgap_kernels.RankCallback"


class RankCallback(TrackerHolder, TrainerCallback):
    """Attach a `RankTracker` when training begins, end its step with the Trainer's, close it at the end.

    The tracker is attached to the model inside DDP and `torch.compile`. Its step ends in `on_step_end`, once
    per optimizer step and before evaluation, so the batches of `gradient_accumulation_steps` add up. The
    Trainer evaluates in eval mode, which is not recorded.

    The Trainer tells its callbacks of no exception: used as a context manager around `train()`, the callback
    closes the tracker then too.

    Args:
        part: the part of the model to track, as a submodule's name or a function of the model; None tracks
            all of it.
        unfold: `token` reads (batch, tokens, features) as one observation per token.
        mask: the model's argument that marks padding with 0, such as `attention_mask`.
        log: add `near_rank_ratio/<site>` of the newest counted step to what the Trainer logs: its
            `state.log_history` and what it prints. Reporters that it was given (`report_to`) have their copy
            by then; `sinks=` reaches TensorBoard, W&B and MLflow.
        options: others of `RankTracker`; `micro_batches`, and of a resumed run `attempt` and `first_step`,
            are known from the Trainer.

    Raises:
        TypeError: an option that `RankTracker` does not have.

    Adds no synchronisation to the step.
    """

    def __init__(
        self,
        *,
        part: Part = None,
        log: bool = False,
        unfold: Any = "token",
        mask: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(part, {"unfold": unfold, "mask": mask, **options})
        self._newest = NewestRatios() if log else None

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **more: Any) -> None:
        """Attach the tracker; one of an earlier run that failed is closed first."""
        self.close()
        self._state = state.stateful_callbacks.get(_KEY, {})  # of a checkpoint
        self._attach(
            model,
            more_sinks=[] if self._newest is None else [self._newest],
            first_step=state.global_step,
            micro_batches=args.gradient_accumulation_steps,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """End the tracker's step."""
        if self.tracker is not None and self._open:
            self.tracker.step()
            # What the Trainer's state holds it saves and loads with its checkpoints.
            state.stateful_callbacks[_KEY] = self._saved()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        """Add the newest ratios; the Trainer logs in step with the sinks, which are some steps behind."""
        newest = None if self._newest is None else self._newest.take()
        if newest is not None:
            for entry in (logs, state.log_history[-1] if state.log_history else None):
                if entry is not None:
                    entry.update(newest[1])

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Write the rows of the steps before the checkpoint."""
        self._flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Close the tracker."""
        self.close()
