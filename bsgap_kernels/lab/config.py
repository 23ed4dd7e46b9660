"""Options of a run and of a sweep, checked when they are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from bsgap_kernels.lab import methods
from bsgap_kernels.lab.augment import AUGMENTATIONS
from bsgap_kernels.lab.checks import UserError, integer, items, number, one_of
from bsgap_kernels.lab.data_options import DATASETS, FILE_DATASETS, ProceduralOptions
from bsgap_kernels.lab.option_values import (
    parse_accuracies,
    parse_batch_size,
    parse_digits,
    parse_learning_rates,
)

__all__ = ["ProceduralOptions", "RunOptions", "SweepConfig", "TrainConfig", "UserError"]

MODELS = (
    "lenet5", "cnn", "mlp", "lstm", "vgg16", "vgg16-bn", "resnet18", "resnet56",
    "keskar-f1", "keskar-f2", "keskar-c1", "keskar-c2", "keskar-c3", "keskar-c4",
)  # fmt: skip
TORCHVISION = "torchvision:"
"""Before the name of one of torchvision's models."""
LR_RULES = ("fixed", "linear", "sqrt")
UNFOLDS = ("auto", "flatten", "channel", "pool")
PRECISIONS = ("float32", "bfloat16")
LAUNCHERS = ("local", "ray")
DEFAULT_EPOCHS = 20
MOST_EPOCHS = 200
"""Of a run that ends once it is fitted, where no other budget is given."""
PLAIN = "sgd"
"""The method that the others are compared to, and that a run's name leaves out."""
MOST_THREADS = 4096
MAX_SEED = 2**63 - 1
"""What torch's generators take."""
TARGET_ACCURACIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)

_OPTIONAL_INTEGERS = (
    "epochs", "steps", "max_evaluations", "every", "probe_every", "max_probes", "micro_batch", "threads",
    "patience",
)  # fmt: skip

INDIFFERENT = frozenset(
    {
        "out",
        "overwrite",
        "data_root",
        "download",
        "checkpoint_seconds",
        "keep_checkpoints",
        "jobs",
        "launcher",
    }
    | {"ray_address", "threads"}
)
"""Options that do not change the numbers of a run (threads: by rounding only): it may go on with others."""

_Options = TypeVar("_Options", bound="RunOptions")


