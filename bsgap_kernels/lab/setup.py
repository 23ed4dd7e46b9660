"""What a run needs, built from its options and checked before a file is written."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bsgap_kernels.lab import methods
from bsgap_kernels.lab.augment import Augmentation, draw
from bsgap_kernels.lab.batch import passes
from bsgap_kernels.lab.batch_norm import use_global_batch_norm
from bsgap_kernels.lab.config import RunOptions, TrainConfig, UserError
from bsgap_kernels.lab.data import ImageData, load_data
from bsgap_kernels.lab.distributed import ALONE, Ranks
from bsgap_kernels.lab.methods import Course, Method
from bsgap_kernels.lab.models import build_model
from bsgap_kernels.tracking import RankTracker

MOST_FEATURES = 4096
"""Of a site under several processes or with micro-batches; the tracker's `max_features`."""


@dataclass
class Setup:
    """Everything a run needs, built and checked before a file is written."""

    config: TrainConfig
    data: ImageData
    model: nn.Module
    tracker: RankTracker
    """Reads the training batches, what `config` asks of them."""
    probe_tracker: RankTracker
    """Reads the probe batch: all metrics and certified intervals."""
    method: Method
    probe: Tensor
    """This rank's share of the probe batch."""
    batch_size: int
    lr: float
    steps_per_epoch: int
    steps: int
    parts: int
    """Passes of an update."""
    probe_every: int | None
    evaluate_every: int
    """Steps between evaluations."""
    device: torch.device
    ranks: Ranks = ALONE

    def close(self) -> None:
        """Take the trackers' hooks off the model."""
        self.tracker.close()
        self.probe_tracker.close()

    def augmentation(self, step: int) -> Augmentation | None:
        """What is done to the batch of this step, of all ranks: drawn from seed and step, nothing to save."""
        if self.config.augment == "none":
            return None
        # torch takes 32 bits of a seed: the two are mixed, not put beside each other.
        mixed = np.random.SeedSequence((self.config.seed, step)).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(mixed))
        shape, flip = self.data.image_shape, self.data.mirrored
        return draw(self.config.augment, self.batch_size, shape, generator, flip=flip)

    def batch_due(self, step: int) -> bool:
        """Whether the layers are read on the training batch of this step."""
        return self.config.every is not None and step % self.config.every == 0

    def probe_due(self, step: int) -> bool:
        """Whether the layers are read on the probe batch before this step."""
        return self.probe_every is not None and step % self.probe_every == 0


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


def data_of(config: RunOptions) -> ImageData:
    """The data set that the options name, on the CPU."""
    return load_data(config.data, config.data_root, download=config.download, options=config.procedural)


def set_up(config: TrainConfig, data: ImageData | None = None, ranks: Ranks = ALONE) -> Setup:
    """Build data, model, tracker and optimizer; initial weights depend on `config.seed` alone.

    Every rank holds all the data. Nothing waits for another rank.

    Raises:
        UserError: an option does not fit the data, the model or this machine.
    """
    device = resolve_device(config.device)
    data = (data_of(config) if data is None else data).to(device)
    total = len(data.train_labels)
    batch_size = total if config.batch_size == "full" else int(config.batch_size)
    if batch_size > total:
        raise UserError(
            f"batch_size: got {batch_size}, expected at most the {total} images of {data.name}, or full"
        )
    draw(config.augment, 1, data.image_shape, torch.Generator())  # images too small for it are refused here
    probe = data.probe(config.probe_size)
    probe = probe[ranks.share(len(probe))]
    torch.manual_seed(config.seed)
    kind, hyper = methods.REGISTRY[config.method], config.hyper_parameters
    model = kind.adapt(build_model(config.model, data.image_shape, data.classes), hyper).to(device)
    parts = kind.parts(hyper, batch_size, config.micro_batch, ranks)
    in_parts = parts * (ranks.world if kind.apart else 1)
    option = "batch_size" if batch_size < 2 or config.micro_batch is None else "micro_batch"
    if kind.divides and in_parts > passes(batch_size, ranks, config.micro_batch):
        option = f"{config.method}.{kind.divides}"
    _check_rows(model, data.train(slice(0, 1))[0], batch_size // in_parts, option)
    if ranks.world > 1 and not kind.apart:
        use_global_batch_norm(model)
    tracker, probe_tracker = _trackers(model, config, data.train(slice(0, 1))[0], parts, ranks)
    rule = kind.lr_rule or config.lr_rule
    lr = learning_rate(config.lr or 0.0, rule, batch_size, config.base_batch_size)
    steps_per_epoch = total // batch_size
    steps = config.steps if config.steps is not None else (config.epochs or 0) * steps_per_epoch
    probe_every = config.probe_every
    if probe_every is not None and config.max_probes is not None:
        probe_every = max(probe_every, math.ceil(steps / config.max_probes))
    evaluate_every = config.eval_every * steps_per_epoch
    if config.max_evaluations is not None:
        evaluate_every *= math.ceil(steps / (evaluate_every * config.max_evaluations))
    course = Course(
        batch_size,
        steps,
        steps_per_epoch,
        config.seed,
        data,
        ranks,
        base_batch_size=config.base_batch_size,
        precision=config.precision,
    )
    method = kind(model, lr, hyper, course)
    return Setup(
        config,
        data,
        model,
        tracker,
        probe_tracker,
        method,
        probe,
        batch_size,
        lr,
        steps_per_epoch,
        steps,
        parts,
        probe_every,
        max(1, evaluate_every),
        device,
        ranks,
    )


def _check_rows(model: nn.Module, image: Tensor, rows: int, option: str) -> None:
    """Batch norm has no variance of one value: one row of a dense layer, or of a map of one pixel."""
    norms = (nn.BatchNorm1d, nn.BatchNorm2d)
    if rows >= 2 or not any(isinstance(module, norms) for module in model.modules()):
        return
    try:
        with torch.random.fork_rng(), torch.no_grad():
            copy.deepcopy(model).train()(image)
    except ValueError as error:
        raise UserError(f"{option}: got passes of {rows} row, expected at least 2 for batch norm") from error


def _trackers(
    model: nn.Module, config: TrainConfig, image: Tensor, parts: int, ranks: Ranks
) -> tuple[RankTracker, RankTracker]:
    """Of the training batches and of the probe; numbers are of all ranks and of all passes of a step."""
    parts = 1 if config.every is None else parts
    options: dict[str, Any] = {
        "layers": [config.layers] if isinstance(config.layers, str) else config.layers,
        "unfold": config.unfold,
        "rtol": config.rtol,
        "atol": config.atol,
        "center": config.center,
        "verbose": False,
        "max_features": MOST_FEATURES,
        # Functional nonlinearities are found here: the first reading of the probe is before any update, and
        # its passes have no graph to find them in.
        "example": image,
    }
    try:
        if ranks.world > 1 or parts > 1:
            _check_features(model, image, options)
        options["process_group"] = ranks.group
        metrics = "all" if config.metrics == ["all"] else config.metrics
        return (
            RankTracker(model, certify=config.certify, metrics=metrics, micro_batches=parts, **options),
            RankTracker(model, certify=True, metrics="all", **options),
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def _check_features(model: nn.Module, image: Tensor, options: dict[str, Any]) -> None:
    """Ranks and passes add up n × n Gram matrices: too many features are refused before a file is written."""
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
                f"processes or passes add up at most {MOST_FEATURES}; give --unfold channel or pool, or "
                "leave it out by --layers"
            )
