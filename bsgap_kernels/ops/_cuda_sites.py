"""The hook path on a GPU: a Gram matrix a site at once, then one count of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..dispatch import select_backend
from . import _cpu
from ._cuda_stages import (
    Precision,
    centred_gram_stage,
    count_stage,
    device_pairs,
    device_table,
    has_kernels,
    summary_stage,
)
from ._tolerances import effective_tolerances

if TYPE_CHECKING:
    from ..triton.gram import GramSet


@dataclass(frozen=True)
class Site:
    """What a hook leaves behind on a GPU: Gram matrices, not yet counted."""

    found: GramSet
    error: Tensor | None
    tolerances: tuple[float, float]
    certify: bool
    stream: torch.cuda.Stream | None  # that it was launched on


def _current_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _join(sites: Sequence[Site], device: torch.device) -> None:
    """Lets the current stream read what sites left on others, and keep it until it has.

    A forward pass may run on a stream of its own. Without the first, the count could come before the Gram
    matrix; without the second, the next pass could be given its memory before the count has read it.
    """
    current = _current_stream(device)
    if current is None:
        return
    waited = set()
    for one in sites:
        if one.stream is None or one.stream == current:
            continue
        if one.stream not in waited:
            waited.add(one.stream)
            current.wait_stream(one.stream)
        for tensor in (one.found.grams, one.found.exponent, one.error):
            if tensor is not None:
                tensor.record_stream(current)


def site(A: Tensor, atol: float | None, rtol: float | None, center: bool, certify: bool) -> Site | Tensor:
    """One activation (*, n), leading dimensions observations, reduced to its Gram matrix."""
    if not has_kernels():
        return _cpu.site(A.cpu(), atol, rtol, center, certify).to(A.device)
    absolute, relative = effective_tolerances(A, atol, rtol, A.shape[:-1].numel())
    known = relative if absolute == 0 and not certify else None
    m, n = A.shape[:-1].numel(), A.shape[-1]
    plan = select_backend("site", A.dtype, m, n, rtol=known, device="cuda", center=center)
    precision: Precision = "float32" if plan.gram == "float32" else "float64"
    found, error = centred_gram_stage([A], precision, center, batch=False)
    return Site(found, error, (absolute, relative), certify, _current_stream(A.device))


def site_records(sites: Sequence[Site | Tensor]) -> Tensor:
    """Near-rank, lower, upper and the summary's columns, (sites, 3 + columns) float64.

    All are counted together: one launch for sides up to 128, one sequence of launches for larger ones.

    Without `certify` the bounds say nothing: 0 and min(m, n).
    """
    grams = [s for s in sites if isinstance(s, Site)]
    if not grams:
        return torch.stack([s for s in sites if isinstance(s, Tensor)])
    device = grams[0].found.grams.device
    _join(grams, device)
    found = _merged([s.found for s in grams])
    tolerances = [s.tolerances for s in grams]
    same = all(pair == tolerances[0] for pair in tolerances)
    errors = [s.error for s in grams if s.error is not None]
    certify = grams[0].certify
    counted = count_stage(
        found,
        *tolerances[0],
        pairs=None if same else device_pairs(tolerances, device),
        gram_error=torch.cat(errors) if errors else None,
        certify=certify,
        spectrum=True,
    )
    if certify:
        numbers = torch.cat([counted.counts, counted.lower, counted.upper], 1)
    else:
        sides = [0] * len(grams)
        for row in found.plan.rows:
            sides[row["first_result"]] = row["side"]
        upper = device_table(sides, device)[:, None]
        numbers = torch.cat([counted.counts, torch.zeros_like(upper), upper], 1)
        numbers = torch.where(counted.counts < 0, counted.counts, numbers)
    return torch.cat([numbers.to(torch.float64), summary_stage(found, counted)], 1)


def _merged(sets: Sequence[GramSet]) -> GramSet:
    """Sets of one device as one, for the counting kernels: their rows point into each other's memory."""
    from ..triton.gram import GramSet, Prepared, prepared

    anchor = sets[0].grams
    away = [(found.grams.data_ptr() - anchor.data_ptr()) // anchor.element_size() for found in sets]

    def prepare() -> Prepared:
        rows: list[dict[str, int]] = []
        results = 0
        for found, offset in zip(sets, away, strict=True):
            for row in found.plan.rows:
                moved = {
                    "first_gram": row["first_gram"] + offset,
                    "first_result": row["first_result"] + results,
                }
                rows.append({**row, **moved})
            results += found.plan.matrices
        rows.sort(key=lambda row: -row["side"])
        matrices = 0
        for row in rows:
            row["first_matrix"] = matrices
            matrices += row["count"]
        return Prepared(replace(sets[0].plan, rows=rows))

    call = prepared(tuple((found.plan, offset) for found, offset in zip(sets, away, strict=True)), prepare)
    exponents = None
    if any(found.exponent is not None for found in sets):
        zeros = [torch.zeros(f.plan.matrices, dtype=torch.int32, device=anchor.device) for f in sets]
        exponents = torch.cat(
            [z if f.exponent is None else f.exponent for f, z in zip(sets, zeros, strict=True)]
        )
    return GramSet(anchor, call.table(anchor.device, device_table), exponents, None, call.plan)
