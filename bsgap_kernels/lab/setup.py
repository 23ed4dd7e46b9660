"""What a run needs, built from its options and checked before a file is written."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bsgap_kernels.lab.config import TrainConfig, UserError
from bsgap_kernels.lab.data import ImageData, load_data
from bsgap_kernels.lab.models import build_model
from bsgap_kernels.tracking import RankTracker


@dataclass
class Setup:
    """Everything a run needs, built and checked before a file is written."""

    config: TrainConfig
    data: ImageData
    model: nn.Module
    tracker: RankTracker
    optimizer: torch.optim.Optimizer
    probe: Tensor
    batch_size: int
    lr: float
    steps_per_epoch: int
    steps: int
    probe_every: int


def learning_rate(lr: float, rule: str, batch_size: int, base_batch_size: int) -> float:
    """Learning rate at `batch_size`: lr times 1 (fixed), batch / base (linear) or √(batch / base) (sqrt)."""
    factor = batch_size / base_batch_size
    return lr * {"fixed": 1.0, "linear": factor, "sqrt": math.sqrt(factor)}[rule]


def resolve_device(name: str) -> torch.device:
    """The torch device `name`, tried out."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: got {name!r}, expected one that torch can use here, such as cpu") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device: got {name!r}, expected cpu or cuda: the ops have no {device.type} kernels")
    return device


def set_up(config: TrainConfig, data: ImageData | None = None) -> Setup:
    """Build data, model, tracker and optimizer; initial weights depend on `config.seed` alone.

    Raises:
        UserError: an option does not fit the data, the model or this machine.
    """
    device = resolve_device(config.device)
    data = (load_data(config.data, config.data_root) if data is None else data).to(device)
    total = len(data.train_images)
    batch_size = total if config.batch_size == "full" else int(config.batch_size)
    if batch_size > total:
        raise UserError(
            f"batch_size: got {batch_size}, expected at most the {total} images of {data.name}, or full"
        )
    probe = data.probe(config.probe_size)
    torch.manual_seed(config.seed)
    model = build_model(config.model, data.train_images.shape[1:], data.classes).to(device)
    try:
        tracker = RankTracker(
            model,
            layers=[config.layers] if isinstance(config.layers, str) else config.layers,
            unfold=config.unfold,
            rtol=config.rtol,
            atol=config.atol,
            center=config.center,
            certify=True,
            metrics="all",
            verbose=False,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    lr = learning_rate(config.lr, config.lr_rule, batch_size, config.base_batch_size)
    steps_per_epoch = total // batch_size
    steps = config.steps if config.steps is not None else (config.epochs or 0) * steps_per_epoch
    probe_every = config.probe_every
    if config.max_probes is not None:
        probe_every = max(probe_every, math.ceil(steps / config.max_probes))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=config.momentum)
    return Setup(
        config, data, model, tracker, optimizer, probe, batch_size, lr, steps_per_epoch, steps, probe_every
    )
