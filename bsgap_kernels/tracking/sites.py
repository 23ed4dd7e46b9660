"""Where activations are read, and as which matrix."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

UNFOLDS = ("flatten", "channel", "pool")

# Softmax and attention are left out: their outputs are weights, not units' activations.
NONLINEARITIES: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.RReLU, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Sigmoid, nn.LogSigmoid, nn.Hardsigmoid, nn.Tanh, nn.Hardtanh, nn.Tanhshrink, nn.Hardswish, nn.Softplus,
    nn.Softsign, nn.Softshrink, nn.Hardshrink, nn.Threshold, nn.GLU,
)  # fmt: skip


def select_modules(model: nn.Module, layers: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The modules of `model` to read, by name.

    Args:
        model: the network; a model that is itself one nonlinearity goes by its class name.
        layers: glob patterns over qualified module names (`relu*`, `blocks.*.act`); None takes every
            nonlinearity module.

    Raises:
        TypeError: `layers` is one string, where a list of patterns is meant.
        ValueError: a pattern matches no module (the message lists the nearest names), or `layers` is None and
            the model has no nonlinearity module.
    """
    # A module shared under two names can be asked for by either, and is read once.
    names = [
        (name or type(model).__name__, module) for name, module in model.named_modules(remove_duplicate=False)
    ]
    if isinstance(layers, str):
        raise TypeError(
            f"layers: got the string {layers!r}, expected a list of patterns such as [{layers!r}]"
        )
    if layers is None:
        chosen = [(name, module) for name, module in names if isinstance(module, NONLINEARITIES)]
        if not chosen:
            raise ValueError(
                "layers: the model has no nonlinearity module to read by default; give patterns, "
                f"it has {_listing([name for name, _ in names])}"
            )
    else:
        if not layers:
            raise ValueError(
                "layers: got an empty list, expected at least one pattern, or None for the default"
            )
        for pattern in layers:
            if not any(fnmatchcase(name, pattern) for name, _ in names):
                raise ValueError(_no_match(pattern, [name for name, _ in names]))
        chosen = [(name, module) for name, module in names if any(fnmatchcase(name, p) for p in layers)]
    selected: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for name, module in chosen:
        if id(module) not in seen:
            seen.add(id(module))
            selected[name] = module
    return selected


def _no_match(pattern: str, names: list[str]) -> str:
    near = difflib.get_close_matches(pattern.replace("*", ""), names, n=5, cutoff=0.4)
    hint = f"the nearest names are {', '.join(near)}" if near else f"the model has {_listing(names)}"
    return f"layers: the pattern {pattern!r} matches no module; {hint}"


def _listing(names: list[str], limit: int = 12) -> str:
    extra = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + extra


def activation_of(output: Any, site: str) -> Tensor:
    """The tensor to read from a module's output: itself, or the first tensor of a tuple or list."""
    if isinstance(output, (tuple, list)):
        output = next((item for item in output if isinstance(item, Tensor)), output)
    if not isinstance(output, Tensor):
        raise TypeError(
            f"{site}: the module returned {type(output).__name__}, expected a tensor (or a tuple with one)"
        )
    if output.ndim == 0:
        raise ValueError(
            f"{site}: the module returned a scalar, expected an activation of shape (batch, ...)"
        )
    return output


def unfold_activation(activation: Tensor, unfold: str = "flatten") -> Tensor:
    """Unfold an activation (B, C, ...) to a matrix: observations in rows, features in columns.

    `flatten` gives (B, C·H·W), `channel` (B·H·W, C), `pool` (B, C), the mean over positions. `flatten` of a
    contiguous activation and `channel` of a channels_last one are views; `channel` of a contiguous NCHW
    activation cannot be one and copies.
    """
    return unfold_view(activation, unfold).flatten(0, -2)


def unfold_view(activation: Tensor, unfold: str = "flatten") -> Tensor:
    """`unfold_activation` with observations still in several dimensions, (*, features): never a copy."""
    if activation.ndim == 1:
        return activation.unsqueeze(1)
    if unfold == "flatten" or activation.ndim == 2:
        return activation.flatten(1)
    if unfold == "channel":
        return activation.movedim(1, -1)
    # Halves are averaged in float32: a mean of a few hundred values loses bits in their own format.
    dtype = torch.float32 if activation.dtype in (torch.float16, torch.bfloat16) else None
    return activation.flatten(2).mean(2, dtype=dtype)