@dataclass
class RunOptions:
    """Options shared by one run and a sweep.

    Args:
        data: digits, procedural (drawn by a program), mnist, fashion-mnist, cifar10 or cifar100.
        data_root: directory that holds torchvision's files; not needed for digits and procedural.
        download: let torchvision fetch missing files into data_root.
        procedural: options of the procedural set: train, test, classes, difficulty, label_noise and seed, as
            in --procedural.classes 20.
        augment: none, or standard (random crops, and flips of colour images) on training batches.
        model: lenet5, cnn, mlp, lstm, vgg16, vgg16-bn, resnet18, resnet56, keskar-f1, -f2, -c1 to -c4, or
            torchvision:NAME.
        lr: learning rate at the base batch size; null for the method's default.
        lr_rule: how the learning rate follows the batch size: fixed, linear (batch / base) or sqrt; a method
            may bring its own (legw: sqrt; fb and its variants, autowu: fixed).
        base_batch_size: the batch size at which every rule gives lr.
        precision: float32, or bfloat16 for mixed precision by autocast.
        micro_batch: most rows in one forward and backward pass; a larger batch adds up the gradients of
            several (batch norm then sees the rows of one pass); null for no limit.
        epochs: budget in epochs (20 if neither epochs nor steps is given, 200 with until_fitted); equal
            epochs across a sweep.
        steps: budget in updates instead of epochs; equal steps across a sweep.
        until_fitted: end a run at the first evaluation whose train accuracy is at least this (0.99 if given
            without a value); epochs or steps are then the most it takes, and what schedules go by.
        patience: with until_fitted, evaluations in a row without a new lowest training loss after which a run
            ends unfitted (at full batch every update is an epoch, with its evaluation); null for no limit.
        eval_every: evaluate on the whole training and test sets every so many epochs, and at the end.
        max_evaluations: raise eval_every so that a run evaluates about this often at most; null: no limit.
        target_accuracies: test accuracies whose first evaluation at or above them is kept in the summary.
        every: read the layers on the training batch every so many steps; null for never.
        metrics: metrics to record of the training batch, names of RankTracker's separated by commas, or all;
            the probe batch always gets all of them. near_rank needs no more than a float32 Gram matrix.
        certify: prove the counts of the training batch, as those of the probe batch always are.
        probe_size: rows of the fixed probe batch, the same training images for every run.
        probe_every: read the layers on the probe batch every so many steps, and at the end; null: at the end
            alone. A reading takes all metrics and certified intervals.
        max_probes: raise probe_every so that a run probes about this often at most; null sets no limit.
        layers: glob patterns of the modules to read, separated by commas; null reads every nonlinearity.
        unfold: how an activation becomes a matrix: auto (as RankTracker's default: channel for images),
            flatten, channel or pool.
        rtol: near-rank counts singular values above max(atol, rtol * largest).
        atol: absolute threshold; null means none.
        center: subtract the column means before counting.
        device: device to train on, cpu or cuda.
        threads: CPU threads of a run; null for torch's own number, or an even share among side-by-side runs.
        checkpoint_seconds: save a checkpoint about every so many seconds; null for only when stopped.
        keep_checkpoints: how many of the last checkpoints are kept while a run works.
        out: directory of the results; null makes a new one named after the time under runs/. The same
            command on the same directory goes on where it was stopped, and skips what is done.
        overwrite: replace earlier results in that directory.
    """

    data: str = "digits"
    data_root: str | None = None
    download: bool = False
    procedural: ProceduralOptions | None = None
    augment: str = "none"
    model: str = "lenet5"
    lr: float | None = None
    lr_rule: str = "fixed"
    base_batch_size: int = 128
    precision: str = "float32"
    micro_batch: int | None = None
    epochs: int | None = None
    steps: int | None = None
    until_fitted: float | None = None
    patience: int | None = 50
    eval_every: int = 1
    max_evaluations: int | None = None
    target_accuracies: list[float] = field(default_factory=lambda: list(TARGET_ACCURACIES))
    every: int | None = 1
    metrics: list[str] | str = "near_rank"
    certify: bool = False
    probe_size: int = 512
    probe_every: int | None = 1
    max_probes: int | None = None
    layers: list[str] | str | None = None
    unfold: str = "auto"
    rtol: float = 1e-2
    atol: float | None = None
    center: bool = False
    device: str = "cpu"
    threads: int | None = None
    checkpoint_seconds: float | None = 60.0
    keep_checkpoints: int = 2
    out: str | None = None
    overwrite: bool = False
    hyper: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        one_of("data", self.data, DATASETS)
        one_of("augment", self.augment, AUGMENTATIONS)
        if not (isinstance(self.model, str) and self.model.startswith(TORCHVISION)):
            one_of("model", self.model, (*MODELS, f"{TORCHVISION}NAME"))
        one_of("lr_rule", self.lr_rule, LR_RULES)
        one_of("precision", self.precision, PRECISIONS)
        one_of("unfold", self.unfold, UNFOLDS)
        if self.data in FILE_DATASETS and not self.data_root:
            raise UserError(
                f"data_root: got none, expected the directory that holds torchvision's files of {self.data}"
            )
        if self.data == "procedural":
            self.procedural = ProceduralOptions.of(self.procedural)
        elif self.procedural is not None:
            raise UserError(f"procedural: got options of the procedural set, but data is {self.data}")
        if self.lr is not None:
            number("lr", self.lr, minimum=0.0)
        number("rtol", self.rtol, minimum=0.0)
        if self.atol is not None:
            number("atol", self.atol, minimum=0.0)
        if self.checkpoint_seconds is not None:
            number("checkpoint_seconds", self.checkpoint_seconds, minimum=0.0)
        if self.epochs is not None and self.steps is not None:
            raise UserError(
                f"epochs, steps: got both {self.epochs} and {self.steps}, expected one of the two budgets"
            )
        if self.epochs is None and self.steps is None:
            self.epochs = DEFAULT_EPOCHS if self.until_fitted is None else MOST_EPOCHS
        if self.until_fitted is not None:
            number("until_fitted", self.until_fitted, minimum=0.0, maximum=1.0)
        for option in ("base_batch_size", "eval_every", "probe_size", "keep_checkpoints"):
            integer(option, getattr(self, option))
        for option in _OPTIONAL_INTEGERS:
            if getattr(self, option) is not None:
                integer(option, getattr(self, option), maximum=MOST_THREADS if option == "threads" else None)
        for option in ("center", "certify", "download", "overwrite"):
            if not isinstance(getattr(self, option), bool):
                raise UserError(f"{option}: got {getattr(self, option)!r}, expected true or false")
        self.target_accuracies = parse_accuracies(self.target_accuracies)
        self.metrics = [str(item).strip() for item in items(self.metrics)]
        if self.layers is not None:
            patterns = [item.strip() if isinstance(item, str) else item for item in items(self.layers)]
            if not patterns or not all(isinstance(item, str) and item for item in patterns):
                raise UserError(
                    f"layers: got {self.layers!r}, expected patterns such as relu*, or null for the default"
                )
            self.layers = patterns

    @property
    def budget(self) -> str:
        """The budget in words, e.g. `20 epochs`, or `99 % train accuracy, at most 200 epochs`."""
        limit = f"{self.steps} steps" if self.steps is not None else f"{self.epochs} epochs"
        if self.until_fitted is None:
            return limit
        return f"{100 * self.until_fitted:g} % train accuracy, at most {limit}"

    def mapping(self) -> dict[str, Any]:
        """The options as written to YAML: a method's hyper-parameters stand under its name."""
        values = dataclasses.asdict(self)
        hyper = values.pop("hyper")
        return {**values, **hyper}

    @classmethod
    def from_mapping(cls: type[_Options], values: Mapping[str, Any]) -> _Options:
        """The options that `mapping` gave.

        Raises:
            UserError: an option out of range, or one that there is not.
        """
        known = {option.name for option in dataclasses.fields(cls)} - {"hyper"}
        # The command line's parser writes fb_reg for fb-reg.
        named = {name: name.replace("_", "-") for name in values}
        hyper = {named[name]: value for name, value in values.items() if named[name] in methods.REGISTRY}
        if unknown := sorted(name for name in values if name not in known and named[name] not in hyper):
            raise UserError(f"{unknown[0]}: unknown option")
        for name, value in hyper.items():
            if not isinstance(value, dict):
                raise UserError(f"{name}: got {value!r}, expected a mapping of hyper-parameters")
        return cls(**{name: values[name] for name in values if name in known}, hyper=hyper)

    def _resolve_hyper(self, names: list[str]) -> None:
        """Keep the hyper-parameters of these methods, all of each, checked."""
        given, self.hyper = self.hyper, {}
        for name in names:
            one_of("method", name, methods.REGISTRY)
            hyper_type = methods.REGISTRY[name].hyper_type
            known = {option.name for option in dataclasses.fields(hyper_type)}
            values = given.get(name) or {}
            if unknown := sorted(set(values) - known):
                raise UserError(f"{name}.{unknown[0]}: unknown option, expected {', '.join(sorted(known))}")
            self.hyper[name] = hyper_type(**values).asdict()


