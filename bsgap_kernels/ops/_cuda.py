"""The engine of CUDA: Gram matrices from the Triton kernels, counts from the CUDA C++ kernels.

Inputs are checked, and no matrix is empty. The engine of the CPU (`_cpu.py`) has the same functions.

Nothing here waits for the device or looks at a value, so every call can be captured in a CUDA graph, but for
two: `svd_counts` below what a float64 Gram matrix resolves, and everything in an installation without nvcc.
"""

from __future__ import annotations

import functools
import math
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..dispatch import Plan, select_backend
from ..triton.config import UNIT_ROUNDOFF, gamma
from . import _cpu
from ._tolerances import effective_tolerances, svd_counts

if TYPE_CHECKING:
    from ..triton.gram import GramSet
    from ..triton.table import MatrixView

SMALLEST_SUBNORMAL = 2.0**-1074
Precision = Literal["float32", "float64"]


def device_table(values: list[int], device: torch.device) -> Tensor:
    """int64 values on the device, written by a kernel that carries them as parameters: capturable."""
    if not _has_kernels():
        return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)
    table = torch.empty(len(values), dtype=torch.int64, device=device)
    torch.ops.bsgap._cuda_fill(table, values)
    return table


@functools.cache
def _has_kernels() -> bool:
    """Whether this installation has the CUDA C++ kernels; says once what their absence costs."""
    from .._native import CUDA_LIBRARY_PATH

    if CUDA_LIBRARY_PATH is None:
        warnings.warn(
            "bsgap_kernels was installed without nvcc: counts on CUDA tensors go through "
            "torch.linalg.eigvalsh, which waits for the device and cannot be captured in a CUDA graph; "
            "certified intervals and summaries go through the CPU. Install the CUDA toolkit of torch's "
            "CUDA major and reinstall.",
            stacklevel=2,
        )
    return CUDA_LIBRARY_PATH is not None


@dataclass(frozen=True)
class Row:
    """One row of a set's table, with what belongs to its matrices."""

    grams: Tensor  # (count, k, k), a view
    sums: Tensor | None  # (count, n), a view: column sums about the shift, where k are the features
    results: slice  # in the caller's order
    m: int
    depth: int
    roundings: int


def rows_of(found: GramSet) -> list[Row]:
    """The rows of a set, in table order."""
    rows = []
    for row in found.plan.rows:
        count, k, n = row["count"], row["side"], row["n"]
        first, vector, result = row["first_gram"], row["first_vector"], row["first_result"]
        sums = None
        if found.sums is not None and k == n:
            sums = found.sums[vector : vector + count * n].view(count, n)
        rows.append(
            Row(
                grams=found.grams[first : first + count * k * k].view(count, k, k),
                sums=sums,
                results=slice(result, result + count),
                m=row["m"],
                depth=row["outer"] * row["inner"],
                roundings=row["roundings"],
            )
        )
    return rows


def view_of(A: Tensor, *, batch: bool = True, features_side: bool = False) -> MatrixView:
    """The matrices of A, copied only where their strides are none that a row of the table describes."""
    from ..triton.table import describe

    view = describe(A, batch=batch, features_side=features_side)
    view = view or describe(A.contiguous(), batch=batch, features_side=features_side)
    assert view is not None
    return view


def gram_stage(
    As: Sequence[Tensor],
    precision: Precision,
    *,
    batch: bool = True,
    features_side: bool = False,
    shift: Literal["first_row"] | Tensor | None = None,
) -> GramSet:
    """Gram matrices of all inputs in one launch a dtype, results in their order.

    Inputs are (*, m, n), leading dimensions matrices if `batch`, else observations. `shift`: see
    triton/gram.py.
    """
    from ..triton.gram import gram_set

    views = [view_of(A, batch=batch, features_side=features_side) for A in As]
    return gram_set(
        views, precision=precision, features_side=features_side, shift=shift, table_of=device_table
    )


