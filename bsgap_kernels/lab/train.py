"""One training run that reads the near-rank of every site at every step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bsgap_kernels as bsgap
from bsgap_kernels.lab import results
from bsgap_kernels.lab.config import TrainConfig
from bsgap_kernels.lab.data import ImageData
from bsgap_kernels.lab.distributed import ALONE, Ranks
from bsgap_kernels.lab.progress import Progress
from bsgap_kernels.lab.setup import Setup, resolve_device, set_up
from bsgap_kernels.lab.versions import versions
from bsgap_kernels.tracking import RankTracker, SiteRecord

# The Gaussian null matrix depends on the shape alone.
_NULL_SEED = 20221012
_EVALUATION_ROWS = 1000


def train(
    config: TrainConfig, directory: Path, *, data: ImageData | None = None, ranks: Ranks = ALONE
) -> dict[str, Any]:
    """Train one network, write config.yaml, metrics.jsonl and summary.json, and return the summary.

    Batches are drawn without replacement from a new permutation every epoch; the rows left over at the end of
    an epoch are dropped, so that every training batch has the same shape (the shape alone moves a near-rank).
    The same configuration gives bit-identical values, times apart, on the same machine and thread count. The
    caller's random state is left as it was.

    With several `ranks` every one calls this with the same configuration; each takes its share of every
    batch, of the probe and of the evaluation, numbers are those of one process on the whole batch (up to
    rounding), and rank 0 writes the files and shows progress.

    Raises:
        UserError: an option does not fit, or `directory` holds something and `config.overwrite` is not set.
    """
    device = resolve_device(config.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        setup = ranks.together(lambda: set_up(config, data, ranks))
        with setup.tracker:
            ranks.together(lambda: _open_directory(config, directory, ranks))
            loop = _Loop(setup)
            status = "stopped"
            try:
                with (
                    results.open_writer(directory, config.run, write=ranks.main) as writer,
                    Progress(setup.steps, config.run, shown=ranks.main) as progress,
                ):
                    loop.run(writer, progress)
                status = "finished"
            finally:
                # Also after Ctrl-C: what was measured until then stays readable.
                summary = loop.summary(status)
                if ranks.main:
                    results.write_summary(directory / results.SUMMARY_FILE, summary)
    return summary


def _open_directory(config: TrainConfig, directory: Path, ranks: Ranks) -> None:
    if ranks.main:
        results.prepare_directory(directory, overwrite=config.overwrite)
        results.write_config(directory / results.CONFIG_FILE, config)


class _Loop:
    """The training loop and what it adds up for the summary."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.ranks = setup.ranks
        self.model = self.ranks.parallel(setup.model, setup.data.train_images.device)
        self.done = 0
        self.seconds = {"step": 0.0, "metric": 0.0, "probe": 0.0}
        self.evaluation: dict[str, float] = {}
        self.batch_records: dict[str, SiteRecord] = {}
        self.probe_records: dict[str, SiteRecord] = {}
        self.null: dict[tuple[int, int], int] = {}

    def run(self, writer: results.Writer, progress: Progress) -> None:
        setup = self.setup
        data, config = setup.data, setup.config
        shuffle = torch.Generator().manual_seed(config.seed)
        order = torch.empty(0, dtype=torch.int64)
        setup.model.train()
        for step in range(setup.steps):
            position = step % setup.steps_per_epoch
            if position == 0:
                order = torch.randperm(len(data.train_images), generator=shuffle).to(data.train_images.device)
            if step % setup.probe_every == 0:
                self._read_probe(step, writer)
            rows = order[position * setup.batch_size : (position + 1) * setup.batch_size]
            loss, accuracy = self._update(step, rows, writer)
            self.done = step + 1
            epoch_ends = self.done % (setup.steps_per_epoch * config.eval_every) == 0
            if epoch_ends or self.done == setup.steps:
                self._evaluate(writer)
            progress.update(self.done, loss, accuracy, _mean_ratio(self.probe_records))
        self._read_probe(setup.steps, writer)

    def _update(self, step: int, rows: Tensor, writer: results.Writer) -> tuple[float, float]:
        """One update; the metric's share of the time is taken out of the step's."""
        setup = self.setup
        tracker = setup.tracker
        started = time.perf_counter()
        own = rows[self.ranks.share(len(rows))]
        images, labels = setup.data.train(own)
        untracked = step % setup.config.every != 0
        with tracker.paused(untracked):
            logits = self.model(images)
        loss = self.ranks.loss(logits, labels, len(rows))
        setup.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        setup.optimizer.step()
        with torch.no_grad():
            correct = (logits.argmax(1) == labels).to(torch.float64).sum() / len(rows)
            shares = torch.stack([loss.detach().to(torch.float64) / self.ranks.world, correct])
            values = self.ranks.total(shares).tolist()
        trained = time.perf_counter()
        with tracker.paused(untracked):
            records = tracker.collect()
        writer.add_records(step, "batch", records)
        in_hooks = sum(record.seconds for record in records.values())
        metric = time.perf_counter() - trained + in_hooks
        update = trained - started - in_hooks
        self.batch_records = records or self.batch_records
        self.seconds["step"] += update
        self.seconds["metric"] += metric
        writer.add(step, "", "train.loss", values[0])
        writer.add(step, "", "train.accuracy", values[1])
        writer.add(step, "", "lr", setup.lr)
        writer.add(step, "", "time.step_ms", round(update * 1e3, 4))
        if records:
            writer.add(step, "", "time.metric_ms", round(metric * 1e3, 4))
        return values[0], values[1]

    def _read_probe(self, step: int, writer: results.Writer) -> None:
        """Read every site on the probe batch, leaving buffers, mode and random state of the run untouched."""
        model, tracker = self.setup.model, self.setup.tracker
        started = time.perf_counter()
        probe = self.setup.probe
        training = model.training
        model.eval()
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[probe.device] if probe.device.type == "cuda" else []),
            tracker.view("probe"),
        ):
            model(probe)
        model.train(training)
        self.probe_records = tracker.collect("probe")
        writer.add_records(step, "probe", self.probe_records)
        seconds = time.perf_counter() - started
        self.seconds["probe"] += seconds
        writer.add(step, "", "time.probe_ms", round(seconds * 1e3, 4))
        for record in self.probe_records.values():
            if record.shape not in self.null:
                self.null[record.shape] = self._gaussian_near_rank(record.shape)

    def _gaussian_near_rank(self, shape: tuple[int, int]) -> int:
        """Near-rank of a matrix of standard normal entries: what the shape alone gives."""
        config = self.setup.config
        gaussian = torch.randn(shape, generator=torch.Generator().manual_seed(_NULL_SEED))
        return int(bsgap.near_rank(gaussian, rtol=config.rtol, atol=config.atol, center=config.center))

    def _evaluate(self, writer: results.Writer) -> None:
        data = self.setup.data
        for split, read, rows in (
            ("train_eval", data.train, len(data.train_labels)),
            ("test", data.test, len(data.test_labels)),
        ):
            loss, accuracy = evaluate(self.setup.model, self.setup.tracker, read, rows, self.ranks)
            for name, value in (("loss", loss), ("accuracy", accuracy)):
                self.evaluation[f"{split}.{name}"] = value
                writer.add(self.done, "", f"{split}.{name}", value)

    def summary(self, status: str) -> dict[str, Any]:
        """The content of summary.json."""
        setup, config, evaluation = self.setup, self.setup.config, self.evaluation
        train_accuracy, test_accuracy = evaluation.get("train_eval.accuracy"), evaluation.get("test.accuracy")
        gap = None
        if train_accuracy is not None and test_accuracy is not None:
            gap = train_accuracy - test_accuracy
        milliseconds = {name: 1e3 * seconds / max(self.done, 1) for name, seconds in self.seconds.items()}
        step_ms = milliseconds["step"]
        return {
            "run": config.run,
            "status": status,
            "model": config.model,
            "data": config.data,
            "batch_size": setup.batch_size,
            "seed": config.seed,
            "lr": setup.lr,
            "budget": config.budget,
            "steps": self.done,
            "epochs": self.done / setup.steps_per_epoch,
            "train_accuracy": train_accuracy,
            "test_accuracy": test_accuracy,
            "generalization_gap": gap,
            "train_loss": evaluation.get("train_eval.loss"),
            "test_loss": evaluation.get("test.loss"),
            "sites": [self._site_summary(site, record) for site, record in self.probe_records.items()],
            "metric_ms_per_step": milliseconds["metric"],
            "probe_ms_per_step": milliseconds["probe"],
            "step_ms": step_ms,
            "metric_percent_of_step": 100 * milliseconds["metric"] / step_ms if step_ms else None,
            "probe_percent_of_step": 100 * milliseconds["probe"] / step_ms if step_ms else None,
            "versions": versions(),
            "rtol": config.rtol,
            "unfold": config.unfold,
        }

    def _site_summary(self, site: str, record: SiteRecord) -> dict[str, Any]:
        batch = self.batch_records.get(site)
        null = self.null.get(record.shape)
        return {
            "site": site,
            "batch_shape": list(batch.shape) if batch else None,
            "probe_shape": list(record.shape),
            "near_rank": record.near_rank,
            "lower": record.lower,
            "upper": record.upper,
            "ratio": record.ratio,
            "null_near_rank": null,
            "null_ratio": None if null is None else null / min(record.shape),
        }


def evaluate(
    model: nn.Module,
    tracker: RankTracker,
    read: Callable[[slice], tuple[Tensor, Tensor]],
    rows: int,
    ranks: Ranks = ALONE,
) -> tuple[float, float]:
    """Mean loss and accuracy over a whole set, in eval mode, each rank its share; nothing is recorded.

    `read` gives the images and labels of a slice of the set's `rows`: `ImageData.train` or `ImageData.test`.
    """
    training = model.training
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=read(slice(0, 0))[1].device)
    with torch.no_grad(), tracker.paused():
        share = ranks.share(rows)
        for start in range(share.start, share.stop, _EVALUATION_ROWS):
            chunk = slice(start, min(start + _EVALUATION_ROWS, share.stop))
            images, expected = read(chunk)
            logits = model(images)
            totals[0] += nn.functional.cross_entropy(logits, expected, reduction="sum")
            totals[1] += (logits.argmax(1) == expected).sum()
    model.train(training)
    loss, correct = (ranks.total(totals) / rows).tolist()
    return loss, correct


def _mean_ratio(records: dict[str, SiteRecord]) -> float:
    ratios = [record.ratio for record in records.values()]
    return sum(ratios) / len(ratios) if ratios else math.nan
