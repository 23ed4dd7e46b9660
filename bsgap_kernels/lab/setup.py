"""What a run needs, built from its options and checked before a file is written."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bsgap_kernels.lab.batch_norm import use_global_batch_norm
from bsgap_kernels.lab.config import TrainConfig, UserError
from bsgap_kernels.lab.data import ImageData, load_data
from bsgap_kernels.lab.distributed import ALONE, Ranks
from bsgap_kernels.lab.models import build_model
from bsgap_kernels.tracking import RankTracker

MOST_FEATURES = 4096
"""Of a site under several processes; the tracker's `max_features`."""


@dataclass
class Setup:
    """Everything a run needs, built and checked before a file is written."""

    config: TrainConfig
    data: ImageData
    model: nn.Module
    tracker: RankTracker
    optimizer: torch.optim.Optimizer
    probe: Tensor
    """This rank's share of the probe batch."""
    batch_size: int
    lr: float
    steps_per_epoch: int
    steps: int
    probe_every: int
    ranks: Ranks = ALONE


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


def set_up(config: TrainConfig, data: ImageData | None = None, ranks: Ranks = ALONE) -> Setup:
    """Build data, model, tracker and optimizer; initial weights depend on `config.seed` alone.

    Every rank holds all the data. Nothing waits for another rank.

    Raises:
        UserError: an option does not fit the data, the model or this machine.
    """
    device = resolve_device(config.device)
    if data is None:
        data = load_data(config.data, config.data_root, download=config.download, options=config.procedural)
    data = data.to(device)
    total = len(data.train_images)
    batch_size = total if config.batch_size == "full" else int(config.batch_size)
    if batch_size > total:
        raise UserError(
            f"batch_size: got {batch_size}, expected at most the {total} images of {data.name}, or full"
        )
    probe = data.probe(config.probe_size)
    probe = probe[ranks.share(len(probe))]
    torch.manual_seed(config.seed)
    model = build_model(config.model, data.image_shape, data.classes).to(device)
    if ranks.world > 1:
        use_global_batch_norm(model)
    tracker = _track(model, config, data.train(slice(0, 1))[0], ranks)
    lr = learning_rate(config.lr, config.lr_rule, batch_size, config.base_batch_size)
    steps_per_epoch = total // batch_size
    steps = config.steps if config.steps is not None else (config.epochs or 0) * steps_per_epoch
    probe_every = config.probe_every
    if config.max_probes is not None:
        probe_every = max(probe_every, math.ceil(steps / config.max_probes))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=config.momentum)
    return Setup(
        config,
        data,
        model,
        tracker,
        optimizer,
        probe,
        batch_size,
        lr,
        steps_per_epoch,
        steps,
        probe_every,
        ranks,
    )


def _track(model: nn.Module, config: TrainConfig, image: Tensor, ranks: Ranks) -> RankTracker:
    """The run's tracker, whose numbers are those of the batch of all ranks."""
    options: dict[str, Any] = {
        "layers": [config.layers] if isinstance(config.layers, str) else config.layers,
        "unfold": config.unfold,
        "rtol": config.rtol,
        "atol": config.atol,
        "center": config.center,
        "verbose": False,
    }
    try:
        if ranks.world > 1:
            _check_features(model, image, options)
        return RankTracker(
            model,
            certify=True,
            metrics="all",
            process_group=ranks.group,
            max_features=MOST_FEATURES,
            **options,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def _check_features(model: nn.Module, image: Tensor, options: dict[str, Any]) -> None:
    """Ranks add up n × n Gram matrices: a site of too many features is refused before a file is written."""
    training = model.training
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # that the tracker of one process alone is of its share alone is meant
        tracker = RankTracker(model, **options)
    with tracker, tracker.view("check"), torch.no_grad():
        model.eval()(image)
        records = tracker.collect("check")
    model.train(training)
    for site, record in records.items():
        if record.shape[1] > MOST_FEATURES:
            raise UserError(
                f"unfold: {options['unfold']} makes {record.shape[1]} features of {site}, and several "
                f"processes add up at most {MOST_FEATURES}; give --unfold channel or pool, or leave it out "
                "by --layers"
            )
