"""Options of a run and of a sweep, checked when they are made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

FILE_DATASETS = ("mnist", "fashion-mnist", "cifar10", "cifar100")
DATASETS = ("digits", "procedural", *FILE_DATASETS)
MAX_PROCEDURAL_CLASSES = 64
MODELS = ("lenet5", "resnet56")
LR_RULES = ("fixed", "linear", "sqrt")
UNFOLDS = ("flatten", "channel", "pool")
DEFAULT_EPOCHS = 20


class UserError(ValueError):
    """A mistake of the user that one sentence explains; the command line prints it without a traceback."""


@dataclass(frozen=True)
class ProceduralOptions:
    """Options of the procedural data set, which is drawn by a program (bsgap_kernels/lab/data/procedural.py).

    Args:
        train: training images; more of them leave the first ones as they are.
        test: test images, likewise.
        classes: number of classes, from 2 to 64.
        difficulty: from 0 to 2, how far everything goes that says nothing about the class.
        label_noise: share of the training labels that are replaced by another class.
        seed: of images and labels.
    """

    train: int = 10_000
    test: int = 20_000
    classes: int = 10
    difficulty: float = 1.0
    label_noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for option in ("train", "test"):
            _integer(f"procedural.{option}", getattr(self, option))
        _integer("procedural.classes", self.classes, minimum=2, maximum=MAX_PROCEDURAL_CLASSES)
        _integer("procedural.seed", self.seed, minimum=0, maximum=2**63 - 1)
        _number("procedural.difficulty", self.difficulty, minimum=0.0, maximum=2.0)
        _number("procedural.label_noise", self.label_noise, minimum=0.0, below=1.0)

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


@dataclass
class RunOptions:
    """Options shared by one run and a sweep.

    Args:
        data: digits, procedural (drawn by a program), mnist, fashion-mnist, cifar10 or cifar100.
        data_root: directory that holds torchvision's files; not needed for digits and procedural.
        download: let torchvision fetch missing files into data_root.
        procedural: options of the procedural set: train, test, classes, difficulty, label_noise and seed, as
            in --procedural.classes 20.
        model: lenet5 or resnet56.
        lr: learning rate at the base batch size.
        lr_rule: how the learning rate follows the batch size: fixed, linear (batch / base) or sqrt.
        base_batch_size: the batch size at which every rule gives lr.
        momentum: momentum of SGD.
        epochs: budget in epochs (20 if neither epochs nor steps is given); equal epochs across a sweep.
        steps: budget in updates instead of epochs; equal steps across a sweep.
        eval_every: evaluate on the whole training and test sets every so many epochs, and at the end.
        every: read the metric on the training batch every so many steps.
        probe_size: rows of the fixed probe batch, the same training images for every run.
        probe_every: read the metric on the probe batch every so many steps, and at the end.
        max_probes: raise probe_every so that a run probes about this often at most; null sets no limit.
        layers: glob patterns of the modules to read, separated by commas; null reads every nonlinearity.
        unfold: how an activation becomes a matrix: flatten, channel or pool.
        rtol: near-rank counts singular values above max(atol, rtol * largest).
        atol: absolute threshold; null means none.
        center: subtract the column means before counting.
        device: device to train on, cpu or cuda.
        out: directory of the results; null makes a new one named after the time under runs/.
        overwrite: replace earlier results in that directory.
    """

    data: str = "digits"
    data_root: str | None = None
    download: bool = False
    procedural: ProceduralOptions | None = None
    model: str = "lenet5"
    lr: float = 0.02
    lr_rule: str = "fixed"
    base_batch_size: int = 128
    momentum: float = 0.9
    epochs: int | None = None
    steps: int | None = None
    eval_every: int = 1
    every: int = 1
    probe_size: int = 512
    probe_every: int = 1
    max_probes: int | None = None
    layers: list[str] | str | None = None
    unfold: str = "flatten"
    rtol: float = 1e-2
    atol: float | None = None
    center: bool = False
    device: str = "cpu"
    out: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        _one_of("data", self.data, DATASETS)
        _one_of("model", self.model, MODELS)
        _one_of("lr_rule", self.lr_rule, LR_RULES)
        _one_of("unfold", self.unfold, UNFOLDS)
        if self.data in FILE_DATASETS and not self.data_root:
            raise UserError(
                f"data_root: got none, expected the directory that holds torchvision's files of {self.data}"
            )
        if self.data == "procedural":
            self.procedural = ProceduralOptions.of(self.procedural)
        elif self.procedural is not None:
            raise UserError(f"procedural: got options of the procedural set, but data is {self.data}")
        _number("lr", self.lr, minimum=0.0)
        _number("momentum", self.momentum, minimum=0.0, below=1.0)
        _number("rtol", self.rtol, minimum=0.0)
        if self.atol is not None:
            _number("atol", self.atol, minimum=0.0)
        if self.epochs is not None and self.steps is not None:
            raise UserError(
                f"epochs, steps: got both {self.epochs} and {self.steps}, expected one of the two budgets"
            )
        if self.epochs is None and self.steps is None:
            self.epochs = DEFAULT_EPOCHS
        for option in ("base_batch_size", "eval_every", "every", "probe_size", "probe_every"):
            _integer(option, getattr(self, option))
        for option in ("epochs", "steps", "max_probes"):
            if getattr(self, option) is not None:
                _integer(option, getattr(self, option))
        for option in ("center", "download", "overwrite"):
            if not isinstance(getattr(self, option), bool):
                raise UserError(f"{option}: got {getattr(self, option)!r}, expected true or false")
        if self.layers is not None:
            patterns = [item.strip() if isinstance(item, str) else item for item in _items(self.layers)]
            if not patterns or not all(isinstance(item, str) and item for item in patterns):
                raise UserError(
                    f"layers: got {self.layers!r}, expected patterns such as relu*, or null for the default"
                )
            self.layers = patterns

    @property
    def budget(self) -> str:
        """The budget in words, e.g. `20 epochs`."""
        return f"{self.steps} steps" if self.steps is not None else f"{self.epochs} epochs"


@dataclass
class TrainConfig(RunOptions):
    """Options of one run.

    Args:
        batch_size: rows of a training batch, or full for the whole training set.
        seed: seed of the initial weights and of the order of the data.
    """

    batch_size: int | str = 128
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.batch_size = parse_batch_size(self.batch_size)
        _integer("seed", self.seed, minimum=0)

    @property
    def run(self) -> str:
        """Name of the run, e.g. `b128-s0`."""
        return f"b{self.batch_size}-s{self.seed}"


@dataclass
class SweepConfig(RunOptions):
    """Options of a sweep: every batch size with every seed.

    Args:
        batch_sizes: batch sizes separated by commas, full for the whole training set.
        seeds: seeds separated by commas.
    """

    batch_sizes: str | int | list[int | str] = "16,128,full"
    seeds: str | int | list[int] = "0"

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = [parse_batch_size(item, "batch_sizes") for item in _items(self.batch_sizes)]
        seeds: list[int] = []
        for item in _items(self.seeds):
            text = str(item).strip()
            if isinstance(item, bool) or not (text.isascii() and text.isdigit()):
                raise UserError(f"seeds: got {item!r}, expected integers of at least 0")
            seeds.append(int(text))
        for option, values in (("batch_sizes", sizes), ("seeds", seeds)):
            if not values:
                raise UserError(f"{option}: got an empty list, expected at least one value")
            if len(set(values)) != len(values):
                raise UserError(f"{option}: got {values}, expected each value once")
        self.batch_sizes = sizes
        self.seeds = list(seeds)

    def runs(self) -> list[TrainConfig]:
        """One TrainConfig a run, batch sizes outermost; `out` and `overwrite` are the sweep's own."""
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(RunOptions)}
        shared.update(out=None, overwrite=False)
        return [
            TrainConfig(**shared, batch_size=batch_size, seed=int(seed))
            for batch_size in _items(self.batch_sizes)
            for seed in _items(self.seeds)
        ]


