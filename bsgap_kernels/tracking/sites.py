"""Where activations are read, and as which matrix."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn.utils.rnn import PackedSequence

from bsgap_kernels.strides import features_last
from bsgap_kernels.tracking import axis

UNFOLDS = ("auto", "flatten", "channel", "pool", "token")

# Softmax and attention are left out: their outputs are weights, not units' activations.
NONLINEARITIES: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.RReLU, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Sigmoid, nn.LogSigmoid, nn.Hardsigmoid, nn.Tanh, nn.Hardtanh, nn.Tanhshrink, nn.Hardswish, nn.Softplus,
    nn.Softsign, nn.Softshrink, nn.Hardshrink, nn.Threshold, nn.GLU,
)  # fmt: skip


READABLE = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})

# Layers whose inputs are other units' activations: where a functional nonlinearity is looked for.
CONSUMERS: tuple[type[nn.Module], ...] = (
    nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip

Selector = Callable[[str, nn.Module], bool]
Layers = Sequence["str | re.Pattern[str]"] | re.Pattern[str] | Selector


def is_nonlinearity(module: nn.Module) -> bool:
    """Whether a module is one of torch's nonlinearities, or one of `transformers.activations`."""
    if isinstance(module, NONLINEARITIES):
        return True
    return type(module).__module__ == "transformers.activations" and isinstance(module, nn.Module)


def select_modules(model: nn.Module, layers: Layers | None = None) -> dict[str, nn.Module]:
    """The modules of `model` to read, by name.

    Args:
        model: the network; a model that is itself one nonlinearity goes by its class name.
        layers: a list of glob patterns over qualified module names (`relu*`, `blocks.*.act`) or compiled
            regular expressions (searched in the name), one regular expression, or a function of name and
            module that says which; None takes every nonlinearity module, of which there may be none.

    Raises:
        TypeError: `layers` is one string, where a list of patterns is meant, or a list of something else.
        ValueError: a pattern matches no module (the message lists the nearest names).
    """
    # A module shared under two names can be asked for by either, and is read once.
    names = [
        (name or type(model).__name__, module) for name, module in model.named_modules(remove_duplicate=False)
    ]
    chosen = [
        (name, module)
        for name, module in names
        # One inside a parametrisation is a function of a weight.
        if is_nonlinearity(module) and "parametrizations" not in name.split(".")
    ]
    if layers is not None:
        chosen = _named(layers, names)
    selected: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for name, module in chosen:
        if id(module) not in seen:
            seen.add(id(module))
            selected[name] = module
    return selected


