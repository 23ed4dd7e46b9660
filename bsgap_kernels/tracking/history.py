"""Read back what a tracker wrote: rows of JSON lines and Parquet files as tidy columns."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bsgap_kernels.tracking.rows import HEADER

SUFFIXES = (".jsonl", ".parquet")
_RUN_METRICS = ("cadence.every", "tracking.overhead", "resume.rows_cut")


class Entry(NamedTuple):
    """One value: the row as it was written, its metric taken apart."""

    run: str
    attempt: int
    step: int
    site: str
    view: str
    metric: str
    rtol: float
    value: float
    note: str


def read(path: str | Path, *, headers: bool = False) -> Any:
    """Return what `RankTracker` wrote to a file, or to all .jsonl and .parquet files of a folder.

    A row is one value: run, attempt, step, site ("" for the whole run), view ("batch", "probe"), metric, rtol
    (NaN for metrics without a threshold, and where the file does not say it), value (NaN where it was not
    finite) and note. `near_rank@0.03` is metric near_rank at rtol 0.03.

    Args:
        path: the file or folder.
        headers: return the facts of each run, view and site instead: m, n, unfold, rtol, atol, center,
            certify, side, dtype, model, versions. Files of earlier versions have none.

    Returns:
        A pandas.DataFrame, or where pandas is not installed a pyarrow.Table.

    Raises:
        FileNotFoundError: there is no such file, or no such file in the folder.
        ValueError: a file that holds other things; the message names file and line.
        ImportError: neither pandas nor pyarrow is installed.

    A last line that a kill left torn is left out. Cost: the whole file in memory.
    """
    entries, found = [], []
    for file in files_of(Path(path).expanduser()):
        rows, about = split(entries_of(file))
        entries += rows
        found += about
    if headers:
        names = dict.fromkeys(name for header in found for name in header)
        return _table({name: [header.get(name) for header in found] for name in names})
    return _table({name: [getattr(entry, name) for entry in entries] for name in Entry._fields})


def files_of(path: Path) -> list[Path]:
    """Return the file, or the .jsonl and .parquet files in the folder by name; not both kinds of one stem."""
    if path.is_dir():
        found = {file.stem: file for file in sorted(path.iterdir(), reverse=True) if file.suffix in SUFFIXES}
        if not found:
            raise FileNotFoundError(f"path: {path} holds no .jsonl and no .parquet file")
        return [found[stem] for stem in sorted(found)]
    if not path.is_file():
        raise FileNotFoundError(f"path: {path} does not exist")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"path: {path} is no file that a tracker writes, expected .jsonl or .parquet")
    return [path]


def split(entries: Iterator[Entry]) -> tuple[list[Entry], list[dict[str, Any]]]:
    """Return the values, with the threshold that their header says, and the headers."""
    values: list[Entry] = []
    headers: dict[tuple[str, str, str], dict[str, Any]] = {}
    for entry in entries:
        key = (entry.run, entry.view, entry.site)
        if entry.metric == HEADER:
            headers[key] = {"run": entry.run, "view": entry.view, "site": entry.site, **_facts(entry.note)}
        else:
            values.append(entry)
    # The first threshold has no suffix in the names of its metrics.
    first: dict[tuple[str, str, str], float] = {}
    for key, header in headers.items():
        rtols = header.get("rtol")
        if isinstance(rtols, list) and rtols and isinstance(rtols[0], (int, float)):
            first[key] = float(rtols[0])
    counted = ("near_rank", "ratio", "lower", "upper", "centred_near_rank", "centred_lower", "centred_upper")
    for place, entry in enumerate(values):
        rtol = first.get((entry.run, entry.view, entry.site))
        if rtol is not None and entry.metric in counted and math.isnan(entry.rtol):
            values[place] = entry._replace(rtol=rtol)
    return values, list(headers.values())


def _facts(note: str) -> dict[str, Any]:
    try:
        found = json.loads(note)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def entries_of(path: Path) -> Iterator[Entry]:
    """Yield the rows of a file in order."""
    rows = _lines(path) if path.suffix == ".jsonl" else _columns(path)
    for run, attempt, step, site, name, value, note in rows:
        view, metric = ("", name) if name in _RUN_METRICS or not site else _parted(name)
        metric, _, rtol = metric.partition("@")
        yield Entry(run, attempt, step, site, view, metric, float(rtol) if rtol else math.nan, value, note)


def _parted(name: str) -> tuple[str, str]:
    head, at, rtol = name.partition("@")
    view, _, metric = head.rpartition(".")
    return view, metric + at + rtol


def _lines(path: Path) -> Iterator[tuple[str, int, int, str, str, float, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                value = math.nan if row["value"] is None else float(row["value"])
                yield (
                    str(row["run"]), int(row["attempt"]), int(row["step"]), str(row["site"]),
                    str(row["metric"]), value, str(row.get("note", "")),
                )  # fmt: skip
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
                if not line.endswith(b"\n"):
                    return
                raise ValueError(f"path: line {number} of {path} is no row of a tracker") from error


def _columns(path: Path) -> Iterator[tuple[str, int, int, str, str, float, str]]:
    if importlib.util.find_spec("pyarrow") is None:
        raise ImportError(f"path: {path} needs pyarrow: pip install 'bsgap_kernels[parquet]'")
    parquet = importlib.import_module("pyarrow.parquet")
    wanted = ("run", "attempt", "step", "site", "metric", "value", "note")
    try:
        table = parquet.read_table(path)
        columns = [table.column(name).to_pylist() for name in wanted]
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"path: {path} is no Parquet file of a tracker") from error
    for run, attempt, step, site, metric, value, note in zip(*columns, strict=True):
        yield run, attempt, step, site, metric, math.nan if value is None else value, note or ""


def _table(columns: dict[str, list[Any]]) -> Any:
    for name, make in (("pandas", "DataFrame"), ("pyarrow", "table")):
        if importlib.util.find_spec(name) is not None:
            return getattr(importlib.import_module(name), make)(columns)
    raise ImportError("read: needs pandas or pyarrow: pip install pandas, or 'bsgap_kernels[parquet]'")