@dataclass
class TrainConfig(RunOptions):
    """Options of one run.

    Args:
        method: how to train, by the name of one of the groups of hyper-parameters below, such as sgd or legw.
        batch_size: rows of a training batch, or full for the whole training set.
        seed: seed of the initial weights and of the order of the data.
    """

    method: str = "sgd"
    batch_size: int | str = 128
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.batch_size = parse_batch_size(self.batch_size)
        integer("seed", self.seed, minimum=0, maximum=MAX_SEED)
        self._resolve_hyper([self.method])
        if self.lr is None:
            self.lr = methods.REGISTRY[self.method].default_lr

    @property
    def run(self) -> str:
        """Name of the run, e.g. `b128-s0` or `adam-b128-s0`."""
        method = "" if self.method == PLAIN else f"{self.method}-"
        return f"{method}b{self.batch_size}-s{self.seed}"

    @property
    def hyper_parameters(self) -> methods.Hyper:
        """The method's hyper-parameters."""
        return methods.REGISTRY[self.method].hyper_type(**self.hyper[self.method])

    def differences(self, other: TrainConfig) -> list[str]:
        """Options that change a run's numbers and differ from another's, as `name: theirs, mine`."""
        mine, others = self.mapping(), other.mapping()
        return [
            f"{name}: {others.get(name)!r} there, {mine.get(name)!r} now"
            for name in dict.fromkeys([*mine, *others])
            if name not in INDIFFERENT and mine.get(name) != others.get(name)
        ]