def parse_batch_size(value: Any, option: str = "batch_size") -> int | str:
    """An integer of at least 1, or `full`."""
    text = str(value).strip().lower()
    if text == "full":
        return "full"
    if isinstance(value, bool) or not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise UserError(f"{option}: got {value!r}, expected an integer of at least 1, or full")
    return int(text)


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, str):
        return [item for item in value.strip("[] ").split(",") if item.strip()]
    return value if isinstance(value, (list, tuple)) else [value]


def _one_of(option: str, value: Any, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise UserError(f"{option}: got {value!r}, expected one of {', '.join(allowed)}")


def _integer(option: str, value: Any, minimum: int = 1, maximum: int | None = None) -> None:
    valid = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
    if not valid or (maximum is not None and value > maximum):
        bound = "" if maximum is None else f" and at most {maximum}"
        raise UserError(f"{option}: got {value!r}, expected an integer of at least {minimum}{bound}")


def _number(
    option: str, value: Any, minimum: float, below: float = math.inf, maximum: float = math.inf
) -> None:
    valid = isinstance(value, (int, float)) and not isinstance(value, bool) and minimum <= value < below
    if not valid or value > maximum:
        bound = f" and below {below:g}" if math.isfinite(below) else ""
        bound += f" and at most {maximum:g}" if math.isfinite(maximum) else ""
        raise UserError(f"{option}: got {value!r}, expected a finite number of at least {minimum:g}{bound}")
