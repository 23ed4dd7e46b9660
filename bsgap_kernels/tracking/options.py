"""Options of a tracker, checked before anything is attached."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bsgap_kernels import dispatch
from bsgap_kernels.dispatch import SUMMED_GRAM_MIN_RTOL
from bsgap_kernels.ops import SUMMARY_COLUMNS
from bsgap_kernels.tracking.distributed import DistributedSpectra
from bsgap_kernels.tracking.records import ABOUT_THE_MEAN, DEFAULT_METRICS, METRICS, Question


def checked_model(model: nn.Module) -> nn.Module:
    """The module whose hooks fire: DistributedDataParallel is unwrapped, a compiled wrapper refused."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    if isinstance(model, nn.DataParallel):
        raise TypeError(
            "model: got DataParallel, whose threads share the hooks of a model; expected "
            "DistributedDataParallel, or the module on one device"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"model: got {type(model).__name__}, expected the module before torch.jit makes a script of it"
        )
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    if hasattr(inner, "_orig_mod"):
        # Hooks added to a model that is already compiled do not fire, and nothing says so.
        raise ValueError("model: got a compiled model, expected the module before torch.compile wraps it")
    return inner


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's parameters at present; the CPU as long as they are on none."""
    parameter = next(iter(model.parameters()), None)
    return torch.device("cpu") if parameter is None or parameter.is_meta else parameter.device


def check_counts(**counts: object) -> None:
    """Options that are integers of at least 1."""
    for option, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{option}: got {count!r}, expected an integer of at least 1")


def spectra_of(group: Any, comm_budget: int) -> DistributedSpectra | None:
    """The all-reduce over a group, or None; says once where each rank is left to itself."""
    if group is not None:
        return DistributedSpectra(None if group == "world" else group, comm_budget=comm_budget)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        warnings.warn(
            "bsgap_kernels: each rank tracks its own share of the batch; process_group='world' tracks the "
            "whole batch",
            stacklevel=3,
        )
    return None


def checked_question(
    rtol: float | Sequence[float],
    atol: float | None,
    center: bool,
    certify: bool,
    metrics: Sequence[str] | str | None,
) -> Question:
    """What is asked of every site, from options in their range."""
    rtols = _checked_rtols(rtol, resolved=0.0 if certify or atol else SUMMED_GRAM_MIN_RTOL)
    if atol is not None and not (math.isfinite(atol) and atol >= 0):
        raise ValueError(f"atol: got {atol!r}, expected a finite number of at least 0")
    if metrics is None:
        metrics = [name for name in DEFAULT_METRICS if not (center and name in ABOUT_THE_MEAN)]
    names = ("near_rank", *SUMMARY_COLUMNS) if metrics == "all" else metrics
    if isinstance(names, str):
        raise TypeError(f"metrics: got the string {names!r}, expected a list of names, or 'all'")
    for name in names:
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, n=1)
            hint = f"; the nearest is {near[0]}" if near else ""
            raise ValueError(f"metrics: got {name!r}, expected names of {', '.join(METRICS)}{hint}")
        if center and name in ABOUT_THE_MEAN:
            raise ValueError(f"metrics: got {name!r} with center=True, which takes the mean off everything")
    return Question(0.0 if atol is None else float(atol), rtols, center, certify, tuple(names))


def _checked_rtols(rtol: float | Sequence[float], resolved: float) -> tuple[float, ...]:
    several = isinstance(rtol, Sequence) and not isinstance(rtol, str)
    rtols = tuple(rtol) if isinstance(rtol, Sequence) else (rtol,)
    if not rtols or len(set(rtols)) < len(rtols):
        raise ValueError(f"rtol: got {rtol!r}, expected a number or several different ones")
    for each in rtols:
        got = f"{each!r} in {rtol!r}" if several else f"{each!r}"
        if isinstance(each, (bool, str)):
            raise TypeError(f"rtol: got {got}, expected a number or several")
        if not (math.isfinite(each) and each >= 0):
            raise ValueError(f"rtol: got {got}, expected a finite number of at least 0")
        if each >= 1:
            raise ValueError(
                f"rtol: got {got}, expected less than 1: no singular value exceeds σ_max, so every count "
                "would be 0"
            )
        if each < resolved:
            raise ValueError(
                f"rtol: got {got}, expected at least {resolved:g}: a Gram matrix resolves no less; "
                "certify=True says how far it does"
            )
    return tuple(float(each) for each in rtols)


def float32_serves(question: Question, activation: Tensor) -> bool:
    """Whether float32 sums of such activations resolve all that is asked of them."""
    plan = dispatch.plan_of_sums(
        "RankTracker",
        activation.dtype,
        min(question.rtols),
        dispatch.device_kind(activation),
        exact=question.exact,
        certify=question.certify,
    )
    return plan.gram == "float32"
