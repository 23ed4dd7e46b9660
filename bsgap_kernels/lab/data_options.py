"""Options of the procedural data set, and what data sets there are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bsgap_kernels.lab.checks import UserError, integer, number

FILE_DATASETS = ("mnist", "fashion-mnist", "cifar10", "cifar100")
DATASETS = ("digits", "procedural", *FILE_DATASETS)
MAX_PROCEDURAL_CLASSES = 64


@dataclass(frozen=True)
class ProceduralOptions:
    """Options of the procedural data set, which is drawn by a program (bsgap_kernels/lab/data/procedural.py).

    Args:
        train: training images; more of them leave the first ones as they are.
        test: test images, likewise.
        classes: number of classes, from 2 to 64.
        difficulty: from 0 to 2, how far everything goes that says nothing about the class; the default was
            set by benchmarks/procedural_pilot.py.
        label_noise: share of the training labels that are replaced by another class.
        seed: of images and labels.
    """

    train: int = 10_000
    test: int = 20_000
    classes: int = 10
    difficulty: float = 0.75
    label_noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for option in ("train", "test"):
            integer(f"procedural.{option}", getattr(self, option))
        integer("procedural.classes", self.classes, minimum=2, maximum=MAX_PROCEDURAL_CLASSES)
        integer("procedural.seed", self.seed, minimum=0, maximum=2**63 - 1)
        number("procedural.difficulty", self.difficulty, minimum=0.0, maximum=2.0)
        number("procedural.label_noise", self.label_noise, minimum=0.0, below=1.0)

    @classmethod
    def of(cls, values: ProceduralOptions | Mapping[str, Any] | None) -> ProceduralOptions:
        """The options from a mapping, as a YAML file or the command line gives them; None gives defaults.

        Raises:
            UserError: an option is unknown, or its value does not fit.
        """
        if isinstance(values, ProceduralOptions):
            return values
        if not isinstance(values, Mapping) and values is not None:
            raise UserError(f"procedural: got {values!r}, expected options such as classes: 10")
        given = dict(values or {})
        known = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                raise UserError(f"procedural.{name}: unknown option, expected one of {', '.join(known)}")
        return cls(**given)
