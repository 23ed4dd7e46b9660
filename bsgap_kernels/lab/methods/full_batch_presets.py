"""The source's other variants of full-batch gradient descent: `fb-long`, `fb-clip`, `fb-reg`, `fb-strong`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bsgap_kernels.lab.methods.full_batch import FullBatch, FullBatchHyper


@dataclass
class FullBatchLongHyper(FullBatchHyper):
    """As `fb`, in ten times as many updates."""

    preset: ClassVar[str] = "fb-long"

    warmup: int = 400
    horizon: int = 4000
    length: int | None = 3000


class FullBatchLong(FullBatch):
    """Full-batch gradient descent with the long schedule, meant for 3000 updates."""

    name = "fb-long"
    default_lr = 0.4
    hyper_type = FullBatchLongHyper


@dataclass
class FullBatchClipHyper(FullBatchLongHyper):
    """As `fb-long`, with clipping."""

    preset: ClassVar[str] = "fb-clip"

    clip: float | None = 0.25


class FullBatchClip(FullBatch):
    """The long schedule with clipping."""

    name = "fb-clip"
    default_lr = 0.4
    hyper_type = FullBatchClipHyper


@dataclass
class FullBatchRegHyper(FullBatchClipHyper):
    """As `fb-clip`, with the penalty on the gradient's norm."""

    preset: ClassVar[str] = "fb-reg"

    strength: float = 0.5


class FullBatchReg(FullBatch):
    """Clipping and the gradient-norm penalty."""

    name = "fb-reg"
    default_lr = 0.8
    hyper_type = FullBatchRegHyper


@dataclass
class FullBatchStrongHyper(FullBatchRegHyper):
    """As `fb-reg`, on smaller blocks, whose gradients are longer."""

    preset: ClassVar[str] = "fb-strong"

    block: int = 32


class FullBatchStrong(FullBatch):
    """The penalty on blocks of 32 rows."""

    name = "fb-strong"
    default_lr = 0.8
    hyper_type = FullBatchStrongHyper


PRESETS: tuple[type[FullBatch], ...] = (
    FullBatch,
    FullBatchLong,
    FullBatchClip,
    FullBatchReg,
    FullBatchStrong,
)
