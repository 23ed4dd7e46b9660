"""Parquet, for pandas, Polars, DuckDB and the like."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bsgap_kernels.tracking.rows import Row, check_attempt
from bsgap_kernels.tracking.sinks._files import local_path, lock
from bsgap_kernels.tracking.sinks._optional import require
from bsgap_kernels.tracking.sinks.jsonl import refuse_existing


class ParquetSink:
    """Write rows to a Parquet file of columns run, attempt, step, site, metric, value, note.

    Non-finite values stay what they are. Rows are held until a row group is full. A Parquet file has no end
    before `close` writes it: until then rows go to `<path>.part`, which then becomes `path`, so that `path`
    is readable at all times; without a row no file is made. A process that is killed leaves the rows of its
    attempt in the JSONL file only.

    A later attempt starts from the rows of `path` without those of this run at steps >= first_step (None: the
    step of the first row written).

    Args:
        path: the file.
        run: name of the run, in every row.
        attempt: 0, and one more each time the run is resumed.
        first_step: the first step that a resumed run does again.
        row_group_rows: rows of a row group, and held in memory, at most.

    Raises:
        ImportError: pyarrow is not installed.
        FileExistsError: attempt 0, and the file holds something.
        ValueError: a negative attempt or first_step, a URI for a path, or row groups of less than one row.
        BlockingIOError: another sink, of any process, writes to the file.
    """

    def __init__(
        self,
        path: str | Path,
        run: str = "run",
        *,
        attempt: int = 0,
        first_step: int | None = None,
        row_group_rows: int = 65536,
    ) -> None:
        self._arrow = require("pyarrow", type(self).__name__, "parquet")
        self._parquet = require("pyarrow.parquet", type(self).__name__, "parquet")
        self._compute = require("pyarrow.compute", type(self).__name__, "parquet")
        check_attempt(attempt, first_step)
        if row_group_rows < 1:
            raise ValueError(f"row_group_rows: got {row_group_rows!r}, expected at least 1")
        self.path = local_path(path)
        self.run = run
        self.attempt = attempt
        self._row_group_rows = row_group_rows
        self._rows: list[Row] = []
        self._written = False
        self._closed = False
        refuse_existing(self.path, attempt)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._part = self.path.with_name(self.path.name + ".part")
        arrow = self._arrow
        self._schema = arrow.schema(
            [
                ("run", arrow.string()),
                ("attempt", arrow.int32()),
                ("step", arrow.int64()),
                ("site", arrow.string()),
                ("metric", arrow.string()),
                ("value", arrow.float64()),
                ("note", arrow.string()),
            ]
        )
        self._file = _OwnFile(self._part)
        self._writer: Any = self._parquet.ParquetWriter(self._file, self._schema)
        self._resumed = attempt == 0
        if first_step is not None:
            self._resume(first_step)

    def write(self, rows: Sequence[Row], /) -> None:
        """Hold rows, and write every full row group."""
        if not rows:
            return
        if not self._resumed:
            self._resume(rows[0].step)
        self._rows.extend(rows)
        while len(self._rows) >= self._row_group_rows:
            self._write_group()

    def flush(self) -> None:
        """Do nothing: short row groups would make the file slow, and it is unreadable before `close`."""

    def close(self) -> None:
        """Write what is held and the end of the file, and give it its name."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._rows:
                self._write_group()
        finally:
            # Also where a group could not be written: those before it stay readable.
            self._writer.close()
            self._file.close()
            if self._written:
                self._part.replace(self.path)
            else:
                self._part.unlink()

    def _write_group(self) -> None:
        self._written = True
        rows, self._rows = self._rows[: self._row_group_rows], self._rows[self._row_group_rows :]
        steps, sites, metrics, values, notes = zip(*rows, strict=True)
        columns = ([self.run] * len(rows), [self.attempt] * len(rows), steps, sites, metrics, values, notes)
        arrays = [
            self._arrow.array(column, type=field.type)
            for column, field in zip(columns, self._schema, strict=True)
        ]
        self._writer.write_table(
            self._arrow.Table.from_arrays(arrays, schema=self._schema), row_group_size=self._row_group_rows
        )

    def _resume(self, first_step: int) -> None:
        """Copy the rows of the file so far, of this run only those before first_step."""
        self._resumed = True
        if self.attempt == 0 or not self.path.exists():
            return
        compute = self._compute
        with self._parquet.ParquetFile(self.path) as earlier:
            for group in range(earlier.num_row_groups):
                table = earlier.read_row_group(group).cast(self._schema)
                before = compute.less(table["step"], first_step)
                table = table.filter(compute.or_(compute.not_equal(table["run"], self.run), before))
                if table.num_rows:
                    self._writer.write_table(table, row_group_size=self._row_group_rows)


class _OwnFile(io.RawIOBase):
    """A file that only the process that opened it writes to.

    A forked process that ends collects its copy of the Parquet writer, which then writes an end of file.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        try:
            lock(self._file, path)
        except BlockingIOError:
            self._file.close()
            raise
        self._file.truncate(0)  # what an earlier process left
        self._process = os.getpid()

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        if os.getpid() != self._process:
            return memoryview(data).nbytes
        written = 0
        view = memoryview(data).cast("B")
        while written < len(view):
            written += self._file.write(view[written:]) or 0
        return written

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()
