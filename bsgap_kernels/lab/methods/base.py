"""What a method of training is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from bsgap_kernels.lab.batch import Batch, Values, passes
from bsgap_kernels.lab.data.images import ImageData
from bsgap_kernels.lab.distributed import ALONE, Ranks


@dataclass
class Hyper:
    """Hyper-parameters of a method; a method's own are a dataclass derived from this one."""

    def asdict(self) -> dict[str, Any]:
        """The fields by name."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Course:
    """What a method may know of its run before the first update."""

    batch_size: int
    steps: int
    """Updates of the whole run; the most of them where it ends once it is fitted."""
    steps_per_epoch: int
    seed: int
    data: ImageData
    ranks: Ranks = ALONE
    base_batch_size: int = 128
    """The batch size at which the run's learning rate is the one that was given."""
    precision: str = "float32"
    """Of forward and backward passes: float32, or bfloat16 for autocast."""


class Method:
    """One way to train a model: holds the optimizer and makes updates.

    Args:
        model: the network, whose parameters are updated in place.
        lr: learning rate at the run's batch size.
        hyper: the method's hyper-parameters, an instance of its `hyper_type`.
        course: the run ahead.

    Raises:
        UserError: hyper-parameters do not fit the run.
    """

    name: ClassVar[str]
    default_lr: ClassVar[float]
    """Used where no learning rate is given."""
    hyper_type: ClassVar[type[Hyper]]
    lr_rule: ClassVar[str | None] = None
    """How the learning rate follows the batch size, where the method says so itself; None: the run does."""
    ordered: bool = False
    """Whether the rows of a batch come in the order of the data, so that a full batch is always the same."""
    divides: ClassVar[str | None] = None
    """The hyper-parameter by which a batch is divided, to be named where the parts are too small."""
    apart: ClassVar[bool] = False
    """Whether each of several ranks trains parameters of its own: `Batch.gradient` is then that of the rank's
    share, averaged with none, and batch norm is each rank's own."""
    gathered: ClassVar[bool] = False
    """Whether `state_dict` is put together from several ranks, which then all ask for it together."""
    optimizer: torch.optim.Optimizer

    def __init__(self, model: nn.Module, lr: float, hyper: Any, course: Course) -> None:
        raise NotImplementedError

    @classmethod
    def adapt(cls, model: nn.Module, hyper: Any) -> nn.Module:
        """The network that is trained in place of the one that was asked for; by default that one itself."""
        return model

    @classmethod
    def finished(cls, model: nn.Module) -> nn.Module:
        """The network that a finished run leaves of the adapted one; by default that one itself."""
        return model

    @classmethod
    def parts(cls, hyper: Any, batch_size: int, micro_batch: int | None, ranks: Ranks) -> int:
        """Passes of an update that the tracker reads, which together see every row of the batch once."""
        return passes(batch_size, ranks, micro_batch)

    @property
    def lr(self) -> float:
        """Learning rate of the last update, or of the first before there was one."""
        return float(self.optimizer.param_groups[0]["lr"])

    @lr.setter
    def lr(self, value: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = value

    def update(self, batch: Batch) -> Values:
        """Make one update and return the batch's values before it."""
        values = batch.gradient()
        self.optimizer.step()
        return values

    def log(self) -> dict[str, float]:
        """Numbers of the last update for the metric rows, which call them `method.NAME`."""
        return {}

    def summary(self) -> dict[str, Any]:
        """What the run's summary says of the method beside its hyper-parameters."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next updates depend on beside the model: tensors and plain values."""
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict` of the same method on the same model."""
        self.optimizer.load_state_dict(state["optimizer"])
