"""Image data as two tensors a split: digits, torchvision's sets from their files, a procedural set."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bsgap_kernels.lab.checks import UserError
from bsgap_kernels.lab.data.digits import load_digits
from bsgap_kernels.lab.data.files import load_files
from bsgap_kernels.lab.data.images import ImageData
from bsgap_kernels.lab.data.procedural import load_procedural
from bsgap_kernels.lab.data_options import DATASETS, ProceduralOptions

__all__ = ["ImageData", "ProceduralOptions", "load_data"]


def load_data(
    name: str,
    data_root: str | os.PathLike[str] | None = None,
    *,
    download: bool = False,
    options: ProceduralOptions | Mapping[str, Any] | None = None,
) -> ImageData:
    """Load a data set by its name, one of `bsgap_kernels.lab.data_options.DATASETS`.

    `digits` comes with scikit-learn, `procedural` is drawn here from `options`, and the rest are files of
    torchvision's under `data_root`. Nothing is downloaded unless `download` is set, and then by torchvision.

    Raises:
        UserError: the data root or a file is missing, truncated, foreign or corrupt, or a download failed;
            the message names the path and what to do.
    """
    if name == "digits":
        return load_digits()
    if name == "procedural":
        return load_procedural(ProceduralOptions.of(options))
    if name not in DATASETS:
        raise UserError(f"data: got {name!r}, expected one of {', '.join(DATASETS)}")
    if data_root is None:
        raise UserError(
            f"data_root: got none, expected the directory that holds torchvision's files of {name}"
        )
    return load_files(name, Path(data_root).expanduser(), download=download)
