"""Padding masks: which rows of an activation are tokens."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

MASK_TRUE = ("valid", "padding")
MaskTrue = Literal["valid", "padding"]


def meaning_of(mask: str, true: MaskTrue | None) -> MaskTrue:
    """What true stands for in a mask of that name, where it was not said.

    Raises:
        ValueError: the name says padding, and libraries differ in what they mean by it.
    """
    if true is not None or "padding" not in mask:
        return true or "valid"
    if mask.endswith("key_padding_mask"):  # as torch.nn has it
        return "padding"
    raise ValueError(
        f"mask_true: got None, expected 'valid' or 'padding': {mask!r} leaves open which is true"
    )


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


Side = Literal["encoder", "decoder"]


def side_of(model: nn.Module, mask: str) -> Side | None:
    """Whose tokens a mask of that name tells of where a model has an encoder and a decoder, else None."""
    parts = {part for name, _ in model.named_modules() for part in name.split(".")}
    if not {"encoder", "decoder"} <= parts:
        return None
    return "decoder" if mask.startswith(("decoder", "tgt", "target")) else "encoder"


def is_on_side(site: str, side: Side, rows: torch.Size, mask: Tensor) -> bool:
    """Whether a site of a model with both has the tokens of that side.

    Raises:
        ValueError: the site is in neither, and its rows could be those of the mask.
    """
    parts = site.split(":")[0].split("#")[0].split(".")
    if "encoder" not in parts and "decoder" not in parts:
        if len(rows) == 2 and (rows == mask.shape or rows == mask.shape[::-1]):
            raise ValueError(
                f"{site}: as many tokens as the {side}'s mask has, in a model with an encoder and a decoder: "
                "they could be of either; leave the site out by layers=, or track without mask="
            )
        return False
    return side in parts


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
