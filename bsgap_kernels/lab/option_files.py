"""YAML files of options, read without trusting them: what is wrong is one sentence that names the file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bsgap_kernels.lab.checks import UserError

if TYPE_CHECKING:
    import yaml

# A sweep with every option takes less than 4 KiB. Aliases let a file of 1 KiB stand for gigabytes.
_MOST_BYTES = 2**20
_MOST_VALUES = 100_000


def read_options(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        OSError: the file cannot be read.
        UserError: it holds something else, names an option twice, or is too large or too deep.
    """
    with path.open("rb") as file:
        return parse_options(file.read(_MOST_BYTES + 1), path)


def parse_options(content: bytes, path: Path) -> dict[str, Any]:
    """The mapping in the content of the YAML file `path`; raises as `read_options`."""
    import yaml

    if len(content) > _MOST_BYTES:
        raise UserError(f"{path}: the file has more than {_MOST_BYTES} bytes, expected options")
    try:
        text = content.decode("utf-8-sig")
        _check(yaml.compose(text, Loader=yaml.SafeLoader), path)
        values = yaml.safe_load(text)
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the file is not UTF-8 text, expected YAML") from error
    except RecursionError:
        raise UserError(f"{path}: the file is nested too deeply, expected options") from None
    except (ValueError, ArithmeticError, yaml.YAMLError) as error:
        why = " ".join(str(error).replace(' in "<unicode string>",', "").split())
        raise UserError(f"{path}: the file is not valid YAML: {why}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: the file holds no mapping of options such as lr: 0.02")
    return values


def _check(root: yaml.Node | None, path: Path) -> None:
    """Refuse a document whose values would be too many, or whose mappings have keys that options have not."""
    import yaml

    sizes: dict[int, int | None] = {}  # by node; None while its values are counted

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            known = sizes[id(node)]
            if known is None:
                raise UserError(f"{path}: a value holds itself, expected options")
            return known
        sizes[id(node)] = None
        total = 1
        if isinstance(node, yaml.MappingNode):
            names = set()
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode) or key.tag not in _NAMES:
                    shown = getattr(key, "value", key)
                    got = shown if isinstance(shown, str) else type(key).__name__
                    raise UserError(f"{path}: got the key {got!r}, expected names of options")
                if key.value in names:
                    raise UserError(f"{path}: {key.value} is there twice, expected each option once")
                names.add(key.value)
                total += 1 + size(value)
        elif isinstance(node, yaml.SequenceNode):
            total += sum(map(size, node.value))
        if total > _MOST_VALUES:
            raise UserError(f"{path}: the file stands for more than {_MOST_VALUES} values, expected options")
        sizes[id(node)] = total
        return total

    if root is not None:
        size(root)


_NAMES = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
