"""Packages that only one sink needs, imported when that sink is made."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, sink: str, extra: str) -> Any:
    """Import `module` for `sink`.

    Raises:
        ImportError: it is not installed, or does not load; one sentence that names the extra to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).split(".")[0]
        raise ImportError(
            f"{sink} needs {missing}, which is not installed; "
            f"install it by: pip install 'bsgap_kernels[{extra}]'"
        ) from error
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise ImportError(
            f"{sink} needs {module}, which does not load here ({reason}); "
            f"install one that does by: pip install 'bsgap_kernels[{extra}]'"
        ) from error
