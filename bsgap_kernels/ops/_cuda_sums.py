"""The hook path on a GPU: Gram matrices added up as activations appear, then one count of all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _native
from ..rounding import UNDERFLOW, UNIT_ROUNDOFF, gamma
from ..schema import LIBRARY
from ..strides import features_last
from ..triton.memory import device_table
from ._cuda import (
    centred_gram_stage,
    count_stage,
    device_pairs,
    on_host,
    precision_of,
    rows_of,
    unscaling,
)
from ._register import PrivateKernels, implement_private

if TYPE_CHECKING:
    from ..triton.gram import GramSet


@torch.no_grad()
def accumulate_gram(
    gram: Tensor,
    totals: Tensor,
    sums: Tensor | None,
    A: Tensor,
    first: int,
    last: int,
    features_side: bool,
    center: bool,
    float32_sums: bool,
    fresh: bool,
) -> None:
    """Adds what the rows of A give to a site's sums: AᵀA (n, n) or, one matrix with m < n, AAᵀ (m, m).

    Dimensions [first, last) of A are features, all others rows. Of gram the lower triangle counts. totals:
    rows, a bound of ‖Δgram‖₂ (infinite after float32 sums) but for the additions, additions. sums (n,):
    column sums, or None. center: with AAᵀ only. fresh: what was there is forgotten. Gradients of A are not
    recorded.
    Launches of fixed count on the current stream, capturable: a replay adds the same rows' new content. One
    launch, but for what triton/site.py names and for AAᵀ about its row means.
    """
    from ..triton.site import add_gram, serves_centring

    A = A.detach()
    rows = A.shape[:first].numel() * A.shape[last:].numel()
    if A.numel() == 0:
        if fresh:
            torch._foreach_zero_([x for x in (gram, totals, sums) if x is not None])
        totals[0] += rows
        return
    precision = precision_of(float32_sums and not center and A.dtype != torch.float64)
    if not center or serves_centring(rows):
        add_gram(gram, totals, sums, A, first, last, features_side, center, precision, fresh)
        return
    if fresh:
        torch._foreach_zero_([gram, totals])
    found, error = centred_gram_stage([features_last(A, first, last)], precision, center, batch=False)
    (row,) = rows_of(found)
    G = row.grams[0]
    assert error is not None
    # Zeros were added without an error, and an infinite factor makes NaN of them.
    error = torch.where(error > 0, error, 0.0)
    # What scaling back, and later the products with a decay, may push below the smallest normal number.
    underflow = (error > 0).to(error.dtype) * (G.shape[0] * UNDERFLOW)
    back = unscaling(found)
    if back is not None:
        G = G * back * back  # twice: its square may not be representable
        error = error * back * back
    gram += G
    totals[0] += row.m
    totals[1:2] += error + underflow
    totals[2] += 1


def centred_gram(gram: Tensor, totals: Tensor, sums: Tensor | None) -> tuple[Tensor, Tensor]:
    """A site's Gram matrix about the column means, G - s sᵀ/m or H G H of AAᵀ, and its totals.

    Bounds as in csrc/cpu/site_sums.cpp. Float32 sums have none here: then equal rows leave their rounding.
    """
    G = gram.tril()
    G = G + G.tril(-1).mT
    trace = G.diagonal().sum()
    rows, error, additions = totals.unbind()
    if sums is not None:
        C = G - torch.outer(sums, sums / rows.clamp_min(1))
    else:
        mean = G.mean(-1)
        C = G - mean[:, None] - mean[None, :] + mean.mean()
    factor = 4 * gamma(G.shape[0] + 2) + 32 * UNIT_ROUNDOFF
    added = 2 * UNIT_ROUNDOFF * (additions + 2)
    error = (3 * (error + added * trace) + factor * trace) * (1 + 16 * UNIT_ROUNDOFF)
    nothing = torch.isfinite(error) & (C.diagonal().sum() <= error)
    return torch.where(nothing, 0.0, C), torch.stack(
        [rows, torch.where(nothing, 2 * error, error), additions]
    )


def gram_counts(
    grams: Sequence[Tensor], totals: Sequence[Tensor], atol: float, rtol: Sequence[float], certify: bool
) -> Tensor:
    """Rows, trace, Frobenius norm and largest eigenvalue, then count and bounds at each rtol (N, 4 + 3 t).

    One launch for sides up to 128, one sequence of launches for larger ones; nothing waits for the device.
    """
    if not _native.has_cuda_kernels():
        return on_host("_gram_counts", grams, totals, atol, rtol, certify)
    rows, errors, additions = torch.stack(list(totals)).unbind(1)
    error = None
    if certify:
        traces = torch.stack([gram.diagonal().sum() for gram in grams])
        sides = device_table([gram.shape[0] for gram in grams], grams[0].device)
        # Each addition rounds an entry by at most u of the sum so far, which never exceeds the trace.
        error = errors + (2 * UNIT_ROUNDOFF) * (additions + 2) * (1 + UNIT_ROUNDOFF * sides) * traces
    pairs = None if len(rtol) == 1 else device_pairs([(atol, r) for r in rtol], rows.device).view(1, -1, 2)
    counted = count_stage(
        _as_set(grams), atol, rtol[0], pairs=pairs, gram_error=error, certify=certify, moments=True
    )
    none = counted.counts.new_full((), -1)
    bounds = (counted.lower, counted.upper) if certify else (none.expand_as(counted.counts),) * 2
    found = torch.stack([counted.counts, *bounds], -1).flatten(1)
    return torch.cat([rows[:, None], counted.moments, found.double()], 1)


def gram_eigenvalues(grams: Sequence[Tensor]) -> Tensor:
    """Eigenvalues, ascending, of each Gram matrix back to back; NaN where one is not finite."""
    if not _native.has_cuda_kernels():
        return on_host("_gram_eigenvalues", grams)
    found = _as_set(grams)
    parts = count_stage(found, rtol=1.0, spectrum=True).eigenvalues.split(list(found.plan.sides))
    own = {row["first_result"]: values for row, values in zip(found.plan.rows, parts, strict=True)}
    return torch.cat([own[i] for i in range(len(grams))])


def _as_set(grams: Sequence[Tensor]) -> GramSet:
    """Gram matrices anywhere in a device's memory as one set: rows of a table that point into it."""
    from ..triton.gram import GramSet, on_device, remembered
    from ..triton.table import COLUMNS, Table

    anchor = grams[0]
    places = tuple(
        ((gram.data_ptr() - anchor.data_ptr()) // anchor.element_size(), gram.shape[0]) for gram in grams
    )

    def make() -> tuple[Table, dict[tuple[torch.device, int], Tensor]]:
        order = sorted(range(len(places)), key=lambda i: -places[i][1])
        rows = []
        for matrix, i in enumerate(order):
            first, side = places[i]
            given = {"first_matrix": matrix, "count": 1, "side": side, "first_gram": first}
            # Observations are not known here, and neither counts nor eigenvalues ask for them.
            rows.append(dict.fromkeys(COLUMNS, 0) | given | {"first_result": i, "m": side, "n": side})
        return Table(rows, order), {}

    table, known = remembered(("sums", places), make)
    return GramSet(anchor, on_device(table, anchor.device, known), None, None, table)


KERNELS: PrivateKernels = {
    "_accumulate_gram_": accumulate_gram,
    "_centred_gram": centred_gram,
    "_gram_counts": gram_counts,
    "_gram_eigenvalues": gram_eigenvalues,
}
implement_private(KERNELS, "CUDA")
LIBRARY.impl("_accumulate_gram_", torch.library.fallthrough_kernel, "Autograd")  # of rows that require grad
