"""Where rows go: JSON lines, Parquet, TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from bsgap_kernels.tracking.rows import Sink
from bsgap_kernels.tracking.sinks.jsonl import JsonlSink
from bsgap_kernels.tracking.sinks.parquet import ParquetSink
from bsgap_kernels.tracking.sinks.services import MlflowSink, WandbSink
from bsgap_kernels.tracking.sinks.tensorboard import TensorBoardSink

__all__ = ["JsonlSink", "MlflowSink", "ParquetSink", "SinkSpec", "TensorBoardSink", "WandbSink", "open_sinks"]

SinkSpec = str | Path | Sink
_BY_SUFFIX: dict[str, Callable[..., Sink]] = {".jsonl": JsonlSink, ".parquet": ParquetSink}
_BY_SCHEME: dict[str, Callable[..., Sink]] = {
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
    "mlflow": MlflowSink,
}
_EXPECTED = "PATH.jsonl, PATH.parquet, 'tensorboard:DIR', 'wandb:PROJECT', 'mlflow:EXPERIMENT' or a Sink"


def open_sinks(
    spec: SinkSpec | Sequence[SinkSpec],
    run: str = "run",
    attempt: int = 0,
    first_step: int | None = None,
) -> list[Sink]:
    """The sinks that `spec` names, opened for one attempt of a run.

        open_sinks(["run.jsonl", "run.parquet", "tensorboard:logs", "wandb:my-project"], run="b256-s0")

    Args:
        spec: paths and names as above, and sinks, which are given back as they are; one or several.
        run: name of the run.
        attempt: 0, and one more each time the run is resumed.
        first_step: the first step that a resumed run does again; see `JsonlSink`.

    Raises:
        ValueError, TypeError: what `spec` holds is none of these.
        ImportError, FileExistsError, OSError: from the sinks. Those opened before are closed.
    """
    specs = [spec] if isinstance(spec, (str, Path, Sink)) else list(spec)
    sinks: list[Sink] = []
    mine: list[Sink] = []
    try:
        for item in specs:
            if isinstance(item, (str, Path)):
                sink = _open(item, run, attempt, first_step)
                mine.append(sink)
            elif isinstance(item, Sink):
                sink = item
            else:
                raise TypeError(f"sinks: got {type(item).__name__}, expected {_EXPECTED}")
            sinks.append(sink)
    except BaseException:
        for sink in mine:
            sink.close()
        raise
    return sinks


def _open(item: str | Path, run: str, attempt: int, first_step: int | None) -> Sink:
    by_suffix = _BY_SUFFIX.get(Path(item).suffix)
    if by_suffix is not None:
        return by_suffix(item, run, attempt=attempt, first_step=first_step)
    scheme, _, name = str(item).partition(":")
    by_scheme = _BY_SCHEME.get(scheme)
    if by_scheme is None or not name:
        raise ValueError(f"sinks: got {str(item)!r}, expected {_EXPECTED}")
    return by_scheme(name, run, attempt=attempt, first_step=first_step)