def centred_gram_stage(
    As: Sequence[Tensor],
    precision: Precision,
    center: bool,
    *,
    batch: bool = True,
    features_side: bool = False,
) -> tuple[GramSet, Tensor | None]:
    """Gram matrices, about the column means if `center`, and then the bound (N,) of their error.

    About any shift, G_B - s sᵀ/m (features) or H G_B H (observations) is the centred Gram matrix. With F
    the trace of G_B, both err by less than (3 γ_c + 4 γ_{k+2} + 32 u) F, and of float64 input by what
    underflow took (docs/certificates.md, section 7).
    """
    shift: Literal["first_row"] | None = "first_row" if center else None
    found = gram_stage(As, precision, batch=batch, features_side=features_side, shift=shift)
    if not center:
        return found, None
    error = found.grams.new_empty(found.plan.matrices)
    # Only float64 input has products that underflow, and then a Gram matrix of 0 does not mean equal rows.
    unequal = None if found.exponent is None else torch.cat([_rows_differ(A, batch) for A in As])
    for row in rows_of(found):
        G, k = row.grams, row.grams.shape[-1]
        squares = G.diagonal(dim1=-2, dim2=-1).sum(-1)
        if row.sums is not None:
            G -= row.sums[:, :, None] * (row.sums[:, None, :] / row.m)
        else:
            mean = G.mean(-1)
            G -= mean[:, :, None]
            G -= mean[:, None, :]
            G += mean.mean(-1)[:, None, None]
        factor = 3 * gamma(row.roundings) + 4 * gamma(k + 2) + 32 * UNIT_ROUNDOFF
        bound = squares * (factor * (1 + 4 * gamma(row.roundings + 2 * k)))
        if unequal is not None and found.exponent is not None:
            cells = k * row.depth
            lost = 2 * math.sqrt(cells) * SMALLEST_SUBNORMAL
            of_scaling = (2.0 * squares.sqrt() + lost) * (lost * (1 + 8 * UNIT_ROUNDOFF))
            of_scaling = torch.where(found.exponent[row.results] < 0, of_scaling, 0.0)
            underflow = of_scaling + 2 * cells * SMALLEST_SUBNORMAL
            bound += torch.where(unequal[row.results], underflow, 0.0)
        error[row.results] = bound
    return found, error


def _rows_differ(A: Tensor, batch: bool) -> Tensor:
    """Which matrices of A (*, m, n), leading dimensions as in `gram_stage`, have unequal rows, (count,)."""
    if not batch:
        return (A[(0,) * (A.dim() - 1)] != A).any().view(1)
    return (A[..., :1, :] != A).flatten(-2).any(-1).view(-1)


@dataclass(frozen=True)
class Counted:
    """What the counting kernels found, in the order of the views; empty tensors where not asked for."""

    counts: Tensor
    lower: Tensor
    upper: Tensor
    eigenvalues: Tensor


def count_stage(
    found: GramSet,
    atol: float = 0.0,
    rtol: float = 0.0,
    *,
    pairs: Tensor | None = None,
    gram_error: Tensor | None = None,
    certify: bool = False,
    spectrum: bool = False,
) -> Counted:
    """Counts (N, t), certified bounds and eigenvalues of a set of Gram matrices."""
    if not _has_kernels():
        return _count_by_eigenvalues(found, atol, rtol, pairs)
    return Counted(
        *torch.ops.bsgap._cuda_counts(
            found.grams, found.table, found.plan.sides, found.plan.batches, pairs, atol, rtol, found.exponent,
            gram_error, certify, spectrum,
        )
    )  # fmt: skip


def summary_stage(found: GramSet, counted: Counted) -> Tensor:
    """Spectral summaries (N, columns) from the eigenvalues of the counting stage."""
    return torch.ops.bsgap._cuda_summaries(
        counted.eigenvalues, found.table, found.plan.sides, found.plan.batches, found.exponent
    )


def _count_by_eigenvalues(found: GramSet, atol: float, rtol: float, pairs: Tensor | None) -> Counted:
    """The count of an installation without CUDA C++ kernels."""
    from ..triton.gram import power_of_two

    if pairs is None:
        pairs = torch.tensor([[[atol, rtol]]], dtype=torch.float64, device=found.grams.device)
    total = found.plan.matrices
    counts = found.grams.new_empty((total, pairs.shape[1]), dtype=torch.int64)
    for row in rows_of(found):
        finite = torch.isfinite(row.grams.diagonal(dim1=-2, dim2=-1)).all(-1)
        lam = torch.linalg.eigvalsh(torch.where(finite[:, None, None], row.grams, 0.0))
        sigma = lam.clamp_min(0).sqrt()
        if found.exponent is not None:
            sigma = sigma * power_of_two(-found.exponent[row.results, None])
        own = pairs if pairs.shape[0] == 1 else pairs[row.results]
        tau = torch.maximum(own[..., 0], own[..., 1] * sigma[:, -1:])
        count = (sigma[:, None, :] > tau[..., None]).sum(-1)
        counts[row.results] = count.masked_fill(~finite[:, None] | torch.isnan(tau), -1)
    none = counts.new_empty((0, pairs.shape[1]))
    return Counted(counts, none, none, found.grams.new_empty(0))


