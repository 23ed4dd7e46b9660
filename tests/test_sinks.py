"""Sinks: what each library reads back, resuming without loss or repetition, and what a missing one says."""

from __future__ import annotations

import errno
import json
import math
import os
import posixpath
import re
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bsgap_kernels.ops import SUMMARY_COLUMNS
from bsgap_kernels.tracking.rows import Row
from bsgap_kernels.tracking.sinks import (
    JsonlSink,
    MlflowSink,
    ParquetSink,
    TensorBoardSink,
    WandbSink,
    jsonl,
    open_sinks,
)
from bsgap_kernels.tracking.sinks.services import mlflow_name

SITES = ("relu1#0", "layers.2.8.act2#0")


def rows_of(steps: range, scale: float = 1.0) -> list[Row]:
    return [Row(step, site, "probe.ratio", scale * step / 7) for step in steps for site in SITES]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(sink: Any, rows: list[Row]) -> None:
    sink.write(rows)
    sink.close()


# JSON lines


def test_a_line_has_the_value_exactly_and_the_note_where_there_is_one(tmp_path: Path) -> None:
    values = [7, 0.1, 1e-300, math.nan, -math.inf, True, np.float64(0.25), np.int64(3)]
    rows = [Row(0, "s", "m", value) for value in values]
    write(JsonlSink(tmp_path / "run.jsonl", 'odd "name"'), [*rows, Row(1, "", "m", 0.5, "rows 1/4")])
    found = read_jsonl(tmp_path / "run.jsonl")
    assert [row["value"] for row in found] == [7, 0.1, 1e-300, None, None, 1, 0.25, 3, 0.5]
    assert "note" not in found[0]
    assert list(found[-1].items()) == [
        ("run", 'odd "name"'), ("attempt", 0), ("step", 1), ("site", ""), ("metric", "m"), ("value", 0.5),
        ("note", "rows 1/4"),
    ]  # fmt: skip


def test_a_value_takes_less_than_150_bytes(tmp_path: Path) -> None:
    names = ("near_rank", "ratio", "lower", "upper", *SUMMARY_COLUMNS)
    rows = [
        Row(99_999, "layers.2.8.act2#0", f"batch.{name}", 64 if number in (0, 2, 3) else 0.12345678901234568)
        for number, name in enumerate(names)
    ]
    write(JsonlSink(tmp_path / "run.jsonl", "resnet56-b1024-s0"), rows)
    assert (tmp_path / "run.jsonl").stat().st_size / len(rows) < 150


