"""RankTracker: near-rank and spectral summary of a model's activations, read by forward hooks."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn

from bsgap_kernels.ops import SUMMARY_COLUMNS
from bsgap_kernels.ops._register import engine_of
from bsgap_kernels.tracking.sites import UNFOLDS, activation_of, select_modules, unfold_view


@dataclass(frozen=True)
class SiteRecord:
    """What one read of one site gave.

    near_rank is #{σ > max(atol, rtol·σ_max)} of the unfolded activation, lower and upper its certified
    bounds (0 and min(shape) if the tracker does not certify), ratio near_rank / min(shape). A non-finite
    activation gives near_rank -1 and NaN floats. seconds is the time spent in the hook (on a GPU: the time to
    launch).
    """

    shape: tuple[int, int]
    near_rank: int
    lower: int
    upper: int
    ratio: float
    summary: dict[str, float]
    seconds: float


@dataclass
class _Pending:
    shape: tuple[int, int]
    device: torch.device
    values: Any  # what the device's engine made of the activation, None of an empty one
    seconds: float


class RankTracker:
    """Count the near-rank of every nonlinearity's output at every forward pass.

        with RankTracker(model, rtol=1e-2) as tracker:
            for x, y in batches:
                loss(model(x), y).backward()
                records = tracker.collect()          # {"relu1#0": SiteRecord(near_rank=..., ...), ...}

    A site is named `module#call`: a module called several times in one forward pass gives #0, #1, ... Each
    hook reduces its activation at once to a Gram matrix, so an in-place operation that follows cannot spoil
    the count and no activation is kept alive. On a CPU it counts at once too; on a GPU `collect` counts all
    sites together. The input is detached: gradients are as without the tracker. A second forward pass before
    `collect` replaces the first one's records of the same view.

    Args:
        model: the network; give it before `torch.compile` wraps it.
        layers: glob patterns over module names; None reads the outputs of all nonlinearity modules.
        unfold: `flatten`, `channel` or `pool` (see `unfold_activation`).
        rtol, atol: the threshold is max(atol, rtol·σ_max).
        center: subtract the column means first.
        certify: prove every count. Without, `lower` and `upper` are 0 and min(shape), and a GPU may sum in
            float32 with float64 promotion (from rtol 7e-3 on; singular values below about 1e-3·σ_max are
            then rounding in the summary).

    Raises:
        ValueError, TypeError: an option out of range, or a pattern that matches nothing (nearest names are
            listed).

    Synchronises only in `collect`, once for all sites.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Sequence[str] | None = None,
        unfold: str = "flatten",
        rtol: float = 1e-2,
        atol: float | None = None,
        center: bool = False,
        certify: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
        if hasattr(model, "_orig_mod"):
            # Hooks added to a model that is already compiled do not fire, and nothing says so.
            raise ValueError("model: got a compiled model, expected the module before torch.compile wraps it")
        if unfold not in UNFOLDS:
            raise ValueError(f"unfold: got {unfold!r}, expected one of {', '.join(UNFOLDS)}")
        for option, tolerance in (("rtol", rtol), ("atol", atol)):
            if tolerance is not None and not (math.isfinite(tolerance) and tolerance >= 0):
                raise ValueError(f"{option}: got {tolerance!r}, expected a finite number of at least 0")
        modules = select_modules(model, layers)
        self.unfold = unfold
        self.rtol = rtol
        self.atol = atol
        self.center = center
        self.certify = certify
        self.enabled = True
        self._view = "batch"
        self._calls: dict[str, int] = {}
        self._order: dict[str, None] = {}
        self._pending: dict[str, dict[str, _Pending]] = {}
        self._handles = [model.register_forward_pre_hook(self._begin)]
        self._handles += [
            module.register_forward_hook(partial(self._read, name)) for name, module in modules.items()
        ]

    def __enter__(self) -> RankTracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove every hook from the model; records not collected yet stay readable."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def sites(self) -> list[str]:
        """Names of the sites met so far, in forward order (empty before the first forward pass)."""
        return list(self._order)

    @contextmanager
    def view(self, label: str) -> Iterator[None]:
        """Record under another label inside the block, such as `probe` for a fixed batch."""
        previous, self._view = self._view, label
        try:
            yield
        finally:
            self._view = previous

    @contextmanager
    def paused(self, when: bool = True) -> Iterator[None]:
        """Record nothing inside the block (evaluation passes), or go on as before if `when` is false."""
        previous, self.enabled = self.enabled, self.enabled and not when
        try:
            yield
        finally:
            self.enabled = previous

    def collect(self, view: str = "batch") -> dict[str, SiteRecord]:
        """Bring the records of one view to the host and forget them; one transfer for all sites."""
        self._calls.clear()
        pending = self._pending.pop(view, {})
        if not pending:
            return {}
        by_device: dict[torch.device, list[str]] = {}
        for site, item in pending.items():
            if item.values is not None:
                by_device.setdefault(item.device, []).append(site)
        rows: dict[str, list[float]] = {}
        for device, sites in by_device.items():
            values = engine_of(device).site_records([pending[site].values for site in sites])
            rows.update(zip(sites, values.tolist(), strict=True))
        return {site: _record(item, rows.get(site, _EMPTY)) for site, item in pending.items()}

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._calls.clear()

    def _read(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        # Calls are counted while paused too, so that a site keeps its name.
        call = self._calls.get(name, 0)
        self._calls[name] = call + 1
        if not self.enabled:
            return
        started = time.perf_counter()
        site = f"{name}#{call}"
        with torch.no_grad():
            matrix = unfold_view(activation_of(output, site).detach(), self.unfold)
            values = None
            if matrix.numel() > 0:
                values = engine_of(matrix.device).site(
                    matrix, self.atol, self.rtol, self.center, self.certify
                )
        self._order.setdefault(site)
        shape = (matrix.shape[:-1].numel(), matrix.shape[-1])
        records = self._pending.setdefault(self._view, {})
        seconds = time.perf_counter() - started
        records[site] = _Pending(shape, matrix.device, values, seconds)


# Of an empty activation: nothing counts, and the last column of the summary is a slope of nothing.
_EMPTY = [0.0] * (3 + len(SUMMARY_COLUMNS) - 1) + [math.nan]


def _record(item: _Pending, values: list[float]) -> SiteRecord:
    near_rank, lower, upper = (int(value) for value in values[:3])
    k = min(item.shape)
    ratio = math.nan if near_rank < 0 else near_rank / k if k else 0.0
    summary = dict(zip(SUMMARY_COLUMNS, values[3:], strict=True))
    return SiteRecord(item.shape, near_rank, lower, upper, ratio, summary, item.seconds)
