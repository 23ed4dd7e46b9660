"""Services that keep experiments: Weights & Biases, MLflow."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Sequence
from itertools import filterfalse, groupby
from operator import attrgetter
from typing import Any

from bsgap_kernels.tracking.rows import Row, check_attempt, is_header
from bsgap_kernels.tracking.sinks._optional import require
from bsgap_kernels.tracking.sinks.tensorboard import tag_of

WANDB_STEP = "bsgap_step"
# MLflow takes no more metrics in one call.
_MLFLOW_BATCH = 1000
MLFLOW_NAME_LENGTH = 250


class WandbSink:
    """Log rows to Weights & Biases as `metric/site`, all of a step in one call.

    Into a run of its own, which leaves `wandb.run` alone, by W&B's step. Since steps only go up in W&B, each
    attempt is one such run, in the group named `run`, and what an earlier attempt logged stays with it.

    With `join`, into the run that is active, which is left open at the end. Our step goes into `bsgap_step`,
    made the x-axis of our metrics, because rows come later than the step they are of and W&B ignores values
    of earlier steps. Each call advances W&B's own step: where the other metrics of that run are logged with
    `step=`, W&B would ignore some of those, so do not join there.

    Args:
        project: W&B project.
        run: name of the run and of its group.
        attempt: 0, and one more each time the run is resumed.
        first_step: not used.
        join: log into the active run.
        options: more arguments for `wandb.init`. WANDB_MODE=offline keeps everything on this machine.

    Raises:
        ImportError: wandb is not installed.
        ValueError: a negative attempt or first_step, or `join` and no run is active.
    """

    def __init__(
        self,
        project: str,
        run: str = "run",
        *,
        attempt: int = 0,
        first_step: int | None = None,
        join: bool = False,
        **options: Any,
    ) -> None:
        wandb = require("wandb", type(self).__name__, "wandb")
        check_attempt(attempt, first_step)
        self._join = join
        self._axes: set[str] = set()
        self._closed = False
        if join:
            if wandb.run is None:
                raise ValueError("join: got True and no W&B run is active, expected wandb.init to come first")
            self._run = wandb.run
            self._run.define_metric(WANDB_STEP, hidden=True)
        else:
            name = f"{run} attempt {attempt}" if attempt else run
            settings = {"name": name, "group": run, "config": {"run": run, "attempt": attempt}}
            self._run = wandb.init(project=project, reinit="create_new", **(settings | options))

    def write(self, rows: Sequence[Row], /) -> None:
        """Log rows, those of one step in one call."""
        for step, group in groupby(filterfalse(is_header, rows), attrgetter("step")):
            of_step = list(group)
            values = {tag_of(row): row.value for row in of_step}
            if self._join:
                self._add_axes(of_step)
                self._run.log(values | {WANDB_STEP: step})
            else:
                self._run.log(values, step=step)

    def flush(self) -> None:
        """Do nothing: W&B's own process has the rows by now."""

    def close(self) -> None:
        """End the run, if it is ours; this waits for W&B to send it."""
        if not self._closed:
            self._closed = True
            if not self._join:
                self._run.finish()

    def _add_axes(self, rows: list[Row]) -> None:
        for row in rows:
            # W&B takes a pattern only with its star at the end.
            series = f"{row.metric}/*" if row.site else row.metric
            if series not in self._axes:
                self._axes.add(series)
                self._run.define_metric(series, step_metric=WANDB_STEP)


def mlflow_name(tag: str) -> str:
    """The name of a series in MLflow: `relu:0` for `relu#0`, otherwise the tag where MLflow takes it.

    MLflow's names have few signs, no empty or dotted parts and at most 250 characters. What has to be changed
    gets a checksum behind it, so that two series stay two.
    """
    wanted = tag.replace("#", ":")
    name = re.sub(r"[^\w\-./ :]", "_", wanted, flags=re.ASCII)
    name = "/".join(part if part.strip(".") else "_" for part in name.split("/"))
    if name == wanted and len(name) <= MLFLOW_NAME_LENGTH:
        return name
    checksum = hashlib.blake2s(tag.encode(), digest_size=4).hexdigest()
    return f"{name[: MLFLOW_NAME_LENGTH - 1 - len(checksum)]}_{checksum}"


class MlflowSink:
    """Log rows to MLflow as `metric/site`, up to 1000 in one call.

    Into the active MLflow run if there is one, which is left open at the end, otherwise into a run of our own
    with the tags `bsgap.run` and `bsgap.attempt`: each attempt is one, and what an earlier one logged stays
    with it. Names: `mlflow_name`.

    Args:
        experiment: name of the experiment, which is made if there is none.
        run: name of the run.
        attempt: 0, and one more each time the run is resumed.
        first_step: not used.
        tracking_uri: where MLflow keeps a run of our own; None for the active run, or for MLflow's own
            default (MLFLOW_TRACKING_URI).

    Raises:
        ImportError: mlflow is not installed.
        ValueError: a negative attempt or first_step.
    """

    def __init__(
        self,
        experiment: str,
        run: str = "run",
        *,
        attempt: int = 0,
        first_step: int | None = None,
        tracking_uri: str | None = None,
    ) -> None:
        mlflow = require("mlflow", type(self).__name__, "mlflow")
        check_attempt(attempt, first_step)
        # The client rather than mlflow.log_metrics: the active run is one of each thread.
        self._client = mlflow.MlflowClient(tracking_uri=tracking_uri)
        self._metric = mlflow.entities.Metric
        self._batch: list[Any] = []
        self._names: dict[str, str] = {}
        self._closed = False
        active = mlflow.active_run() if tracking_uri is None else None
        self._shared = active is not None
        if active is None:
            found = self._client.get_experiment_by_name(experiment)
            identity = found.experiment_id if found else self._client.create_experiment(experiment)
            tags = {"bsgap.run": run, "bsgap.attempt": str(attempt)}
            active = self._client.create_run(identity, run_name=run, tags=tags)
        self.run_id: str = active.info.run_id

    def write(self, rows: Sequence[Row], /) -> None:
        """Hold rows, and log every full batch."""
        now = int(time.time() * 1000)
        for row in filterfalse(is_header, rows):
            tag = tag_of(row)
            name = self._names.get(tag)
            if name is None:
                name = self._names[tag] = mlflow_name(tag)
            self._batch.append(self._metric(name, float(row.value), now, row.step))
        while len(self._batch) >= _MLFLOW_BATCH:
            self._send()

    def flush(self) -> None:
        """Log what is held."""
        while self._batch:
            self._send()

    def close(self) -> None:
        """Log what is held, and end the run if it is ours."""
        if self._closed:
            return
        self._closed = True
        try:
            self.flush()
        finally:
            if not self._shared:
                self._client.set_terminated(self.run_id)

    def _send(self) -> None:
        batch, self._batch = self._batch[:_MLFLOW_BATCH], self._batch[_MLFLOW_BATCH:]
        self._client.log_batch(self.run_id, metrics=batch)
