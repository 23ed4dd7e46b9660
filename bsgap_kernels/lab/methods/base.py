"""What a method of training is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

Values = tuple[Tensor, ...]
"""Of a batch before its update, 0-dimensional: mean loss, right answers, and what the loop adds to them."""


@dataclass
class Hyper:
    """Hyper-parameters of a method; a method's own are a dataclass derived from this one."""

    def asdict(self) -> dict[str, Any]:
        """The fields by name."""
        return dataclasses.asdict(self)


class Method:
    """One way to train a model: holds the optimizer and makes updates.

    Args:
        model: the network, whose parameters are updated in place.
        lr: learning rate at the run's batch size.
        hyper: the method's hyper-parameters, an instance of its `hyper_type`.
    """

    name: ClassVar[str]
    default_lr: ClassVar[float]
    """Used where no learning rate is given."""
    hyper_type: ClassVar[type[Hyper]]
    optimizer: torch.optim.Optimizer

    def __init__(self, model: nn.Module, lr: float, hyper: Any) -> None:
        raise NotImplementedError

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        return float(self.optimizer.param_groups[0]["lr"])

    def update(self, gradient: Callable[[], Values]) -> Values:
        """Make one update and return what `gradient` gave.

        `gradient` sets every parameter's `.grad` to the gradient of the mean loss over the batch at the
        present parameters and returns the batch's values before the update.
        """
        values = gradient()
        self.optimizer.step()
        return values

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next updates depend on beside the model: tensors and plain values."""
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict` of the same method on the same model."""
        self.optimizer.load_state_dict(state["optimizer"])
