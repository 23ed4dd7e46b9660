"""Stages of a call on a GPU: views to Gram matrices (Triton), those to counts and spectra (CUDA C++)."""

from __future__ import annotations

import functools
import math
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..triton.config import UNIT_ROUNDOFF, gamma

if TYPE_CHECKING:
    from ..triton.gram import GramSet
    from ..triton.table import MatrixView

SMALLEST_SUBNORMAL = 2.0**-1074
Precision = Literal["float32", "float64"]


def device_table(values: list[int], device: torch.device) -> Tensor:
    """int64 values on the device, written by a kernel that carries them as parameters: capturable."""
    if not has_kernels():
        return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)
    table = torch.empty(len(values), dtype=torch.int64, device=device)
    torch.ops.bsgap._cuda_fill(table, values)
    return table


@functools.cache
def has_kernels() -> bool:
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
    """Gram matrices of all inputs together, results in their order: plan.py says in which launches.

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
    if not has_kernels():
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


def device_pairs(pairs: Sequence[tuple[float, float]], device: torch.device) -> Tensor:
    """(N, 1, 2) thresholds on the device, without a copy from the host: float64 as the bits of int64."""
    bits = [struct.unpack("<q", struct.pack("<d", value))[0] for pair in pairs for value in pair]
    return device_table(bits, device).view(torch.float64).view(-1, 1, 2)


def unscaling(found: GramSet) -> Tensor | None:
    """What takes the power-of-two scaling of float64 input off again, (N,)."""
    from ..triton.gram import power_of_two

    if found.exponent is None:
        return None
    return power_of_two(-found.exponent)
