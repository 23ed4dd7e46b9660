"""Packages of the extras `lab` and `ray`, imported when needed."""

from __future__ import annotations

import importlib
from typing import Any

from bsgap_kernels.lab.checks import UserError


def require(module: str) -> Any:
    """Import `module`, or say in one sentence what to install.

    Raises:
        UserError: the package is missing, or does not load (torchvision built for another torch dies at
            import with a RuntimeError).
    """
    package = module.split(".")[0]
    extra = package if package == "ray" else "lab"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).split(".")[0]
        if missing == "bsgap_kernels":
            raise
        raise UserError(
            f"{missing} is not installed; install it by: pip install 'bsgap_kernels[{extra}]'"
        ) from error
    except (ImportError, RuntimeError) as error:
        if package == "bsgap_kernels":
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"{package} does not load here ({reason}); install the version that fits this torch"
        ) from error
