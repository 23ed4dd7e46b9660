"""RankCallback: near-rank of every layer at every optimizer step of a Lightning run.

>>> from bsgap_kernels.tracking.adapters.lightning import RankCallback
>>> ranks = RankCallback(rtol=1e-2, log=True)
>>> trainer = Trainer(max_steps=3, callbacks=[ranks], **quiet)
>>> trainer.fit(module, loader)
>>> ranks.tracker.sites()
['net.act#0', 'net.act#1']

Needs `lightning` or `pytorch_lightning`: `pip install 'bsgap_kernels[lightning]'`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch import nn

from ._holder import NewestRatios, Part, TrackerHolder
from ._optional import need

if TYPE_CHECKING:
    Callback = object
else:
    # One imported already is the one whose Trainer is used. With both, either's base class will do: a
    # Trainer calls hooks by name.
    Callback = need("lightning", "lightning.pytorch", "pytorch_lightning").Callback


class RankCallback(TrackerHolder, Callback):
    """Attach a `RankTracker` to the module, end its step after each optimizer step, close it with the fit.

    The tracker is attached in `on_fit_start`: after `configure_model`, before the first forward pass and
    so before a compiled module is traced. Its step ends with the last batch of an optimizer step, so the
    batches of `accumulate_grad_batches` add up; several optimizers stepped in one batch are one step.
    Validation and the sanity check are not recorded. Its state is saved and loaded with checkpoints.

    Args:
        part: the part of the LightningModule to track, as a submodule's name or a function of the module;
            None tracks all of it. A `mask` is looked for among the arguments of its forward, so of a module
            whose training_step calls `self.net(**batch)` track part="net".
        log: send `near_rank_ratio/<site>` of the newest counted step to the Trainer's loggers, every
            `log_every_n_steps` steps and at the end. It is sent under the step it was counted at: no step
            waits for its numbers.
        options: of `RankTracker`. `micro_batches`, and of a resumed run `attempt` and `first_step`, are
            known from the Trainer, except that strategies which load checkpoints late (FSDP) need the last
            two where a sink is a file.

    Raises:
        TypeError: an option that `RankTracker` does not have.

    Adds no synchronisation to the step.
    """

    def __init__(self, *, part: Part = None, log: bool = False, **options: Any) -> None:
        super().__init__(part, options)
        self._logs = log  # Lightning puts the module's log() at the name `log`
        self._newest = NewestRatios()
        self._paused = ExitStack()
        self._optimizer_steps = 0

    @property
    def state_key(self) -> str:
        """Tells the states of several RankCallbacks in one checkpoint apart."""
        kept = {"part": self.part, "layers": self.options.get("layers"), "unfold": self.options.get("unfold")}
        return f"{type(self).__qualname__}{kept}"

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """A fit from the start goes on from nothing; a checkpoint is loaded after this."""
        if stage == "fit" and trainer.global_step == 0:
            self._state = {}

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Attach the tracker."""
        self._newest = NewestRatios()
        self._attach(
            pl_module,
            more_sinks=[self._newest] if self._logs else [],
            micro_batches=trainer.accumulate_grad_batches,
        )

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Learn how many steps a resumed run has done; it is known from here on."""
        self._optimizer_steps = trainer.global_step
        if self.tracker is not None and not self._state:
            self.tracker.load_state_dict({**self.tracker.state_dict(), "step": trainer.global_step})

    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:
        """A forward pass begins: training_step may call parts of the module, and never the whole."""
        if self.tracker is not None:
            self.tracker.begin_pass()

    def on_train_batch_end(
        self, trainer: Any, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the tracker's step if an optimizer has stepped."""
        # Not on_before_optimizer_step: an optimizer may call its closure, and with it that hook, several
        # times a step, and manual optimization calls it once for each optimizer.
        if self.tracker is None or trainer.global_step == self._optimizer_steps:
            return
        self._optimizer_steps = trainer.global_step
        self.tracker.step()
        every = trainer.log_every_n_steps
        if self._logs and every > 0 and trainer.global_step % every == 0:
            self._send(trainer.loggers)

    def on_validation_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Record nothing, even of a module that validates in training mode (the sanity check too)."""
        if self.tracker is not None and self._open:
            self._paused.enter_context(self.tracker.paused())

    def on_validation_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Record again."""
        self._paused.close()

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Close the tracker while process groups and loggers are still there."""
        self.close()
        if self._logs:
            self._send(trainer.loggers)

    def _send(self, loggers: Sequence[Any]) -> None:
        newest = self._newest.take()
        if newest is not None:
            step, values = newest
            for logger in loggers:
                logger.log_metrics(values, step=step)

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        """Close the tracker."""
        self.close()

    def teardown(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Close the tracker of a fit that ended before it trained."""
        self.close()

    def close(self) -> None:
        """Take the tracker off the module and flush its sinks; does nothing if there is none."""
        self._paused.close()
        super().close()

    def state_dict(self) -> dict[str, Any]:
        """The tracker's state; Lightning saves it with the checkpoint."""
        self._flush()
        return self._saved()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint, at once or, before the fit starts, when the tracker is attached."""
        self._state = state_dict
        if self.tracker is not None and self._open:
            self.tracker.load_state_dict(state_dict["tracker"])