def _plan(op: str, A: Tensor, rtol: float | None, center: bool, **options: Any) -> Plan:
    return select_backend(op, A.dtype, *A.shape[-2:], rtol=rtol, device="cuda", center=center, **options)


def _svd_counts(op: str, A: Tensor, pairs: Tensor, center: bool) -> Tensor:
    if A.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"bsgap::{op}: rtol lies below what a float64 Gram matrix resolves (8e-7), so singular values "
            "would be computed, which waits for the device: not possible while a CUDA graph is captured "
            f"(dtype {A.dtype}, shape {tuple(A.shape)}); pass a larger rtol"
        )
    return svd_counts(A, pairs, center)


def _one_pair(A: Tensor, atol: float, rtol: float) -> Tensor:
    return torch.tensor([[atol, rtol]], dtype=torch.float64, device=A.device)


def count_scalar(op: str, A: Tensor, atol: float | None, rtol: float | None, center: bool) -> Tensor:
    """Near-rank (*,) for one pair of tolerances."""
    absolute, relative = effective_tolerances(A, atol, rtol)
    plan = _plan(op, A, relative if absolute == 0 else None, center)
    if plan.gram == "svd":
        return _svd_counts(op, A, _one_pair(A, absolute, relative), center)[..., 0]
    found, _ = centred_gram_stage([A], plan.gram, center)
    return count_stage(found, absolute, relative).counts.view(A.shape[:-2])


def count_pairs(op: str, A: Tensor, pairs: Tensor, center: bool) -> Tensor:
    """Counts (*, t) for float64 threshold pairs (*, t, 2) that broadcast with the batch of A, t > 0."""
    t = pairs.shape[-2]
    batch = torch.broadcast_shapes(A.shape[:-2], pairs.shape[:-2])
    plan = _plan(op, A, None, center, thresholds=t)
    assert plan.gram != "svd"
    found, _ = centred_gram_stage([A.expand(*batch, *A.shape[-2:])], plan.gram, center)
    shared = pairs.numel() == 2 * t
    flat = pairs.reshape(1, t, 2) if shared else pairs.expand(*batch, t, 2).reshape(-1, t, 2)
    return count_stage(found, pairs=flat.contiguous()).counts.view(*batch, t)


def count_grouped(
    op: str, As: Sequence[Tensor], atol: float | None, rtol: float | None, center: bool
) -> Tensor:
    """Near-rank (len(As),) of matrices (*, n_i), whose leading dimensions are all rows.

    One Gram launch and one counting launch for all that share a dtype and an accumulation.
    """
    rows = [A.shape[:-1].numel() for A in As]
    tolerances = [effective_tolerances(A, atol, rtol, m) for A, m in zip(As, rows, strict=True)]
    grams = [
        select_backend(
            op,
            A.dtype,
            m,
            A.shape[-1],
            rtol=t[1] if t[0] == 0 else None,
            device="cuda",
            center=center,
        ).gram
        for A, m, t in zip(As, rows, tolerances, strict=True)
    ]
    # float64 input is looked over for extreme values first: apart, so that only it pays.
    kinds = [(gram, A.dtype == torch.float64) for gram, A in zip(grams, As, strict=True)]
    members_of = {k: [i for i, own in enumerate(kinds) if own == k] for k in dict.fromkeys(kinds)}
    parts = []
    for (gram, _), members in members_of.items():
        chosen = [As[i] for i in members]
        if gram == "svd":
            counts = [
                _svd_counts(op, As[i].flatten(0, -2), _one_pair(As[i], *tolerances[i]), center)
                for i in members
            ]
            parts.append(torch.cat(counts))
            continue
        precision: Precision = "float32" if gram == "float32" else "float64"
        found, _ = centred_gram_stage(chosen, precision, center, batch=False)
        own = [tolerances[i] for i in members]
        same = all(pair == own[0] for pair in own)
        pairs = None if same else _device_pairs(own, As[0].device)
        parts.append(count_stage(found, *own[0], pairs=pairs).counts[:, 0])
    if len(parts) == 1:
        return parts[0]
    order = [i for members in members_of.values() for i in members]
    places = sorted(range(len(As)), key=order.__getitem__)
    return torch.cat(parts).index_select(0, device_table(places, As[0].device))


def _device_pairs(pairs: Sequence[tuple[float, float]], device: torch.device) -> Tensor:
    """(N, 1, 2) thresholds on the device, without a copy from the host: float64 as the bits of int64."""
    bits = [struct.unpack("<q", struct.pack("<d", value))[0] for pair in pairs for value in pair]
    return device_table(bits, device).view(torch.float64).view(-1, 1, 2)


