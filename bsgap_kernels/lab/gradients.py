"""Loss and gradient of a batch: in one pass or several, in full or mixed precision, over all ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from bsgap_kernels.lab.distributed import Ranks
from bsgap_kernels.lab.methods.base import Values


def passes(rows: int, ranks: Ranks, micro_batch: int | None) -> int:
    """Forward passes that a batch takes on every rank (batch norm over ranks needs their numbers equal)."""
    largest_share = -(-rows // ranks.world)
    return 1 if micro_batch is None else max(1, -(-largest_share // micro_batch))


class Gradients:
    """Sets every parameter's gradient to that of the mean cross entropy over a batch.

    With `micro_batch` a batch is split into passes of at most so many rows whose gradients add up, so that
    the memory of activations does not depend on the batch; the sum is the batch's gradient up to rounding,
    except where batch norm takes the statistics of one pass.

    Args:
        model: the network as it is called, wrapped by data parallelism where there are several ranks.
        ranks: the processes that share a batch.
        precision: float32, or bfloat16 for autocast (the loss is taken in float32).
        micro_batch: most rows of a pass; None for no limit.
    """

    def __init__(
        self, model: nn.Module, ranks: Ranks, *, precision: str = "float32", micro_batch: int | None = None
    ) -> None:
        self._model = model
        self._parameters = list(model.parameters())
        self._ranks = ranks
        self._mixed = precision != "float32"
        self._micro_batch = micro_batch

    def compute(self, read: Callable[[slice], tuple[Tensor, Tensor]], share: int, rows: int) -> Values:
        """Gradients of a batch of `rows` rows, of which this rank has `share`.

        `read` gives images and labels of a slice of the share; it is asked once a pass, so that no more
        images than those of a pass are there at a time. Returns the share's part of the batch's mean loss and
        its right answers: over the ranks they sum up to the batch's.
        """
        for parameter in self._parameters:
            parameter.grad = None
        count = passes(rows, self._ranks, self._micro_batch)
        if count == 1:
            return self._add_pass(*read(slice(0, share)), rows)
        parts = []
        for index in range(count):
            images, labels = read(slice(index * share // count, (index + 1) * share // count))
            # Gradients are averaged over the ranks once, in the last pass.
            last = index == count - 1 or self._ranks.world == 1
            with nullcontext() if last else self._model.no_sync():  # type: ignore[operator]
                parts.append(self._add_pass(images, labels, rows))
        loss, right = zip(*parts, strict=True)
        return torch.stack(loss).sum(dtype=torch.float64), torch.stack(right).sum()

    def _add_pass(self, images: Tensor, labels: Tensor, rows: int) -> Values:
        logits = self._logits(images)
        if self._ranks.world == 1 and len(images) == rows:
            loss = nn.functional.cross_entropy(logits, labels)
            torch.autograd.backward(loss)
        else:
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum") / rows
            # What is averaged over the ranks has to be a sum.
            torch.autograd.backward(loss * self._ranks.world)
        return loss.detach(), (logits.argmax(1) == labels).sum()

    def _logits(self, images: Tensor) -> Tensor:
        if not self._mixed:
            return self._model(images)
        with torch.autocast(images.device.type, torch.bfloat16):
            return self._model(images).float()