def test_a_first_attempt_spares_a_file_with_rows(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    write(JsonlSink(path), rows_of(range(2)))
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="already holds rows; name another file, or give attempt=1"):
        JsonlSink(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("first_step", [4, None])
def test_a_resumed_run_has_every_step_once(tmp_path: Path, first_step: int | None) -> None:
    path = tmp_path / "run.jsonl"
    write(JsonlSink(path, "a"), rows_of(range(7)))
    write(JsonlSink(path, "b", attempt=1), rows_of(range(9)))
    with path.open("ab") as file:
        file.write(b'{"run": "a", "attem')
    write(JsonlSink(path, "a", attempt=1, first_step=first_step), rows_of(range(4, 10), scale=2))

    found = read_jsonl(path)
    mine = [row for row in found if row["run"] == "a"]
    assert [row["value"] for row in mine if row["metric"] == "resume.rows_cut"] == [7]
    values = [(row["step"], row["site"], row["value"]) for row in mine if row["metric"] == "probe.ratio"]
    expected = [*rows_of(range(4)), *rows_of(range(4, 10), scale=2)]
    assert values == [(row.step, row.site, row.value) for row in expected]
    assert len([row for row in found if row["run"] == "b"]) == 18
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.jsonl"]


def test_the_report_reads_a_resumed_file(tmp_path: Path) -> None:
    pytest.importorskip("bokeh", reason="bokeh, of the lab extra, is not installed")
    from bsgap_kernels.lab.report.rows import read_rows

    path = tmp_path / "run.jsonl"
    write(JsonlSink(path), rows_of(range(7)))
    write(JsonlSink(path, attempt=1, first_step=4), rows_of(range(4, 10), scale=2))
    problems: list[str] = []
    series = read_rows(path, problems).series["relu1#0", "probe.ratio"]
    assert series == {step: (1 if step < 4 else 2) * step / 7 for step in range(10)}
    assert not problems


def test_a_run_resumed_twice_has_every_step_once(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    for attempt in range(3):
        write(JsonlSink(path, attempt=attempt, first_step=2 * attempt), rows_of(range(2 * attempt, 8)))
    found = [row for row in read_jsonl(path) if row["metric"] == "probe.ratio"]
    assert [row["step"] for row in found] == [step for step in range(8) for _ in SITES]
    assert [row["attempt"] for row in found] == [0] * 4 + [1] * 4 + [2] * 8


def test_resuming_where_nothing_is_to_be_cut_appends(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    write(JsonlSink(path), rows_of(range(4)))
    before, inode = path.read_bytes(), path.stat().st_ino
    write(JsonlSink(path, attempt=1, first_step=4), rows_of(range(4, 5)))
    assert path.read_bytes().startswith(before)
    assert path.stat().st_ino == inode
    assert len(read_jsonl(path)) == 10


def test_resuming_a_file_that_is_gone_starts_one(tmp_path: Path) -> None:
    write(JsonlSink(tmp_path / "runs" / "run.jsonl", attempt=3, first_step=4), rows_of(range(4, 5)))
    assert len(read_jsonl(tmp_path / "runs" / "run.jsonl")) == 2


class FullDisk:
    """Takes `space` bytes, and raises until there is more space."""

    def __init__(self, file: Any, space: int) -> None:
        self.file, self.space = file, space

    def write(self, data: bytearray) -> int:
        if self.space == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = self.file.write(bytes(data[: self.space]))
        self.space -= taken
        return taken

    def close(self) -> None:
        self.file.close()


def test_rows_outlive_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = JsonlSink(tmp_path / "run.jsonl")
    sink._file = disk = FullDisk(sink._file, space=130)
    for step in range(5):
        sink.write(rows_of(range(step, step + 1)))
        with pytest.raises(OSError, match="No space"):
            sink.flush()
    disk.space = 10**6
    monkeypatch.setattr(jsonl, "_MAX_PENDING_BYTES", 100)
    sink.write(rows_of(range(5, 6)))
    assert sink.lost == 2
    sink.close()
    assert [row["step"] for row in read_jsonl(sink.path)] == [step for step in range(5) for _ in SITES]


# Parquet


def test_parquet_reads_back_in_bounded_row_groups(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    sink = ParquetSink(tmp_path / "run.parquet", "r", row_group_rows=8)
    sink.write(rows_of(range(10)))
    write(sink, [Row(10, "", "loss", math.nan, "a note"), Row(11, "", "loss", 1)])
    file = parquet.ParquetFile(sink.path)
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    assert sizes == [8, 8, 6]
    table = file.read().to_pylist()
    assert [Row(r["step"], r["site"], r["metric"], r["value"]) for r in table[:-2]] == rows_of(range(10))
    assert {(r["run"], r["attempt"]) for r in table} == {("r", 0)}
    assert math.isnan(table[-2]["value"])
    assert [r["note"] for r in table[-3:]] == ["", "a note", ""]
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.parquet"]


@pytest.mark.parametrize("first_step", [4, None])
def test_parquet_resumes_with_every_step_once(tmp_path: Path, first_step: int | None) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    path = tmp_path / "run.parquet"
    write(ParquetSink(path, row_group_rows=5), rows_of(range(7)))
    write(ParquetSink(path, "b", attempt=1, row_group_rows=5), rows_of(range(3, 6)))
    # A killed attempt leaves a file without an end; what it was to replace is whole.
    killed = ParquetSink(path, attempt=1, first_step=4, row_group_rows=1)
    killed.write(rows_of(range(4, 9)))
    killed._file._file.close()  # as the system does for a process that is gone
    assert parquet.read_table(path).num_rows == 20
    write(ParquetSink(path, attempt=2, first_step=first_step), rows_of(range(4, 10), scale=2))
    found = parquet.read_table(path).to_pylist()
    mine = [(r["step"], r["value"]) for r in found if r["run"] == "run"]
    expected = [*rows_of(range(4)), *rows_of(range(4, 10), scale=2)]
    assert mine == [(row.step, row.value) for row in expected]
    assert [r["step"] for r in found if r["run"] == "b"] == [3, 3, 4, 4, 5, 5]


def test_parquet_without_rows_makes_no_file(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    ParquetSink(tmp_path / "run.parquet").close()
    assert not list(tmp_path.iterdir())


def test_a_process_with_parquet_open_may_fork(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    sink = ParquetSink(tmp_path / "run.parquet", row_group_rows=1)
    sink.write(rows_of(range(2)))
    child = os.fork()
    if child == 0:
        sink._writer.close()  # what the collector does to it
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    write(sink, rows_of(range(2, 4)))
    assert parquet.read_table(sink.path)["step"].to_pylist() == [0, 0, 1, 1, 2, 2, 3, 3]


# TensorBoard


def tensorboard_scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    module = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    events = module.EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


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


# What is named


@pytest.mark.parametrize(
    ("package", "spec", "extra"),
    [
        ("pyarrow", "run.parquet", "parquet"),
        ("tensorboard", "tensorboard:logs", "tensorboard"),
        ("wandb", "wandb:project", "wandb"),
        ("mlflow", "mlflow:experiment", "mlflow"),
    ],
)
def test_a_missing_library_is_one_sentence(
    package: str, spec: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for module in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError) as caught:
        open_sinks(["run.jsonl", spec])
    assert str(caught.value).endswith(
        f"needs {package}, which is not installed; install it by: pip install 'bsgap_kernels[{extra}]'"
    )
    assert open_sinks("run.jsonl")  # the one opened before left nothing that hinders


def test_sinks_are_opened_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = JsonlSink("given.jsonl")
    first, second = open_sinks([Path("run.jsonl"), given], run="r", attempt=2, first_step=5)
    assert isinstance(first, JsonlSink)
    assert (first.run, first.attempt, first._first_step) == ("r", 2, 5)
    assert second is given
    assert open_sinks([]) == []
    assert open_sinks(given) == [given]
    for wrong in ("run.csv", "wandb:", "wandb", "file:run", ""):
        with pytest.raises(ValueError, match=r"sinks: got .*expected PATH.jsonl, PATH.parquet"):
            open_sinks(wrong)
    with pytest.raises(TypeError, match="sinks: got int, expected"):
        open_sinks([3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="attempt: got -1, expected 0"):
        open_sinks("other.jsonl", attempt=-1)
    with pytest.raises(ValueError, match="first_step: got -1, expected a step"):
        open_sinks("other.jsonl", attempt=1, first_step=-1)


def test_parquet_and_tensorboard_are_opened_by_name(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    sinks = open_sinks([str(tmp_path / "run.parquet"), f"tensorboard:{tmp_path / 'logs'}"], run="r")
    for sink in sinks:
        write(sink, rows_of(range(1)))
    assert (tmp_path / "run.parquet").is_file()
    assert tensorboard_scalars(tmp_path / "logs" / "r")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_one_writer_a_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"run.{suffix}"
    (first,) = open_sinks(path, run="a")
    first.write([Row(0, "relu#0", "train.ratio", 0.5)])
    for attempt in (0, 1):
        with pytest.raises(
            (BlockingIOError, FileExistsError), match=r"is being written to|already holds rows"
        ):
            open_sinks(path, run="a", attempt=attempt, first_step=None if attempt == 0 else 0)
    first.close()
    assert path.stat().st_size > 0
    (later,) = open_sinks(path, run="a", attempt=1, first_step=1)
    later.write([Row(1, "relu#0", "train.ratio", 0.25)])
    later.close()
    if suffix == "jsonl":
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1]


@pytest.mark.parametrize(
    "uri", ["gs://b/run.jsonl", "s3://b/run.parquet", "file:run.jsonl", "file:///run.jsonl"]
)
def test_uris_are_no_folders(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="got the URI"):
        open_sinks(uri)
    assert list(tmp_path.iterdir()) == []


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for sink in open_sinks(["~/run.jsonl", "~/run.parquet"]):
        sink.close()
    assert (tmp_path / "run.jsonl").exists()


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
