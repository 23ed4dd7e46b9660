"""The adapters' package where the libraries are missing."""

from __future__ import annotations

import importlib
import sys

import pytest

from bsgap_kernels import tracking
from bsgap_kernels.tracking import adapters

LIBRARIES = ("lightning", "pytorch_lightning", "transformers", "torchmetrics")


@pytest.fixture
def without_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no library were installed and nothing of the package imported."""
    for name in list(sys.modules):
        if name.split(".")[0] in LIBRARIES or name.startswith(adapters.__name__):
            monkeypatch.delitem(sys.modules, name)
    for name in LIBRARIES:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(tracking, "adapters", adapters)  # put back when the test has imported another


@pytest.mark.usefixtures("without_libraries")
@pytest.mark.parametrize("name", ["lightning", "transformers", "torchmetrics"])
def test_a_missing_library_is_one_sentence(name: str) -> None:
    package = importlib.import_module(adapters.__name__)
    assert package is not adapters
    assert name in dir(package)
    message = rf"^this adapter needs {name}: pip install 'bsgap_kernels\[{name}\]'$"
    for _ in range(2):
        with pytest.raises(ImportError, match=message):
            getattr(package, name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'keras'"):
        _ = adapters.keras
