"""What a tracker wrote is read back as columns, with what its numbers depend on."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bsgap_kernels.tracking import RankTracker, history, read

pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'bsgap_kernels[parquet]'")


def written(path: Path, **options: Any) -> RankTracker:
    """A file of three steps of a small network, and a probe at the end."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    with RankTracker(model, sinks=path, verbose=False, run=path.stem, **options) as tracker:
        for rows in (20, 30, 4):
            model(torch.randn(rows, 6))
            tracker.step()
        with tracker.view("probe"):
            model(torch.randn(7, 6))
        tracker.collect("probe")
    return tracker


def rows_of(table: Any) -> list[dict[str, Any]]:
    return table.to_pylist() if hasattr(table, "to_pylist") else table.to_dict("records")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_values_come_back_with_their_threshold(suffix: str, tmp_path: Path) -> None:
    written(tmp_path / f"run.{suffix}", max_overhead=1.0)
    rows = rows_of(read(tmp_path / f"run.{suffix}"))
    assert list(rows[0]) == list(history.Entry._fields)
    counts = [row for row in rows if row["metric"] == "near_rank" and row["view"] == "batch"]
    assert [(row["step"], row["rtol"]) for row in counts] == [
        (step, rtol) for step in range(3) for rtol in (0.1, 0.03, 0.01)
    ]
    assert {row["site"] for row in counts} == {"1#0"}
    assert {row["view"] for row in rows} == {"batch", "probe", ""}
    assert all(math.isnan(row["rtol"]) for row in rows if row["metric"] == "stable_rank")
    shares = [row for row in rows if row["metric"] == "tracking.overhead"]
    assert shares
    assert all(row["value"] > 0 and row["site"] == row["view"] == "" for row in shares)
    assert not any(row["metric"] == "header" for row in rows)


def test_headers_say_what_the_numbers_depend_on(tmp_path: Path) -> None:
    written(tmp_path / "run.jsonl", rtol=0.1, atol=1e-3, certify=True)
    batch, probe = rows_of(read(tmp_path / "run.jsonl", headers=True))
    assert (batch["view"], batch["m"], batch["n"], batch["unfold"]) == ("batch", 20, 5, "flatten")
    assert (batch["rtol"], batch["atol"], batch["center"], batch["certify"]) == ([0.1], 1e-3, False, True)
    assert (batch["side"], batch["dtype"], batch["model"]) == (5, "float32", "Sequential")
    assert batch["torch"] == torch.__version__
    assert (probe["view"], probe["m"]) == ("probe", 7)


def test_a_folder_is_read_whole_and_each_run_once(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl")
    written(tmp_path / "a.parquet")
    written(tmp_path / "b.parquet")
    (tmp_path / "notes.txt").write_text("not read")
    runs = [row["run"] for row in rows_of(read(tmp_path))]
    assert set(runs) == {"a", "b"}
    assert runs.count("a") == runs.count("b")


def test_files_without_headers_and_with_a_torn_end_are_read(tmp_path: Path) -> None:
    line = (
        '{"run": "r", "attempt": 0, "step": 1, "site": "a#0", "metric": "batch.near_rank", "value": null}\n'
    )
    path = tmp_path / "old.jsonl"
    path.write_text(line + '{"run": "r", "att')
    (row,) = rows_of(read(path))
    assert (row["metric"], row["note"]) == ("near_rank", "")
    assert math.isnan(row["value"])
    assert math.isnan(row["rtol"])
    assert len(read(path, headers=True)) == 0


def test_other_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    broken = {
        "list.jsonl": "[1]\n",
        "deep.jsonl": "[" * 100_000 + "\n",
        "huge.jsonl": json.dumps({"run": "", "attempt": 0, "step": 10**400, "site": "", "value": 1}) + "\n",
        "text.parquet": "no table",
    }
    for name, text in broken.items():
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(ValueError, match=name):
            read(path)
    (tmp_path / "x.csv").write_text("")
    with pytest.raises(ValueError, match="expected .jsonl or .parquet"):
        read(tmp_path / "x.csv")
    (tmp_path / "empty").mkdir()
    for missing in (tmp_path / "nothing.jsonl", tmp_path / "empty"):
        with pytest.raises(FileNotFoundError):
            read(missing)


def test_without_pandas_it_is_a_table_of_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "run.jsonl")
    rows = rows_of(read(tmp_path / "run.jsonl"))
    found = history.importlib.util.find_spec
    monkeypatch.setattr(
        history.importlib.util, "find_spec", lambda name: None if name == "pandas" else found(name)
    )
    table = read(tmp_path / "run.jsonl")
    assert type(table).__module__.startswith("pyarrow")
    assert [row["metric"] for row in table.to_pylist()] == [row["metric"] for row in rows]


def test_without_pandas_and_pyarrow_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "run.jsonl")
    monkeypatch.setattr(history.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "pandas", raising=False)
    with pytest.raises(ImportError, match="pip install pandas"):
        read(tmp_path / "run.jsonl")
