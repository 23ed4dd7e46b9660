"""Sinks of files: what each library reads back, and resuming without loss or repetition."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sink_rows import SITES, read_jsonl, rows_of, write

from bsgap_kernels.ops import SUMMARY_COLUMNS
from bsgap_kernels.tracking.rows import Row
from bsgap_kernels.tracking.sinks import JsonlSink, ParquetSink, jsonl

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


@pytest.mark.parametrize(
    ("kept", "first_step", "missing"),
    [
        ([*range(4), *range(9, 12)], 12, "4 to 8"),
        (range(4), 12, "4 to 11"),
        ([*range(0, 30, 10), *range(60, 90, 10)], 90, "21 to 59"),
        (range(12), 12, None),
        (range(0, 100, 10), 95, None),
        ([], 12, None),
    ],
)
def test_a_resumed_run_says_which_rows_are_missing(
    kept: Sequence[int], first_step: int, missing: str | None, tmp_path: Path, caplog: Any
) -> None:
    path = tmp_path / "run.jsonl"
    write(JsonlSink(path), [row for step in kept for row in rows_of(range(step, step + 1))])
    write(JsonlSink(path, attempt=1, first_step=first_step), rows_of(range(first_step, first_step + 1)))
    said = [record.getMessage() for record in caplog.records]
    start = f"{path}: rows of run run are missing before step {first_step}: steps "
    assert said == ([] if missing is None else [start + missing])


def test_a_changed_cadence_is_no_gap(tmp_path: Path, caplog: Any) -> None:
    path = tmp_path / "run.jsonl"
    rows = [*rows_of(range(5)), Row(4, "", "cadence.every", 20), *rows_of(range(24, 45, 20))]
    write(JsonlSink(path), rows)
    write(JsonlSink(path, attempt=1, first_step=64), [])
    assert caplog.records == []


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