def intervals(
    op: str, A: Tensor, atol: float | None, rtol: float | None, center: bool, mode: str, seed: int
) -> tuple[Tensor, Tensor]:
    """Certified lower and upper bounds (*,) of the near-rank."""
    absolute, relative = effective_tolerances(A, atol, rtol)
    plan = _plan(op, A, relative if absolute == 0 else None, center, mode=mode)
    if not _has_kernels():
        lower, upper = _cpu.intervals(op, A.cpu(), atol, rtol, center, mode, seed)
        return lower.to(A.device), upper.to(A.device)
    assert plan.gram != "svd"
    if plan.certificate == "probed":
        from ..triton.gram import gram_set
        from ..triton.probe import probe_error

        view = view_of(A)
        found = gram_set([view], precision="float32", table_of=device_table)
        error: Tensor | None = probe_error(view, found, seed)
    else:
        found, error = centred_gram_stage([A], plan.gram, center)
    counted = count_stage(found, absolute, relative, gram_error=error, certify=True)
    return counted.lower.view(A.shape[:-2]), counted.upper.view(A.shape[:-2])


def summary(A: Tensor, center: bool) -> Tensor:
    """Spectral summary (*, columns)."""
    if not _has_kernels():
        return _cpu.summary(A.cpu(), center).to(A.device)
    found, _ = centred_gram_stage([A], "float64", center)
    counted = count_stage(found, rtol=1.0, spectrum=True)
    return summary_stage(found, counted).view(*A.shape[:-2], -1)


def record(
    A: Tensor, atol: float | None, rtol: float | None, center: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Near-rank, certified lower and upper bound (*,) and summary (*, columns) from one Gram matrix."""
    if not _has_kernels():
        counts, lower, upper, columns = (x.to(A.device) for x in _cpu.record(A.cpu(), atol, rtol, center))
        return counts, lower, upper, columns
    batch = A.shape[:-2]
    absolute, relative = effective_tolerances(A, atol, rtol)
    found, error = centred_gram_stage([A], "float64", center)
    counted = count_stage(found, absolute, relative, gram_error=error, certify=True, spectrum=True)
    columns = summary_stage(found, counted).view(*batch, -1)
    return counted.counts.view(batch), counted.lower.view(batch), counted.upper.view(batch), columns


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
    """One activation (*, n), leading dimensions observations, reduced in one launch."""
    if not _has_kernels():
        return _cpu.site(A.cpu(), atol, rtol, center, certify).to(A.device)
    absolute, relative = effective_tolerances(A, atol, rtol, A.shape[:-1].numel())
    known = relative if absolute == 0 and not certify else None
    m, n = A.shape[:-1].numel(), A.shape[-1]
    plan = select_backend("site", A.dtype, m, n, rtol=known, device="cuda", center=center)
    precision: Precision = "float32" if plan.gram == "float32" else "float64"
    found, error = centred_gram_stage([A], precision, center, batch=False)
    return Site(found, error, (absolute, relative), certify, _current_stream(A.device))


def site_records(sites: Sequence[Site | Tensor]) -> Tensor:
    """Near-rank, lower, upper and the summary's columns, (sites, 3 + columns) float64: one counting launch.

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
        pairs=None if same else _device_pairs(tolerances, device),
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


def feature_gram(A: Tensor, center: bool) -> Tensor:
    """AᵀA (*, n, n) in float64, about the column means if centred; NaN for non-finite input."""
    found, _ = centred_gram_stage([A], "float64", center, features_side=True)
    (row,) = rows_of(found)
    G = row.grams
    # One non-finite entry spoils its row and column only; the result says NaN everywhere, as on a CPU.
    G += torch.where(torch.isfinite(G.diagonal(dim1=-2, dim2=-1).sum(-1)), 0.0, torch.nan)[:, None, None]
    back = _unscaling(found)
    if back is not None:
        G *= back[:, None, None]  # twice: its square may not be representable
        G *= back[:, None, None]
    return G.view(*A.shape[:-2], A.shape[-1], A.shape[-1])


def _unscaling(found: GramSet) -> Tensor | None:
    """What takes the power-of-two scaling of float64 input off again, (N,)."""
    from ..triton.gram import power_of_two

    if found.exponent is None:
        return None
    return power_of_two(-found.exponent)


def shifted_gram(A: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Column sums (n,) and Gram matrix (n, n) of A - shift, A (m, n), in float64."""
    found = gram_stage([A], "float64", features_side=True, shift=shift)
    (row,) = rows_of(found)
    assert row.sums is not None
    sums, G = row.sums[0], row.grams[0]
    back = _unscaling(found)
    return (sums, G) if back is None else (sums * back, G * back * back)
