"""Near-rank in other libraries' training loops: Lightning, the Hugging Face Trainer, torchmetrics.

Each adapter is a submodule that is imported when first named, and its library with it; importing this
package imports neither.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

_ADAPTERS = ("lightning", "torchmetrics", "transformers")


def __getattr__(name: str) -> ModuleType:
    if name in _ADAPTERS:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ADAPTERS})
