"""Sharpness of finished runs: sharpness.json of a run, and the curves between two."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bsgap_kernels.lab import results
from bsgap_kernels.lab.checks import UserError
from bsgap_kernels.lab.curvature import max_eigenvalue
from bsgap_kernels.lab.curves import KINDS, check_comparable, curve
from bsgap_kernels.lab.directories import CURVES_FOLDER, SHARPNESS_FILE
from bsgap_kernels.lab.objective import CHUNK, Objective
from bsgap_kernels.lab.optional import require
from bsgap_kernels.lab.saved import SavedRun, load_run
from bsgap_kernels.lab.setup import resolve_device
from bsgap_kernels.lab.sharpness import EPSILONS, ITERATIONS, SUBSPACE, Subspace, sharpness
from bsgap_kernels.lab.stop import NEVER, Stop
from bsgap_kernels.lab.versions import versions

SCHEMA = 1

# The rows of a part of the training set depend on this and on their number alone: the same for every run.
_ROWS_SEED = 20170429


@dataclass(frozen=True)
class SharpnessOptions:
    """Options of a sharpness measurement, checked when they are made.

    Args:
        epsilons: sizes ε of the box.
        subspace: columns of the random matrix A; 0 leaves the subspace out.
        iterations: L-BFGS-B iterations of a φ.
        images: training images that f is the mean over, the same ones for every run; null: all.
        seed: of the random matrix and of the vector that Lanczos starts from.
        hessian: also find the Hessian's largest eigenvalue.
        double: run the network in float64.
        chunk: images of one pass; memory grows with it.
        device: cpu or cuda; null: where the run was trained.
    """

    epsilons: tuple[float, ...] = EPSILONS
    subspace: int = SUBSPACE
    iterations: int = ITERATIONS
    images: int | None = None
    seed: int = 0
    hessian: bool = True
    double: bool = False
    chunk: int = CHUNK
    device: str | None = None

    def __post_init__(self) -> None:
        if not self.epsilons or not all(math.isfinite(e) and e > 0 for e in self.epsilons):
            raise UserError(f"epsilon: got {list(self.epsilons)}, expected finite numbers above 0")
        if len(set(self.epsilons)) != len(self.epsilons):
            raise UserError(f"epsilon: got {list(self.epsilons)}, expected each value once")
        for name, least in (("iterations", 1), ("chunk", 1), ("subspace", 0), ("seed", 0), ("images", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name}: got {value}, expected an integer of at least {least}")


def sharpness_of(
    directory: Path,
    options: SharpnessOptions | None = None,
    *,
    saved: SavedRun | None = None,
    say: Callable[[str], None] = lambda text: None,
    stop: Stop = NEVER,
) -> dict[str, Any]:
    """Measure a finished run, write its sharpness.json, and return what is in it.

    The full space comes first, then the subspace, each with every ε; then the Hessian. Where the loss is not
    finite φ and the eigenvalue are None, with a message.

    Args:
        directory: of the run.
        options: default ones if None.
        saved: the run, if it is loaded already.
        say: told what is being worked on.
        stop: once it is set the measurement ends within a pass of its images, and nothing is written.

    Raises:
        StoppedError: it was asked to stop.
        UserError: the directory holds no run that can be loaded, or an option does not fit it.
    """
    options = options or SharpnessOptions()
    started = time.perf_counter()
    saved = load_run(directory) if saved is None else saved
    objective = _objective(saved, "train", options, stop)
    x = objective.parameters()
    own = objective.evaluate(x)
    found = []
    for columns in (0, options.subspace) if options.subspace else (0,):
        # Drawn once: every ε looks at the same subspace.
        subspace = Subspace.random(len(x), columns, options.seed) if columns else None
        for epsilon in options.epsilons:
            say(f"φ, {f'subspace {columns}' if columns else 'full space'}, ε {epsilon:g}")
            measured = sharpness(
                objective, x, epsilon, subspace=subspace, iterations=options.iterations, seed=options.seed
            )
            found.append(dataclasses.asdict(measured))
    hessian = None
    if options.hessian and math.isfinite(own.loss):
        say("largest eigenvalue of the Hessian")
        hessian = dataclasses.asdict(
            max_eigenvalue(lambda v: objective.hessian_product(x, v), objective.dimension, seed=options.seed)
        )
    record = {
        "schema": SCHEMA,
        "run": saved.config.run,
        "weights_sha256": saved.summary.get("weights_sha256"),
        "options": _plain(options),
        "mode": "eval",
        "precision": str(objective.dtype).removeprefix("torch."),
        "device": objective.device.type,
        "threads": torch.get_num_threads(),
        "images": objective.images,
        "of": len(saved.data.train_labels),
        "train_loss": own.loss,
        "train_accuracy": own.accuracy,
        "sharpness": found,
        "hessian": hessian,
        "seconds": time.perf_counter() - started,
        "versions": _versions(),
    }
    results.write_summary(directory / SHARPNESS_FILE, record)
    return record


def curves_of(
    first: Path,
    second: Path,
    options: SharpnessOptions | None = None,
    *,
    saved: tuple[SavedRun, SavedRun] | None = None,
    say: Callable[[str], None] = lambda text: None,
    stop: Stop = NEVER,
) -> tuple[Path, dict[str, Any]]:
    """Both curves between two runs, written to <a>--<b>.json; returns its path and what is in it.

    Run a, at α = 0, is the one of the smaller batch; of equal batches the first one given. The file lies in
    `curves/` beside run a. Losses that are not finite are null in it.

    Raises:
        UserError: a directory holds no run that can be loaded, or the two differ in data or architecture.
        StoppedError: `stop` was set; nothing is written.
    """
    options = options or SharpnessOptions()
    started = time.perf_counter()
    if first.resolve() == second.resolve():
        raise UserError(f"runs: got {first} twice, expected two runs")
    both = (load_run(first), load_run(second)) if saved is None else saved
    pairs = sorted(zip(both, (first, second), strict=True), key=lambda pair: _batch_rows(pair[0]))
    (a, at_a), (b, at_b) = pairs
    if a.data.name != b.data.name or a.config.model != b.config.model:
        raise UserError(
            f"runs: got {a.config.model} on {a.data.name} and {b.config.model} on {b.data.name}, "
            "expected the same model on the same data"
        )
    train, test, end = (
        _objective(a, "train", options, stop),
        _objective(a, "test", options, stop),
        _objective(b, "train", options, stop),
    )
    try:
        check_comparable(train, end)
    except ValueError as error:
        raise UserError(f"runs: {error}") from error
    x_a, x_b = train.parameters(), end.parameters()
    curves = []
    for kind in KINDS:
        say(f"{kind} curve")
        curves.append(dataclasses.asdict(curve(kind, train, test, x_a, x_b)))
    record = {
        "schema": SCHEMA,
        "a": a.config.run,
        "b": b.config.run,
        "weights_sha256": [saved.summary.get("weights_sha256") for saved in (a, b)],
        "options": _plain(options),
        "mode": "eval",
        "batch_norm": "reestimated" if train.has_batch_norm else None,
        "precision": str(train.dtype).removeprefix("torch."),
        "device": train.device.type,
        "threads": torch.get_num_threads(),
        "images": train.images,
        "of": len(a.data.train_labels),
        "test_images": test.images,
        "curves": curves,
        "seconds": time.perf_counter() - started,
        "versions": _versions(),
    }
    path = curves_path(at_a, a.config.run, at_b, b.config.run)
    path.parent.mkdir(exist_ok=True)
    results.write_summary(path, record)
    return path, record


def is_measured(directory: Path, options: SharpnessOptions) -> bool:
    """Whether a run's sharpness.json is of its present weights by these options."""
    weights = results.read_summary(directory / results.SUMMARY_FILE).get("weights_sha256")
    record = results.read_summary(directory / SHARPNESS_FILE)
    return weights is not None and _is_of(record, weights, options)


