"""Opening sinks: names, paths, one writer a file, and what a missing library says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from sink_rows import rows_of, tensorboard_scalars, write

from bsgap_kernels.tracking.rows import Row
from bsgap_kernels.tracking.sinks import JsonlSink, open_sinks


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
        with pytest.raises(BlockingIOError, match="is being written to by another sink or process"):
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
