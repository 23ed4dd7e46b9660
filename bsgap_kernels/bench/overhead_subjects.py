"""The lab's models with a training step each, for measuring what tracking costs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..lab.data import load_data
from ..lab.models import build_model

DIGITS, RANDOM = "digits", "random"
DATA = {"lenet5": DIGITS}
"""What a model is fed unless told: digits (28×28) or, those not named here, random images."""
SHAPES = {"lenet5": (1, 28, 28)}
RANDOM_SHAPE = (3, 32, 32)
"""Of random images for models without one of their own in `SHAPES`."""
RANDOM_BATCHES = 4
LEARNING_RATE, MOMENTUM = 0.02, 0.9


@dataclass(frozen=True)
class Subject:
    """A model of the lab, the rows of its batches and where it runs."""

    model: str
    batch: int
    data: str | None = None
    device: str = "cpu"
    compile: bool = False
    seed: int = 0

    @property
    def feed(self) -> str:
        """The data: as asked for, or the model's own."""
        return self.data or DATA.get(self.model, RANDOM)

    @property
    def title(self) -> str:
        """A line that says what is measured."""
        words = [self.model, f"batch {self.batch}", self.feed, self.device]
        return ", ".join([*words, "compiled"] if self.compile else words)

    def images(self) -> tuple[Tensor, Tensor, int]:
        """Images, labels and number of classes; UserError if there are fewer images than a batch has rows."""
        if self.feed == DIGITS:
            data = load_data(DIGITS, None)
            images, labels, classes = data.train_images, data.train_labels, data.classes
        else:
            generator = torch.Generator().manual_seed(self.seed)
            rows = RANDOM_BATCHES * self.batch
            images = torch.randn(rows, *SHAPES.get(self.model, RANDOM_SHAPE), generator=generator)
            labels, classes = torch.randint(10, (rows,), generator=generator), 10
        if len(images) < self.batch:
            raise ValueError(
                f"batch: got {self.batch}, expected at most the {len(images)} images of {self.feed}"
            )
        return images.to(self.device), labels.to(self.device), classes

    def build(self) -> tuple[nn.Module, Callable[[], object]]:
        """The model, and its training step: a batch, forward, backward, SGD."""
        images, labels, classes = self.images()
        torch.manual_seed(self.seed)
        model = build_model(self.model, images.shape[1:], classes).to(self.device)
        forward = torch.compile(model) if self.compile else model
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
        shuffle = torch.Generator().manual_seed(self.seed)
        total, at = len(images), 0
        order = torch.empty(0, dtype=torch.int64)

        def step() -> None:
            nonlocal at, order
            if at + self.batch > len(order):
                order, at = torch.randperm(total, generator=shuffle).to(images.device), 0
            rows = order[at : at + self.batch]
            at += self.batch
            loss = nn.functional.cross_entropy(forward(images[rows]), labels[rows])
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()

        return model, step
