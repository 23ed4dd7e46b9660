"""Prints the requirements of the project, to build, run, test and lint it, one a line, from pyproject.toml.

    python tools/requirements.py ["torch==2.11.0 torchvision==0.26.0" ...]

Arguments are more requirements, separated by spaces; pip takes the intersection. Reading the file, rather
than installing `.[lab,test,dev]`, lets the environment be made before the compiled parts can be built.
"""

from __future__ import annotations

import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

LEFT_OUT = ("wandb", "mlflow")
"""Extras that bring dozens of packages for one sink each; tests of these run where they are installed."""


def main() -> None:
    """Prints the build requirements, the dependencies and those of every extra but LEFT_OUT."""
    pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    project = pyproject["project"]
    groups = [pyproject["build-system"]["requires"], project["dependencies"]]
    extras = project["optional-dependencies"]
    groups += [requirements for extra, requirements in extras.items() if extra not in LEFT_OUT]
    groups += [argument.split() for argument in sys.argv[1:]]
    print("\n".join(requirement for group in groups for requirement in group))


if __name__ == "__main__":
    main()
