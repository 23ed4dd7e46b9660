"""The training loop: updates, reads of the layers, evaluations, and the state that a checkpoint holds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bsgap_kernels.lab.batch import Batch, Gradients, Read
from bsgap_kernels.lab.fitted import BUDGET, UntilFitted
from bsgap_kernels.lab.progress import Progress
from bsgap_kernels.lab.results import Writer
from bsgap_kernels.lab.setup import Setup
from bsgap_kernels.lab.stop import Stop, StoppedError
from bsgap_kernels.tracking import SiteRecord

_EVALUATION_ROWS = 1000


class Loop:
    """A run under way: `done` updates made, and what it adds up for the summary.

    Everything that later steps and the summary depend on is in `state_dict`. Rows of step s (reads before
    update s, the update's own, an evaluation after s updates) are all written while `done` is s: a checkpoint
    at `done` and the rows below it are the whole run until then.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        config = setup.config
        apart = setup.method.apart
        self.model = setup.model if apart else setup.ranks.parallel(setup.model, setup.device)
        self.gradients = Gradients(
            self.model,
            setup.ranks,
            apart=apart,
            precision=config.precision,
            micro_batch=config.micro_batch,
            unread=setup.tracker.paused,
        )
        self.done = 0
        self.ended: str | None = None
        """Why the run is at its end: fitted, stalled or budget; None before."""
        self.until_fitted = UntilFitted(config.until_fitted, config.patience)
        self.probes = 0
        self._before = self.until_fitted.state_dict(), self.probes
        self.seconds = {"step": 0.0, "metric": 0.0, "probe": 0.0}
        self.evaluation: dict[str, float] = {}
        self.reached: dict[str, dict[str, float]] = {}
        self.batch_shapes: dict[str, list[int]] = {}
        self.probe_records: dict[str, SiteRecord] = {}
        self._shuffle = torch.Generator().manual_seed(config.seed)
        self._order = torch.empty(0, dtype=torch.int64)
        self._undrawn = self._shuffle.get_state()
        self._images_before = 0
        self._stopping = False

    def run(self, writer: Writer, progress: Progress, stop: Stop, save: Callable[[], None]) -> bool:
        """Train to the end, or until asked to stop; returns whether the end was reached.

        `save` is called between steps, before anything of the coming one; it decides whether to save.
        """
        setup = self.setup
        self.gradients.stop = stop
        setup.model.train()
        # Where no training batch is read, none pays for hooks either.
        with setup.probe_tracker.detached(), setup.tracker.detached(setup.config.every is None):
            while True:
                save()
                if self._stopping:
                    return False
                self._before = self.until_fitted.state_dict(), self.probes
                if self.done and self._evaluation_due():
                    self._evaluate(writer)
                if self.ended or setup.probe_due(self.done):
                    self._read_probe(writer)
                if self.ended:
                    return True
                try:
                    loss, accuracy = self._update(writer)
                except StoppedError:
                    self._leave_update()
                    continue
                self.done += 1
                progress.update(self.done, loss, accuracy, _mean_ratio(self.probe_records))

    @property
    def stopping(self) -> bool:
        """Whether the run was asked to stop; alike on all ranks."""
        return self._stopping

    def _evaluation_due(self) -> bool:
        return self.done % self.setup.evaluate_every == 0 or self.done == self.setup.steps

    def _rows(self) -> Tensor:
        """Images of the batch of this step, of all ranks; a new permutation begins with every epoch."""
        setup = self.setup
        position = self.done % setup.steps_per_epoch
        if position == 0:
            self._undrawn = self._shuffle.get_state()
            self._order = torch.randperm(len(setup.data.train_labels), generator=self._shuffle)
        return self._part(self._order, position)

    def _rows_of(self, step: int) -> Tensor:
        """Images of the batch of this step, whose own are drawn, or of a later one; nothing is drawn."""
        setup = self.setup
        order, shuffle = self._order, torch.Generator()
        shuffle.set_state(self._shuffle.get_state())
        for _ in range(step // setup.steps_per_epoch - self.done // setup.steps_per_epoch):
            order = torch.randperm(len(setup.data.train_labels), generator=shuffle)
        return self._part(order, step % setup.steps_per_epoch)

    def _part(self, order: Tensor, position: int) -> Tensor:
        setup = self.setup
        rows = order[position * setup.batch_size : (position + 1) * setup.batch_size]
        return rows.sort().values if setup.method.ordered else rows

    def _update(self, writer: Writer) -> tuple[float, float]:
        """One update; the metric's share of the time is taken out of the step's."""
        setup, step = self.setup, self.done
        tracker = setup.tracker
        rows = self._rows()
        self._images_before = self.gradients.images
        started = time.perf_counter()
        batch = self._batch(rows)
        due = setup.batch_due(step)
        with tracker.paused(not due):
            values = setup.method.update(batch)
            loss, right, *asked = _numbers((*values, *self.gradients.asked))
            accuracy = right / len(rows)
            self._stopping = bool(asked[0] if asked else self.gradients.stop)
            trained = time.perf_counter()
            records = tracker.collect() if due else {}
        writer.add_records(step, "batch", records, certified=setup.config.certify)
        in_hooks = sum(record.seconds for record in records.values())
        metric = time.perf_counter() - trained + in_hooks
        update = trained - started - in_hooks
        self.batch_shapes.update({site: list(record.shape) for site, record in records.items()})
        self.seconds["step"] += update
        self.seconds["metric"] += metric
        writer.add(step, "", "train.loss", loss)
        writer.add(step, "", "train.accuracy", accuracy)
        writer.add(step, "", "lr", setup.method.lr)
        for name, value in setup.method.log().items():
            writer.add(step, "", f"method.{name}", value)
        writer.add(step, "", "time.step_ms", round(update * 1e3, 4))
        if records:
            writer.add(step, "", "time.metric_ms", round(metric * 1e3, 4))
        return loss, accuracy

    def _leave_update(self) -> None:
        """An update was left because the run was asked to stop: it will be made again, from its beginning."""
        self._stopping = True
        state, self.probes = self._before  # this step's evaluation and probe will be made again too
        self.until_fitted.load_state_dict(state)
        self.gradients.images = self._images_before
        if self.done % self.setup.steps_per_epoch == 0:
            self._shuffle.set_state(self._undrawn)

    def _batch(self, rows: Tensor) -> Batch:
        """What the method is given of these images."""
        setup, step = self.setup, self.done

        def later(steps: int) -> Read | None:
            if step + steps >= setup.steps:
                return None
            return self._read(step + steps, self._rows_of(step + steps))

        read = self._read(step, rows)
        return Batch(step, slice(0, len(rows)), read, self.gradients, setup.parts, later)

    def _read(self, step: int, rows: Tensor) -> Read:
        """What reads these images as the batch of a step."""
        setup = self.setup
        augmentation = setup.augmentation(step)
        on_device = rows.to(setup.device)

        def read(part: slice) -> tuple[Tensor, Tensor]:
            return setup.data.train(on_device[part], augmentation, part)

        return read

    def _read_probe(self, writer: Writer) -> None:
        """Read every site on the probe batch, leaving buffers, mode and random state of the run untouched."""
        model, tracker, probe = self.setup.model, self.setup.probe_tracker, self.setup.probe
        started = time.perf_counter()
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
        writer.add_records(self.done, "probe", self.probe_records, certified=True)
        seconds = time.perf_counter() - started
        self.probes += 1
        self.seconds["probe"] += seconds
        writer.add(self.done, "", "time.probe_ms", round(seconds * 1e3, 4))

    def _evaluate(self, writer: Writer) -> None:
        """Loss and accuracy on both whole sets, which accuracies are reached, and whether the run ends."""
        data = self.setup.data
        for split, rows, count in (
            ("train_eval", data.train, len(data.train_labels)),
            ("test", data.test, len(data.test_labels)),
        ):
            loss, accuracy = evaluate(self.setup, rows, count)
            for name, value in (("loss", loss), ("accuracy", accuracy)):
                self.evaluation[f"{split}.{name}"] = value
                writer.add(self.done, "", f"{split}.{name}", value)
        writer.add(self.done, "", "time.train_s", round(self.seconds["step"], 4))
        for target in self.setup.config.target_accuracies:
            if self.evaluation["test.accuracy"] >= target and f"{target:g}" not in self.reached:
                self.reached[f"{target:g}"] = {
                    "seconds": self.seconds["step"],
                    "steps": self.done,
                    "epochs": self.done / self.setup.steps_per_epoch,
                }
        self.ended = self.until_fitted.after(
            self.evaluation["train_eval.loss"], self.evaluation["train_eval.accuracy"]
        )
        if self.done == self.setup.steps:
            self.ended = self.ended or BUDGET

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run needs to go on as if it had not stopped: tensors, numbers and texts."""
        cuda = self.setup.device.type == "cuda"
        return {
            "done": self.done,
            "model": self.setup.model.state_dict(),
            "method": self.setup.method.state_dict(),
            "tracker": self.setup.tracker.state_dict(),
            "shuffle": self._shuffle.get_state(),
            "order": self._order,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.setup.device) if cuda else None,
            "gradient_images": self.gradients.images,
            "seconds": self.seconds,
            "probes": self.probes,
            "until_fitted": self.until_fitted.state_dict(),
            "evaluation": self.evaluation,
            "reached": self.reached,
            "batch_shapes": self.batch_shapes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a state of the same run; torch's global random state is set too."""
        self.done = int(state["done"])
        self.setup.model.load_state_dict(state["model"])
        self.setup.method.load_state_dict(state["method"])
        self.setup.tracker.load_state_dict(state["tracker"])
        self._shuffle.set_state(state["shuffle"])
        self._order = state["order"]
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None and self.setup.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"], self.setup.device)
        self.gradients.images = int(state["gradient_images"])
        self.seconds = dict(state["seconds"])
        self.probes = int(state["probes"])
        self.until_fitted.load_state_dict(state["until_fitted"])
        self.evaluation = dict(state["evaluation"])
        self.reached = dict(state["reached"])
        self.batch_shapes = dict(state["batch_shapes"])


def evaluate(setup: Setup, read: Callable[[slice], tuple[Tensor, Tensor]], count: int) -> tuple[float, float]:
    """Mean loss and accuracy over a whole set, in eval mode, each rank its share; nothing is recorded.

    `read` gives images and labels of rows, of which there are `count`. Float32 whatever the run's precision.
    """
    model, ranks = setup.model, setup.ranks
    training = model.training
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=setup.device)
    with torch.no_grad(), setup.tracker.paused():
        share = ranks.share(count)
        for start in range(share.start, share.stop, _EVALUATION_ROWS):
            images, labels = read(slice(start, min(start + _EVALUATION_ROWS, share.stop)))
            logits = model(images)
            totals[0] += nn.functional.cross_entropy(logits, labels, reduction="sum")
            totals[1] += (logits.argmax(1) == labels).sum()
    model.train(training)
    loss, correct = (ranks.total(totals) / count).tolist()
    return loss, correct


def _numbers(values: tuple[Tensor, ...]) -> list[float]:
    """Values as numbers: joined where they are read from a device, so that it is waited for once.

    On a CPU one by one: in a small step the operations that would join them show.
    """
    if values[0].is_cuda:
        return torch.stack([value.double() for value in values]).tolist()
    return [value.item() for value in values]


def _mean_ratio(records: dict[str, SiteRecord]) -> float:
    ratios = [record.ratio for record in records.values()]
    return sum(ratios) / len(ratios) if ratios else math.nan