@dataclass
class SweepConfig(RunOptions):
    """Options of a sweep: every method at every batch size with every seed.

    Args:
        methods: methods separated by commas, of those of bsgap train.
        batch_sizes: batch sizes separated by commas, full for the whole training set.
        seeds: seeds separated by commas.
        lrs: learning rates of single methods at the base batch size, or of one at a batch size, such as
            sgd=0.02,sgd@256=0.05; the others have lr.
        reference: batch size of further runs, of plain SGD, that the others are compared to; null for none.
        sharpness: measure the sharpness of every run at its end, and the loss between the smallest and the
            largest batch of the first seed.
        sharpness_images: training images that sharpness is measured on; null for all.
        jobs: runs side by side, each in a process of its own; 1 runs one after another in this process.
        launcher: local, or ray for the machines of a Ray cluster that share the directory of results.
        ray_address: the cluster to join, such as auto; null starts one on this machine.
    """

    methods: str | list[str] = "sgd"
    batch_sizes: str | int | list[int | str] = "16,128,full"
    seeds: str | int | list[int] = "0"
    lrs: str | dict[str, float] | None = None
    reference: int | str | None = None
    sharpness: bool = False
    sharpness_images: int | None = None
    jobs: int = 1
    launcher: str = "local"
    ray_address: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("jobs", self.jobs)
        if self.sharpness_images is not None:
            integer("sharpness_images", self.sharpness_images)
        if not isinstance(self.sharpness, bool):
            raise UserError(f"sharpness: got {self.sharpness!r}, expected true or false")
        one_of("launcher", self.launcher, LAUNCHERS)
        names = [str(item).strip() for item in items(self.methods)]
        sizes = [parse_batch_size(item, "batch_sizes") for item in items(self.batch_sizes)]
        seeds: list[int] = []
        for item in items(self.seeds):
            seed = parse_digits(item)
            if seed is None or seed > MAX_SEED:
                raise UserError(
                    f"seeds: got {item!r}, expected integers of at least 0 and at most {MAX_SEED}"
                )
            seeds.append(seed)
        for option, values in (("methods", names), ("batch_sizes", sizes), ("seeds", seeds)):
            if not values:
                raise UserError(f"{option}: got an empty list, expected at least one value")
            if len(set(values)) != len(values):
                raise UserError(f"{option}: got {values}, expected each value once")
        self.methods = names
        self.batch_sizes = sizes
        self.seeds = list(seeds)
        if self.reference is not None:
            try:
                self.reference = parse_batch_size(self.reference, "reference")
            except UserError as error:
                raise UserError(f"{error}, or null for none") from None
        kinds = self._kinds()
        self._resolve_hyper(list(dict.fromkeys(method for method, _ in kinds)))
        self.lrs = parse_learning_rates(self.lrs, kinds)

    def runs(self) -> list[TrainConfig]:
        """One TrainConfig a run, methods outermost, then batch sizes; without the sweep's `out`.

        Those of the reference come first.
        """
        shared = {option.name: getattr(self, option.name) for option in dataclasses.fields(RunOptions)}
        shared.update(out=None, overwrite=False)
        rates = self.lrs if isinstance(self.lrs, dict) else {}
        return [
            TrainConfig(
                **{**shared, "lr": rates.get(f"{method}@{batch_size}", rates.get(method, self.lr))},
                method=method,
                batch_size=batch_size,
                seed=int(seed),
            )
            for method, batch_size in self._kinds()
            for seed in items(self.seeds)
        ]

    def _kinds(self) -> list[tuple[str, int | str]]:
        """Method and batch size of runs that differ by their seed alone."""
        kinds = [] if self.reference is None else [(PLAIN, self.reference)]
        kinds += [(str(method), size) for method in items(self.methods) for size in items(self.batch_sizes)]
        return list(dict.fromkeys(kinds))