def are_drawn(first: Path, second: Path, options: SharpnessOptions) -> bool:
    """Whether the curves of two runs of one sweep, the smaller batch first, are of their present weights."""
    summaries = [results.read_summary(path / results.SUMMARY_FILE) for path in (first, second)]
    weights = [summary.get("weights_sha256") for summary in summaries]
    record = results.read_summary(curves_path(first, first.name, second, second.name))
    return None not in weights and _is_of(record, weights, options)


def _is_of(record: dict[str, Any], weights: Any, options: SharpnessOptions) -> bool:
    return bool(record.get("weights_sha256") == weights and record.get("options") == _plain(options))


def _plain(options: SharpnessOptions) -> dict[str, Any]:
    """As JSON gives it back; where the loss is evaluated does not count."""
    plain = dataclasses.asdict(options)
    del plain["device"], plain["chunk"]
    return {**plain, "epsilons": list(options.epsilons)}


def curves_path(at_a: Path, a: str, at_b: Path, b: str) -> Path:
    """The curves file of run a in the directory `at_a` and run b in `at_b`."""
    parent, other = at_a.resolve().parent, at_b.resolve().parent
    # Runs of different sweeps often share a name.
    return at_a.parent / CURVES_FOLDER / f"{a}--{b if parent == other else f'{other.name}-{b}'}.json"


def _objective(saved: SavedRun, split: str, options: SharpnessOptions, stop: Stop) -> Objective:
    device = resolve_device(options.device or saved.config.device)
    data = saved.data.to(device)
    read, labels = (data.train, data.train_labels) if split == "train" else (data.test, data.test_labels)
    total = len(labels)
    rows: Tensor | None = None
    if split == "train" and options.images is not None:
        if options.images > total:
            raise UserError(
                f"images: got {options.images}, expected at most the {total} training images of {data.name}"
            )
        order = torch.randperm(total, generator=torch.Generator().manual_seed(_ROWS_SEED))
        rows = order[: options.images].sort().values.to(device)
        total = options.images
    return Objective(
        saved.model,
        lambda chunk: read(chunk if rows is None else rows[chunk]),
        total,
        chunk=options.chunk,
        double=options.double,
        device=device,
        stop=stop,
    )


def _batch_rows(saved: SavedRun) -> int:
    size = saved.config.batch_size
    return len(saved.data.train_labels) if size == "full" else int(size)


def _versions() -> dict[str, str | None]:
    return {**versions(), "scipy": str(require("scipy").__version__)}