def _named(layers: Layers, names: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    if isinstance(layers, str):
        raise TypeError(
            f"layers: got the string {layers!r}, expected a list of patterns such as [{layers!r}]"
        )
    if callable(layers):
        chosen = [(name, module) for name, module in names if layers(name, module)]
        if not chosen:
            raise ValueError(
                f"layers: the function chose no module; the model has {listing([n for n, _ in names])}"
            )
        return chosen
    patterns = [layers] if isinstance(layers, re.Pattern) else list(layers)
    if not patterns:
        raise ValueError("layers: got an empty list, expected at least one pattern, or None for the default")
    for pattern in patterns:
        if not isinstance(pattern, (str, re.Pattern)):
            raise TypeError(
                f"layers: got a list with {pattern!r}, expected glob patterns or compiled regular expressions"
            )
        if not any(_matches(pattern, name) for name, _ in names):
            raise ValueError(_no_match(pattern, [name for name, _ in names]))
    return [(name, module) for name, module in names if any(_matches(p, name) for p in patterns)]


def _matches(pattern: str | re.Pattern[str], name: str) -> bool:
    if isinstance(pattern, str):
        pattern = _glob(pattern)
    return pattern.search(name) is not None


@lru_cache
def _glob(pattern: str) -> re.Pattern[str]:
    """A glob over dotted names: `*` and `?` do not match a dot; `**` does, and `**.` may match nothing."""
    parts = re.split(r"(\*\*\.|\*\*|\*|\?|\[!?[^]]+\])", pattern)
    expressions = {"**.": r"(?:.*\.)?", "**": ".*", "*": "[^.]*", "?": "[^.]"}

    def expression(place: int, part: str) -> str:
        if place % 2 == 0:
            return re.escape(part)
        return expressions.get(part) or part.replace("[!", "[^")

    body = "".join(expression(place, part) for place, part in enumerate(parts))
    return re.compile(rf"\A{body}\Z")


def _no_match(pattern: str | re.Pattern[str], names: list[str]) -> str:
    text = pattern if isinstance(pattern, str) else pattern.pattern
    if isinstance(pattern, str) and "*" in pattern:
        deeper = re.sub(r"\*+", "**", pattern)
        found = [name for name in names if _matches(deeper, name)]
        if found:
            return (
                f"layers: the pattern {text!r} matches no module, since * stops at a dot; {deeper!r} matches "
                f"{listing(found, 5)}"
            )
    near = difflib.get_close_matches(text.replace("*", ""), names, n=5, cutoff=0.4)
    hint = f"the nearest names are {', '.join(near)}" if near else f"the model has {listing(names)}"
    return f"layers: the pattern {text!r} matches no module; {hint}"


def listing(names: list[str], limit: int = 12) -> str:
    """The first of some names, and how many more there are."""
    extra = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + extra


def activation_of(output: Any, site: str) -> Tensor:
    """The tensor to read from a module's output: itself, or the first tensor of a tuple, list or mapping.

    Of packed sequences, as recurrent layers give them, the tokens without padding.
    """
    items = output.values() if isinstance(output, Mapping) else output
    if isinstance(output, (tuple, list, Mapping)) and not isinstance(output, PackedSequence):
        output = next((item for item in items if isinstance(item, (Tensor, PackedSequence))), output)
    if isinstance(output, PackedSequence):
        output = output.data
    if not isinstance(output, Tensor):
        raise TypeError(
            f"{site}: the module returned {type(output).__name__}, expected a tensor (or a tuple or mapping "
            "with one)"
        )
    if output.ndim == 0:
        raise ValueError(
            f"{site}: the module returned a scalar, expected an activation of shape (batch, ...)"
        )
    return output


def has_values(activation: Tensor, site: str) -> bool:
    """Whether there is a matrix of numbers to read: not of a meta or fake tensor.

    Raises:
        TypeError: numbers that are not real floating-point ones, or not in one dense block.
        RuntimeError: a tensor inside torch.func.vmap, which hides a dimension.
    """
    if activation.is_meta or (type(activation) is not Tensor and is_fake(activation)):
        return False
    if activation.dtype not in READABLE or activation.layout is not torch.strided or activation.is_nested:
        kind = "a nested tensor" if activation.is_nested else f"{activation.dtype}, {activation.layout}"
        raise TypeError(
            f"{site}: got {kind}, expected a dense tensor of float64, float32, bfloat16 or float16; "
            "leave the module out by layers="
        )
    inner: Any = activation
    while torch._C._functorch.is_functorch_wrapped_tensor(inner):
        if torch._C._functorch.is_batchedtensor(inner):
            raise RuntimeError(
                f"{site}: called inside torch.func.vmap, which hides the rows of the batch; pause the "
                "tracker around it: with tracker.paused()"
            )
        inner = torch._C._functorch.get_unwrapped(inner)
    return True


def compiled_regions(model: nn.Module) -> list[str]:
    """Names of the modules that torch.compile has wrapped or replaced; "" is the model itself."""
    return [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if module._compiled_call_impl is not None or "_orig_mod" in module._modules
    ]


def no_site(searching: bool) -> str:
    """What is said where a step has read nothing; searching: functions were not looked for."""
    if searching:
        return (
            "RankTracker: the model is compiled, has no nonlinearity modules, and functional ones are not "
            "seen in compiled code: give example= (an input, to look for them on at once), or layers="
        )
    return (
        "RankTracker: a forward pass was seen but no nonlinearity, as module or as function before a weight "
        "layer; say by layers= which modules to read"
    )


def unfold_activation(activation: Tensor, unfold: str = "flatten", features_dim: int | None = None) -> Tensor:
    """Unfold an activation (B, ...) to a matrix: observations in rows, features in columns.

    `flatten` gives (B, C·H·W), `channel` (B·H·W, C), `pool` (B, C), the mean over positions, and `token` of
    (B, T, D) gives (B·T, D). `auto` is `token` for three dimensions and `channel` for more.
    features_dim: the dimension of C or D; default: the last of `token`, else that of the layer which made the
    activation, by the graph of autograd, and without one the last of three dimensions, the second of more.
    `flatten` of a contiguous activation and `channel` of a channels_last one are views; `channel` of a
    contiguous NCHW activation cannot be one and copies.
    """
    if features_dim is None and unfold not in ("flatten", "token"):
        features_dim = axis.of_producer(activation)
    return features_last(*matrix_of(activation, unfold, features_dim)).flatten(0, -2)


def resolve_unfold(ndim: int, unfold: str) -> str:
    """The unfolding that `auto` means for an activation of so many dimensions, any other as it is."""
    if unfold != "auto":
        return unfold
    return "flatten" if ndim <= 2 else "token" if ndim == 3 else "channel"


def feature_range(ndim: int, unfold: str = "flatten", features_dim: int | None = None) -> range:
    """The dimensions of an activation, before it is pooled, that are features."""
    if ndim == 1:  # one row of features, or numbers, one a row
        return range(0 if features_dim is None else 1)
    unfold = resolve_unfold(ndim, unfold)
    if unfold == "flatten" or ndim == 2:
        return range(1, ndim)
    if features_dim is None:
        features_dim = ndim - 1 if unfold == "token" else 1
    features_dim %= ndim
    return range(features_dim, features_dim + 1)


def matrix_of(
    activation: Tensor, unfold: str = "flatten", features_dim: int | None = None
) -> tuple[Tensor, int, int]:
    """An activation, pooled if `unfold` asks for it, and the range [first, last) of its feature dimensions.

    All other dimensions, in order, are observations. Nothing is copied.
    """
    if activation.ndim == 1:  # of numbers, one a row; of features, one row
        return activation.unsqueeze(1 if features_dim is None else 0), 1, 2
    features = feature_range(activation.ndim, unfold, features_dim)
    if activation.ndim == 2 or unfold != "pool":
        return activation, features.start, features.stop
    features_dim = features.start
    # Halves are averaged in float32: a mean of a few hundred values loses bits in their own format.
    dtype = torch.float32 if activation.dtype in (torch.float16, torch.bfloat16) else None
    positions = tuple(d for d in range(1, activation.ndim) if d != features_dim)
    return activation.mean(positions, dtype=dtype), 1, 2
