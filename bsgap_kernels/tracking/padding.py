"""Padding masks: which rows of an activation are tokens."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

MASK_TRUE = ("valid", "padding")
MaskTrue = Literal["valid", "padding"]


def valid_tokens(mask: Tensor, true: MaskTrue) -> Tensor:
    """Which tokens count, bool, from a mask of the model's; looks at no value on the host.

    A mask of floating-point numbers with negative ones is added to scores of attention: 0 where a token
    counts. So is one of zeros alone, which no mask with 1 for tokens would be. Any other is 1, or true,
    where `true` says.
    """
    one = mask != 0
    by_sign = one if true == "valid" else ~one
    if not mask.is_floating_point():
        return by_sign
    additive = (mask < 0).any() | ~one.any()
    return torch.where(additive, mask > -1, by_sign)


def is_sequence_first(model: nn.Module) -> bool:
    """Whether some layer of the model wants (T, B, D)."""
    return any(getattr(module, "batch_first", None) is False for module in model.modules())


def fitted(valid: Tensor, rows: torch.Size, sequence_first: bool, site: str) -> Tensor | None:
    """The mask (B, T) in the order of an activation's rows, or None where they are no tokens of it.

    Raises:
        ValueError: as many sequences as tokens, and the model has layers of both orders in question.
    """
    if len(rows) != 2:
        return None
    transposed = sequence_first and rows == valid.shape[::-1]
    if transposed and rows == valid.shape:
        raise ValueError(
            f"{site}: {rows[0]} sequences of as many tokens, and the model has layers with "
            "batch_first=False: the rows could be (B, T) or (T, B); track such a model at other batch sizes, "
            "or without mask="
        )
    if transposed:
        return valid.T
    return valid if rows == valid.shape else None
