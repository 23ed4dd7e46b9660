"""Values over steps as the page holds them: once, for the figures that draw them and for the comparison."""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsgap_kernels.lab.report.plot import shape_text
from bsgap_kernels.lab.report.runs import Results, Run

# Steps drawn per run and layer: about one per pixel of a panel, and 15 runs of 8 layers stay under 5 MB.
SHOWN_STEPS = 300
# The largest 16-bit number stands for "no value".
_NO_COUNT = 65535


def drawn_runs(results: Results) -> list[Run]:
    """The runs that have values over steps, in the order in which the page numbers them."""
    return [run for run in results.runs if run.trajectories]


def pack(results: Results) -> dict[str, Any]:
    """Near-rank and its certified interval at the steps drawn, per run and layer, and what scales them.

    Layers are those of `results.sites`, runs those of `drawn_runs`. A layer of a run is null where it has no
    values, else [index into the run's `steps`, smaller dimension or null, near-rank, lower, upper]; the
    bounds are null where every interval is the count itself.
    """
    return {
        "layers": [_layer(results, name) for name in results.sites],
        "runs": [_pack_run(run, results.sites) for run in drawn_runs(results)],
    }


def smaller_dimension(run: Run, layer: str) -> int | None:
    """What near-rank is divided by for its ratio, from the shape, else from a recorded ratio."""
    site = run.sites.get(layer)
    if site is not None and site.probe_shape:
        return min(site.probe_shape)
    if layer not in run.trajectories:
        return None
    trajectory = run.trajectories[layer]
    known = (trajectory.near_rank > 0) & (trajectory.ratio > 0)
    if not known.any():
        return None
    return round(float(trajectory.near_rank[known][0] / trajectory.ratio[known][0])) or None


def _layer(results: Results, name: str) -> dict[str, Any]:
    sites = [run.sites[name] for run in results.runs if name in run.sites]
    shape = next((site.probe_shape for site in sites if site.probe_shape), None)
    null = next((site.null_near_rank for site in sites if site.null_near_rank is not None), None)
    return {"name": name, "text": f"{name}, probe {shape_text(shape)}", "null": null}


def _pack_run(run: Run, layers: list[str]) -> dict[str, Any]:
    steps: list[str] = []
    entries: list[list[Any] | None] = []
    for layer in layers:
        if layer not in run.trajectories:
            entries.append(None)
            continue
        thin = run.trajectories[layer].thinned(SHOWN_STEPS)
        packed = encode_steps(thin.steps)
        if packed not in steps:
            steps.append(packed)
        entry = [steps.index(packed), smaller_dimension(run, layer), encode_counts(thin.near_rank)]
        for bound in (thin.lower, thin.upper):
            same = np.array_equal(bound, thin.near_rank, equal_nan=True)
            entry.append(None if same else encode_counts(bound))
        entries.append(entry)
    rate = run.epochs / run.steps if run.epochs and run.steps else None
    seed = "not recorded" if run.seed is None else str(run.seed)
    return {
        "name": run.name,
        "text": f"{run.label}, seed {seed}",
        "rate": rate,
        "steps": steps,
        "layers": entries,
    }


def encode_steps(steps: NDArray[np.int64]) -> str:
    """Steps in base64, little-endian: unsigned 32 bits where they fit, else float64."""
    if steps.max(initial=0) < 2**32:
        return "u4:" + base64.b64encode(steps.astype("<u4").tobytes()).decode()
    return "f8:" + base64.b64encode(steps.astype("<f8").tobytes()).decode()


def encode_counts(values: NDArray[np.float64]) -> str:
    """Counts in base64, little-endian: unsigned 16 bits with 65535 for NaN where they fit, else float64."""
    finite = values[np.isfinite(values)]
    whole = bool(np.all(finite == np.floor(finite)) and np.all((finite >= 0) & (finite < _NO_COUNT)))
    if not whole:
        return "f8:" + base64.b64encode(values.astype("<f8").tobytes()).decode()
    counts = np.where(np.isfinite(values), values, _NO_COUNT)
    return "u2:" + base64.b64encode(counts.astype("<u2").tobytes()).decode()


def end_of(results: Results, unit: str) -> float:
    """The last step, or epoch, of the longest run."""
    ends = []
    for run in drawn_runs(results):
        last = max(int(trajectory.steps[-1]) for trajectory in run.trajectories.values())
        rate = run.epochs / run.steps if run.epochs and run.steps else math.nan
        ends.append(last if unit == "step" else last * rate)
    return max(ends, default=0.0) or 1.0
