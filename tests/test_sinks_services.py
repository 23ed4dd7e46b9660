"""Sinks of TensorBoard, Weights & Biases and MLflow: what each library reads back."""

from __future__ import annotations

import json
import math
import posixpath
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sink_rows import SITES, rows_of, tensorboard_scalars, write

from bsgap_kernels.tracking.rows import Row
from bsgap_kernels.tracking.sinks import MlflowSink, TensorBoardSink, WandbSink
from bsgap_kernels.tracking.sinks.services import mlflow_name

# TensorBoard


def test_tensorboard_reads_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    sink = TensorBoardSink(tmp_path, "r")
    sink.write([*rows_of(range(3)), Row(3, "", "loss", math.nan)])
    sink.flush()
    sink.close()
    found = tensorboard_scalars(tmp_path / "r")
    assert sorted(found) == ["loss", *(f"probe.ratio/{site}" for site in sorted(SITES))]
    for site in SITES:
        assert found[f"probe.ratio/{site}"] == [(step, float(np.float32(step / 7))) for step in range(3)]
    assert found["loss"][0][0] == 3
    assert math.isnan(found["loss"][0][1])


@pytest.mark.parametrize("first_step", [4, None])
def test_tensorboard_resumes_with_every_step_once(tmp_path: Path, first_step: int | None) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    write(TensorBoardSink(tmp_path), rows_of(range(7)))
    write(TensorBoardSink(tmp_path, attempt=1, first_step=first_step), rows_of(range(4, 9), scale=2))
    found = tensorboard_scalars(tmp_path / "run")["probe.ratio/relu1#0"]
    assert [step for step, _ in found] == list(range(9))
    assert found[4][1] == pytest.approx(8 / 7, rel=1e-6)


# Weights & Biases, offline


@pytest.fixture
def wandb_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], dict[str, list[dict[str, Any]]]]]:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))

    def read() -> dict[str, list[dict[str, Any]]]:
        runs: dict[str, list[dict[str, Any]]] = {}
        for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
            records = list(wandb_records(path.read_bytes()))
            name = next(r.run.display_name for r in records if r.WhichOneof("record_type") == "run")
            runs[name] = [
                {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                    for item in r.history.item
                }
                for r in records
                if r.WhichOneof("record_type") == "history"
            ]
        return runs

    yield read
    wandb.teardown()  # its process keeps the folder of its first run


def wandb_records(data: bytes) -> Iterator[Any]:
    """Records of an offline run: after a head of 7 bytes, blocks of 32 KiB as in LevelDB's log."""
    from wandb.proto.wandb_internal_pb2 import Record

    at, record = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b""


def test_wandb_reads_back_one_run_an_attempt(wandb_history: Callable[[], Any]) -> None:
    import wandb

    for attempt in range(2):
        write(
            WandbSink("project", "r", attempt=attempt), [*rows_of(range(3, 5)), Row(5, "", "loss", math.nan)]
        )
        assert wandb.run is None
    runs = wandb_history()
    assert sorted(runs) == ["r", "r attempt 1"]
    for history in runs.values():
        assert [entry["_step"] for entry in history] == [3, 4, 5]
        for site in SITES:
            assert [entry.get(f"probe.ratio/{site}") for entry in history] == [3 / 7, 4 / 7, None]
        assert math.isnan(history[2]["loss"])


def test_wandb_leaves_the_users_run_alone(wandb_history: Callable[[], Any]) -> None:
    import wandb

    with wandb.init(project="project", name="theirs") as theirs:
        theirs.log({"loss": 1.0}, step=7)
        write(WandbSink("project", "ours"), rows_of(range(3)))
        assert wandb.run is theirs
        theirs.log({"loss": 2.0}, step=8)
    runs = wandb_history()
    assert [(entry["_step"], entry["loss"]) for entry in runs["theirs"]] == [(7, 1.0), (8, 2.0)]
    assert [entry["_step"] for entry in runs["ours"]] == [0, 1, 2]


def test_wandb_joins_a_run_whose_steps_are_ahead(wandb_history: Callable[[], Any]) -> None:
    import wandb

    with pytest.raises(ValueError, match=r"join: got True and no W&B run is active"):
        WandbSink("project", join=True)
    with wandb.init(project="project", name="theirs") as theirs:
        sink = WandbSink("project", join=True)
        for step in range(5):
            theirs.log({"loss": float(step)})
        write(sink, [*rows_of(range(3)), Row(2, "", "lr", 0.1)])
        theirs.log({"loss": 5.0})
    history = wandb_history()["theirs"]
    assert [entry["loss"] for entry in history if "loss" in entry] == [0, 1, 2, 3, 4, 5]
    assert [
        (entry["bsgap_step"], entry["probe.ratio/relu1#0"]) for entry in history if "bsgap_step" in entry
    ] == [(0, 0), (1, 1 / 7), (2, 2 / 7)]


# MLflow, in SQLite


@pytest.fixture
def mlflow_uri(tmp_path: Path) -> Iterator[str]:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    uri, before = f"sqlite:///{tmp_path / 'mlflow.db'}", mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    yield uri
    mlflow.set_tracking_uri(before)


def test_mlflow_reads_back(mlflow_uri: str) -> None:
    import mlflow

    client = mlflow.MlflowClient(mlflow_uri)
    sinks = [MlflowSink("experiment", "r", attempt=attempt) for attempt in range(2)]
    for sink in sinks:
        sink.write(rows_of(range(600)))  # more than one batch
        write(sink, [Row(600, "a+b", "loss", math.nan), Row(600, "", "lr", 0.5)])
    for attempt, sink in enumerate(sinks):
        for name in ("probe.ratio/relu1:0", "probe.ratio/layers.2.8.act2:0"):
            found = {m.step: m.value for m in client.get_metric_history(sink.run_id, name)}
            assert found == {step: step / 7 for step in range(600)}
        assert math.isnan(client.get_metric_history(sink.run_id, "loss/a_b")[0].value)
        run = client.get_run(sink.run_id)
        assert run.data.metrics["lr"] == 0.5
        assert run.data.tags["bsgap.attempt"] == str(attempt)
        assert (run.info.run_name, run.info.status) == ("r", "FINISHED")


def test_mlflow_joins_the_active_run(mlflow_uri: str) -> None:
    import mlflow

    mlflow.set_experiment("theirs")
    with mlflow.start_run() as active:
        write(MlflowSink("ours"), rows_of(range(2)))
        assert mlflow.active_run().info.run_id == active.info.run_id
        assert mlflow.MlflowClient().get_run(active.info.run_id).info.status == "RUNNING"
    history = mlflow.MlflowClient().get_metric_history(active.info.run_id, "probe.ratio/relu1:0")
    assert [(metric.step, metric.value) for metric in history] == [(0, 0), (1, 1 / 7)]


def test_series_of_mlflow_stay_apart() -> None:
    tags = [
        "train.ratio/relu#0", "train.ratio/a+b", "train.ratio/a_b", "train.ratio/a*b", "x//b", "x/./b",
        "x/_/b", "/x",
        "y" * 300, "y" * 299 + "z",
    ]  # fmt: skip
    names = [mlflow_name(tag) for tag in tags]
    assert names[:1] + names[2:3] == ["train.ratio/relu:0", "train.ratio/a_b"]
    assert len(set(names)) == len(tags)
    for name in names:  # MLflow's own rules
        assert re.fullmatch(r"[\w\-./ :]{1,250}", name, re.ASCII)
        assert posixpath.normpath(name) == name
        assert not name.startswith(("/", ".."))
