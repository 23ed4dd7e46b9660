"""Result files and the values in them, read without trusting either: what is wrong becomes a sentence."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from bsgap_kernels.lab.checks import UserError, one_sentence
from bsgap_kernels.lab.option_files import read_options


def read_yaml(path: Path, problems: list[str]) -> dict[str, Any]:
    """The options in a YAML file; none where it is missing or damaged."""
    try:
        return read_options(path)
    except FileNotFoundError:
        problems.append(f"{path.name} is missing.")
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error.strerror}.")
    except UserError as error:
        problems.append(f"{one_sentence(str(error).removeprefix(f'{path.parent}/'))}.")
    return {}


def read_json(path: Path, problems: list[str], *, holds: str, otherwise: str, missing: str = "") -> Any:
    """The object in a JSON file, {} where there is none; the sentences say `otherwise` of what that means.

    A file that is not there is no problem unless `missing` says why it would be one.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        if missing:
            problems.append(f"{path.name} is missing ({missing}): {otherwise}.")
        return {}
    except (OSError, ValueError, RecursionError):
        problems.append(f"{path.name} cannot be read: {otherwise}.")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{path.name} holds no {holds}: {otherwise}.")
        return {}
    return content


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def count(value: Any) -> int | None:
    """A whole number of at least 0, or None."""
    found = number(value)
    return int(found) if found is not None and 0 <= found < 2**53 else None


def text(value: Any) -> str | None:
    """A string that is not empty, or None."""
    return value if isinstance(value, str) and value else None
