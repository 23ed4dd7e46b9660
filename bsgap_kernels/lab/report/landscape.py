"""Sharpness and parametric plots of runs, as `bsgap sharpness` writes them; nothing here raises."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bsgap_kernels.lab.report.files import count, number, read_json, text
from bsgap_kernels.lab.report.statistics import estimate

SHARPNESS_FILE, CURVES_FOLDER = "sharpness.json", "curves"
SPACES = ("full", "subspace")
CURVE_VALUES = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
# A curve has 25 points; a file with more than this is damaged or would make the report one.
_MAX_POINTS = 1000


@dataclass(frozen=True)
class Maximum:
    """One maximisation of the loss in a box about the weights: φ = 100·(max_loss − loss)/(1 + loss)."""

    space: str
    epsilon: float
    phi: float
    loss: float | None
    max_loss: float | None
    dimension: int | None
    # Share of the directions in which the search came to the border of the box.
    at_bound: float | None


@dataclass(frozen=True)
class Sharpness:
    """What a run's sharpness.json says; None where it does not."""

    maxima: list[Maximum]
    eigenvalue: float | None
    residual: float | None
    images: int | None
    of: int | None
    mode: str | None

    def of_kind(self, space: str, epsilon: float) -> Maximum | None:
        """The maximum in one space at one ε; of several (other random subspaces) the mean φ."""
        found = [entry for entry in self.maxima if (entry.space, entry.epsilon) == (space, epsilon)]
        mean = estimate([entry.phi for entry in found])
        if mean is None:
            return None
        first = found[0]
        return replace(first, phi=mean.mean)


@dataclass(frozen=True)
class Curve:
    """Losses and accuracies between two runs, NaN where a value is missing; α = 0 is `first`, 1 `last`."""

    kind: str
    first: str
    last: str
    images: int | None
    test_images: int | None
    # How batch norm's statistics came about between the runs; None without batch norm.
    batch_norm: str | None
    alpha: list[float]
    values: dict[str, list[float]]


def load_sharpness(folder: Path, problems: list[str]) -> Sharpness | None:
    """The sharpness of the run in `folder`; None where there is no usable file."""
    path = folder / SHARPNESS_FILE
    content = read_json(path, problems, holds="sharpness", otherwise="its sharpness is not shown")
    if not content:
        return None
    entries = content.get("sharpness", [])
    if not isinstance(entries, list):
        problems.append(f"{SHARPNESS_FILE} holds no list of sharpness.")
        entries = []
    maxima = [maximum for entry in entries if (maximum := _maximum(entry)) is not None]
    if len(maxima) < len(entries):
        left_out = len(entries) - len(maxima)
        problems.append(
            f"{left_out} of {len(entries)} entries of {SHARPNESS_FILE} are left out: each needs a space "
            f"({' or '.join(SPACES)}), an epsilon above 0 and a finite phi."
        )
    hessian = content.get("hessian")
    hessian = hessian if isinstance(hessian, dict) else {}
    eigenvalue = number(hessian.get("max_eigenvalue"))
    if hessian and eigenvalue is None:
        problems.append(f"{SHARPNESS_FILE} has no finite largest eigenvalue of the Hessian.")
    if not maxima and eigenvalue is None:
        problems.append(f"{SHARPNESS_FILE} holds nothing that can be shown.")
        return None
    return Sharpness(
        maxima,
        eigenvalue,
        number(hessian.get("residual")),
        count(content.get("images")),
        count(content.get("of")),
        text(content.get("mode")),
    )


def _maximum(entry: Any) -> Maximum | None:
    if not isinstance(entry, dict) or entry.get("space") not in SPACES:
        return None
    epsilon, phi = number(entry.get("epsilon")), number(entry.get("phi"))
    if epsilon is None or epsilon <= 0 or phi is None:
        return None
    return Maximum(
        entry["space"],
        epsilon,
        phi,
        number(entry.get("loss")),
        number(entry.get("max_loss")),
        count(entry.get("dimension")),
        number(entry.get("at_bound")),
    )


def load_curves(directory: Path, problems: list[str]) -> list[Curve]:
    """Every curve in `directory`/curves, by file name, linear before curved."""
    folder = directory / CURVES_FOLDER
    try:
        paths = sorted(folder.glob("*.json"))
    except OSError as error:
        problems.append(f"{CURVES_FOLDER}/ cannot be read: {error.strerror}.")
        return []
    curves: list[Curve] = []
    for path in paths:
        found: list[str] = []
        curves += _curves_of(path, found)
        problems += [f"{CURVES_FOLDER}/{sentence}" for sentence in found]
    return curves


def _curves_of(path: Path, problems: list[str]) -> list[Curve]:
    content = read_json(path, problems, holds="curves", otherwise="its curves are not shown")
    if not content:
        return []
    first, last = text(content.get("a")), text(content.get("b"))
    entries = content.get("curves")
    if first is None or last is None or not isinstance(entries, list):
        problems.append(f"{path.name} does not say which runs it joins, or holds no curves: it is left out.")
        return []
    curves = []
    for entry in entries:
        columns = _columns(entry)
        if columns is None:
            problems.append(
                f"{path.name}: a curve is left out: it needs a kind, at least 2 and at most {_MAX_POINTS} "
                "finite alpha and as many values of a loss or an accuracy."
            )
            continue
        alpha, values = columns
        gaps = sum(math.isnan(value) for column in values.values() for value in column)
        if gaps:
            problems.append(f"{path.name}: {gaps} values of its {entry['kind']} curve are missing.")
        images, tests = count(content.get("images")), count(content.get("test_images"))
        norm = text(content.get("batch_norm"))
        curves.append(Curve(entry["kind"], first, last, images, tests, norm, alpha, values))
    return sorted(curves, key=lambda curve: curve.kind != "linear")


def _columns(entry: Any) -> tuple[list[float], dict[str, list[float]]] | None:
    """α and the columns of one curve, NaN where a value is missing; None where nothing can be drawn."""
    if not isinstance(entry, dict) or text(entry.get("kind")) is None:
        return None
    alpha = entry.get("alpha")
    if not isinstance(alpha, list) or not 2 <= len(alpha) <= _MAX_POINTS:
        return None
    places = [number(value) for value in alpha]
    values: dict[str, list[float]] = {}
    for name in CURVE_VALUES:
        column = entry.get(name)
        if not isinstance(column, list) or len(column) != len(alpha):
            column = [None] * len(alpha)
        found = [number(value) for value in column]
        values[name] = [math.nan if value is None else value for value in found]
    drawn = any(math.isfinite(value) for column in values.values() for value in column)
    if not drawn or any(place is None for place in places):
        return None
    return [place for place in places if place is not None], values
