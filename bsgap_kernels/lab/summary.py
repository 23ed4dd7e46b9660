"""summary.json: what a run ended with."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch

import bsgap_kernels as bsgap
from bsgap_kernels.bench.ceilings import multiply_add_rate
from bsgap_kernels.bench.floors import gram_flops
from bsgap_kernels.lab.loop import Loop
from bsgap_kernels.lab.overdetermination import overdetermination
from bsgap_kernels.lab.setup import Setup
from bsgap_kernels.lab.versions import versions
from bsgap_kernels.tracking import SiteRecord

# The Gaussian null matrix depends on the shape alone.
_NULL_SEED = 20221012
# Of one of five repeats: a tenth of a second in all, once a process.
_PEAK_SECONDS = 0.02


def summary_of(loop: Loop, status: str, weights: str | None) -> dict[str, Any]:
    """The content of summary.json; `weights` is the SHA-256 of the final weights' bits, if written."""
    setup, config, evaluation = loop.setup, loop.setup.config, loop.evaluation
    train_accuracy, test_accuracy = evaluation.get("train_eval.accuracy"), evaluation.get("test.accuracy")
    gap = None
    if train_accuracy is not None and test_accuracy is not None:
        gap = train_accuracy - test_accuracy
    updates, train_seconds = max(loop.done, 1), loop.seconds["step"]
    step_ms = 1e3 * train_seconds / updates
    # Where no training batch is read there is no metric to speak of, not a cheap one.
    metric_ms = None if config.every is None else 1e3 * loop.seconds["metric"] / updates
    images = loop.done * setup.batch_size
    return {
        "run": config.run,
        "status": status,
        "model": config.model,
        "data": config.data,
        "overdetermination": overdetermination(setup.model, len(setup.data.train_labels), setup.data.classes),
        "synthetic": setup.data.synthetic,
        "augment": config.augment,
        "method": config.method,
        "hyper": config.hyper[config.method],
        "batch_size": setup.batch_size,
        "gradient_images": loop.gradients.images,
        "method_summary": setup.method.summary(),
        "micro_batch": config.micro_batch,
        "precision": config.precision,
        "seed": config.seed,
        "lr": setup.lr,
        "budget": config.budget,
        "until_fitted": config.until_fitted,
        "ended": loop.ended,
        "steps": loop.done,
        "epochs": loop.done / setup.steps_per_epoch,
        "train_accuracy": train_accuracy,
        "test_accuracy": test_accuracy,
        "generalization_gap": gap,
        "train_loss": evaluation.get("train_eval.loss"),
        "test_loss": evaluation.get("test.loss"),
        "sites": _sites(loop),
        "train_seconds": train_seconds,
        "images_per_second": images / train_seconds if train_seconds else None,
        "time_to_accuracy": {
            f"{target:g}": loop.reached.get(f"{target:g}") for target in config.target_accuracies
        },
        "step_ms": step_ms,
        "metric_ms_per_step": metric_ms,
        "metric_percent_of_step": 100 * metric_ms / step_ms if metric_ms is not None and step_ms else None,
        **_floor(loop),
        "probes": loop.probes,
        "probe_ms": 1e3 * loop.seconds["probe"] / loop.probes if loop.probes else None,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "rtol": config.rtol,
        "unfold": config.unfold,
        "weights_sha256": weights,
    }


@cache
def _float32_peak(threads: int) -> float:
    return multiply_add_rate("float32", threads, _PEAK_SECONDS)


def _floor(loop: Loop) -> dict[str, float | None]:
    """The shortest time of a step's Gram matrices on this CPU: half of each, at its float32 peak.

    Mean over all steps, as the metric's time is; of one process, with its share of the rows.
    """
    config, done = loop.setup.config, loop.done
    shapes = loop.batch_shapes.values()
    if loop.setup.device.type != "cpu" or config.every is None or not done or not shapes:
        return {"float32_flops": None, "metric_floor_ms": None}
    peak = _float32_peak(torch.get_num_threads())
    flops = sum(gram_flops(*shape) for shape in shapes) / loop.setup.ranks.world
    share_read = math.ceil(done / config.every) / done
    return {"float32_flops": peak, "metric_floor_ms": 1e3 * share_read * flops / peak}


def _sites(loop: Loop) -> list[dict[str, Any]]:
    null: dict[tuple[int, int], int] = {}
    sites = []
    for site, record in loop.probe_records.items():
        if record.shape not in null:
            null[record.shape] = gaussian_near_rank(loop.setup, record.shape)
        sites.append(_site(site, record, loop.batch_shapes.get(site), null[record.shape]))
    return sites


def _site(site: str, record: SiteRecord, batch_shape: list[int] | None, null: int) -> dict[str, Any]:
    return {
        "site": site,
        "batch_shape": batch_shape,
        "probe_shape": list(record.shape),
        "near_rank": record.near_rank,
        "lower": record.lower,
        "upper": record.upper,
        "ratio": record.ratio,
        "null_near_rank": null,
        "null_ratio": null / min(record.shape),
    }


def gaussian_near_rank(setup: Setup, shape: tuple[int, int]) -> int:
    """Near-rank of a matrix of standard normal entries: what the shape alone gives."""
    config = setup.config
    gaussian = torch.randn(shape, generator=torch.Generator().manual_seed(_NULL_SEED))
    return int(bsgap.near_rank(gaussian, rtol=config.rtol, atol=config.atol, center=config.center))
