"""A finished run, read back from its directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bsgap_kernels.lab import methods
from bsgap_kernels.lab.checkpoint import UNREADABLE
from bsgap_kernels.lab.config import TrainConfig, UserError
from bsgap_kernels.lab.data import ImageData
from bsgap_kernels.lab.directories import CONFIG_FILE, read_config
from bsgap_kernels.lab.models import build_model
from bsgap_kernels.lab.results import SUMMARY_FILE, WEIGHTS_FILE, read_summary
from bsgap_kernels.lab.setup import data_of


@dataclass
class SavedRun:
    """A run as it ended: its options, its data, and its network in eval mode."""

    directory: Path
    config: TrainConfig
    data: ImageData
    model: nn.Module
    summary: dict[str, Any]


def load_run(directory: Path, data: ImageData | None = None) -> SavedRun:
    """Read a finished run's options, data and network (on the CPU); the weights file executes nothing.

    `data` saves loading the run's data where it is at hand.

    Raises:
        UserError: a file is missing or damaged; the message names it.
    """
    if not directory.is_dir():
        raise UserError(f"run: looked at {directory} and found no such directory, expected one of a run")
    config = read_config(directory / CONFIG_FILE)
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        raise UserError(f"{path}: there are no weights; run the command of this run again to its end")
    data = data_of(config) if data is None else data
    kind = methods.REGISTRY[config.method]
    model = kind.adapt(build_model(config.model, data.image_shape, data.classes), config.hyper_parameters)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(_of_kind(content, model.state_dict()))
    except (OSError, *UNREADABLE) as error:
        if isinstance(error, OSError) and error.filename:  # torch's own, of an archive cut short, names none
            raise
        raise UserError(
            f"{path}: the file is damaged or of another network; remove it and run the command of this run "
            "again"
        ) from error
    return SavedRun(
        directory, config, data, kind.finished(model).eval(), read_summary(directory / SUMMARY_FILE)
    )


def _of_kind(content: Any, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights in a file's content; load_state_dict would cast other types without a word."""
    weights = content["model"] if isinstance(content, dict) else None
    if not isinstance(weights, dict) or weights.keys() != expected.keys():
        raise ValueError("expected the weights of the network by their names")
    for name, tensor in expected.items():
        found = weights[name]
        if not isinstance(found, Tensor) or (found.dtype, found.layout) != (tensor.dtype, tensor.layout):
            raise ValueError(f"{name}: expected a tensor of {tensor.dtype}")
    return weights
