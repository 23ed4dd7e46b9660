"""Batch norm over the rows of all ranks, so that several processes train the network that one would."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose statistics are those of the whole batch, on any device, empty shares included.

    torch's SyncBatchNorm does the same on GPUs alone. Mean and variance are taken one after the other, so
    that nothing cancels; each is one small all-reduce forward and one backward. Weights and buffers are those
    of BatchNorm2d, by the same names.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalised activations of (B, C, H, W)."""
        if not self.training:
            return super().forward(input)
        rows = torch.tensor([float(input.numel() // self.num_features)], device=input.device)
        dist.all_reduce(rows)
        mean = all_reduce(input.sum((0, 2, 3))) / rows
        centred = input - mean.view(-1, 1, 1)
        variance = all_reduce(centred.square().sum((0, 2, 3))) / rows
        self._track(mean.detach(), variance.detach() * rows / (rows - 1).clamp_min(1))
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return centred * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance, momentum)


def use_global_batch_norm(model: nn.Module) -> None:
    """Make every BatchNorm2d of a model, in place, one over all ranks; nothing else about it changes."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GlobalBatchNorm2d
