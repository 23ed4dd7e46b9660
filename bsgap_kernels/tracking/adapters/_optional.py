"""Libraries that an adapter needs and the package does not."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType


def need(extra: str, *names: str) -> ModuleType:
    """The first of the modules `names` that is imported already or can be imported.

    Raises ImportError, one sentence that names the extra to install, if none is installed.
    """
    for name in names:
        loaded = sys.modules.get(name)
        if loaded is not None:
            return loaded
    for name in names:
        try:
            return import_module(name)
        except ModuleNotFoundError as error:
            # Installed but without something it needs itself: its own message says what.
            if not f"{name}.".startswith(f"{error.name}."):
                raise
    package = names[0].split(".")[0]
    raise ImportError(f"this adapter needs {package}: pip install 'bsgap_kernels[{extra}]'")
