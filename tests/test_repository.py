"""What the repository says of itself: paths that its pages name, the Makefile, the requirements."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    page for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")) if page.is_file()
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_named_in_a_page_exist(page: Path) -> None:
    folders = "bsgap_kernels|csrc|tests|tools|benchmarks|docs|\\.ci"
    named = set(re.findall(rf"[`(]((?:{folders})/[\w./-]*)[`)]", page.read_text(encoding="utf-8")))
    assert not [path for path in sorted(named) if not (ROOT / path).exists()]


def test_the_walk_from_the_op_to_the_kernel_names_functions() -> None:
    walk = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8").split("<!-- walk:")[1]
    rows = re.findall(r"^\| [\w, ]+ \| `(\S+)` \| (.*) \|$", walk, re.MULTILINE)
    assert len(rows) >= 8
    for file, functions in rows:
        code = (ROOT / file).read_text(encoding="utf-8")
        for function in re.findall(r"`(\w+)`", functions):
            assert re.search(rf"^(?: *def|[\w:<>, ]+) {function}\(", code, re.MULTILINE), (file, function)


def test_contributing_names_paths() -> None:
    # Else the test above could pass by finding nothing.
    assert "`bsgap_kernels/reference.py`" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_prints_its_targets() -> None:
    shown = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for target in ("demo", "picture", "test", "test-all", "lint", "bench", "clean"):
        assert re.search(rf"^  make {target} +\w", shown, re.MULTILINE), shown


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_names_a_python_that_it_cannot_use(tmp_path: Path) -> None:
    command = ["make", "lint", "PYTHON=no-such-python", f"VENV={tmp_path / 'venv'}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "needs Python 3.10 or later, and 'no-such-python' is none" in result.stdout
    assert not (tmp_path / "venv").exists()


def test_requirements_hold_every_group_and_what_is_asked_for() -> None:
    command = [
        sys.executable,
        ROOT / "tools" / "requirements.py",
        "torch==2.11.0 torchvision==0.26.0",
        "numpy<2.4",
    ]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    names = {re.split(r"[\[<>=~ ]", line)[0] for line in lines}
    assert {"setuptools", "pybind11", "torch", "numpy", "torchvision", "pytest", "ruff", "mypy"} <= names
    assert not {"wandb", "mlflow"} & names
    assert lines[-3:] == ["torch==2.11.0", "torchvision==0.26.0", "numpy<2.4"]
