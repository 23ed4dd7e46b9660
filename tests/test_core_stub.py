"""The type stub of the compiled module names what the module has, arguments included."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import bsgap_kernels
from bsgap_kernels import _core

STUB = ast.parse((Path(bsgap_kernels.__file__).parent / "_core.pyi").read_text(encoding="utf-8"))
FUNCTIONS = {node.name: node.args for node in STUB.body if isinstance(node, ast.FunctionDef)}


def test_the_stub_names_every_function() -> None:
    assert set(FUNCTIONS) == {name for name, _ in inspect.getmembers(_core, inspect.isroutine)}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_stub_names_every_argument(name: str) -> None:
    # pybind11 writes the signature into the first line of the docstring.
    arguments = getattr(_core, name).__doc__.splitlines()[0].rsplit(" -> ", 1)[0]
    expected = [argument.arg for argument in FUNCTIONS[name].args + FUNCTIONS[name].kwonlyargs]
    assert re.findall(r"(?:\(|, )(\w+): ", arguments) == expected
