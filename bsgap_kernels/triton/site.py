"""Adds the Gram matrix of an activation to a site's sums on a GPU: one launch, of arguments bound before."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..strides import features_last
from .config import BY_MEAN, NO_SHIFT, TILES, Precision
from .gram import Prepared, counter_number, prepare, remembered, zero_counters
from .memory import device_table, is_capturing, kept
from .table import MatrixView, describe


@dataclass(frozen=True)
class _Bound:
    """Everything of a call that the next one like it shares; the call's own is its activation's address."""

    call: Prepared
    copies: bool  # of what lies in memory as no row of a table describes
    table: Tensor
    counters: Tensor  # the site's
    # The kernel's arguments after the origin, up to the scale: addresses, since a site's own tensors must not
    # be kept alive from here.
    addresses: tuple[int, ...]


@dataclass
class _Site:
    """Bound calls of a site, by shapes and addresses, and its newest counters: calls follow each other."""

    bound: dict[tuple[Any, ...], _Bound] = field(default_factory=dict)
    counters: Tensor | None = None


_SITES: dict[int, _Site] = {}
"""By the identity of a site's Gram matrix, with which they go: its graphs need them as long as it."""


def add_gram(
    gram: Tensor,
    totals: Tensor,
    sums: Tensor | None,
    A: Tensor,
    first: int,
    last: int,
    features_side: bool,
    center: bool,
    precision: Precision,
    fresh: bool,
) -> None:
    """gram += AᵀA (or AAᵀ), totals += (rows, bound of the error, 1), sums += column sums.

    center: AAᵀ about the mean of the rows, of `serves_centring` many. One launch; of float32 sums for sides
    beyond 64 two, the second of which also redoes what left float32's range. Runs on the current stream, does
    not synchronise, may be captured.
    """
    key = (
        gram.data_ptr(), totals.data_ptr(), 0 if sums is None else sums.data_ptr(),
        A.dtype, A.shape, A.stride(), A.data_ptr() % 16, first, last, features_side, center, precision,
    )  # fmt: skip
    site = _SITES.get(id(gram))
    bound = None if site is None else site.bound.get(key)
    if bound is None:
        if is_capturing(A.device):
            site = _Site()  # what is made now is the graph's
        elif site is None:
            site = _SITES[id(gram)] = _Site()
            weakref.finalize(gram, _SITES.pop, id(gram), None).atexit = False
        bound = site.bound[key] = _bind(
            site, gram, totals, sums, A, first, last, features_side, center, precision
        )  # fmt: skip
    if bound.copies:
        A = features_last(A, first, last).contiguous()
        first, last = A.ndim - 1, A.ndim
    plan, launches = bound.call.plan, bound.call.launches
    work = totals
    if plan.work_elements:
        work = torch.empty(plan.work_elements, dtype=torch.float64, device=gram.device)
    if len(launches) == 1 and launches[0].is_kept:
        counters = bound.counters.data_ptr()
        launches[0].at(
            A.data_ptr(), *bound.addresses, work.data_ptr(), counters, plan.stats_stride, int(fresh),
        )  # fmt: skip
        return
    bound.call.run(
        A.data_ptr(),
        bound.table,
        1,
        gram,
        gram if sums is None else sums,
        totals,
        gram,
        totals,
        work,
        bound.counters,
        plan.stats_stride,
        int(fresh),
        formed=work,
    )


def serves_centring(rows: int) -> bool:
    """Whether `add_gram` forms AAᵀ of that many rows about their mean: those of one tile."""
    return rows <= TILES[-2]


def _view(A: Tensor, first: int, last: int, features_side: bool) -> MatrixView:
    """The one matrix of A, copied only where its strides are none that a row of the table describes."""
    rows = features_last(A, first, last)
    view = describe(rows, batch=False, features_side=features_side)
    view = view or describe(rows.contiguous(), batch=False, features_side=features_side)
    assert view is not None
    return view


def _bind(
    site: _Site,
    gram: Tensor,
    totals: Tensor,
    sums: Tensor | None,
    A: Tensor,
    first: int,
    last: int,
    features_side: bool,
    center: bool,
    precision: Precision,
) -> _Bound:
    view, device = _view(A, first, last, features_side), gram.device
    key = (
        device,
        precision,
        features_side,
        center,
        sums is None,
        view.tensor.data_ptr() % 16,
        A.dtype,
        view.geometry,
    )
    call: Prepared = remembered(
        ("site", *key),
        lambda: prepare(
            [view],
            precision=precision,
            features_side=features_side,
            shift=BY_MEAN if center else NO_SHIFT,
            sums=center or sums is not None,
            accumulate=True,
        ),
    )
    plan = call.plan
    table = kept(device, lambda: device_table(plan.values, device))
    number = counter_number(plan)
    if site.counters is None or site.counters.numel() < number:
        site.counters = kept(device, lambda: zero_counters(number, device))
    place = gram.data_ptr()
    column_sums = place if sums is None else sums.data_ptr()
    addresses = (table.data_ptr(), 1, place, column_sums, totals.data_ptr(), place, totals.data_ptr())
    return _Bound(call, view.tensor.data_ptr() != A.data_ptr(), table, site.counters, addresses)
