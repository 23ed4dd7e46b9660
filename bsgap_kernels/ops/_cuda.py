"""CUDA implementations of the private ops that count: Gram matrices (Triton), then counts (CUDA C++).

Inputs are checked, and no matrix is empty. Nothing here waits for the device or looks at a value, so every
call can be captured in a CUDA graph, but for what an installation without nvcc does on the host.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .. import _native
from ..rounding import SMALLEST_SUBNORMAL, UNIT_ROUNDOFF, gamma
from ..triton.memory import device_table
from ._register import PrivateKernels, implement_private

if TYPE_CHECKING:
    from ..triton.gram import GramSet
    from ..triton.table import MatrixView

Precision = Literal["float32", "float64"]


def near_rank(A: Tensor, rtol: float, center: bool, float32_sums: bool) -> Tensor:
    """Near-rank (*,) at one rtol which the Gram matrix is known to resolve."""
    found, _ = centred_gram_stage([A], precision_of(float32_sums), center)
    return count_stage(found, rtol=rtol).counts.view(A.shape[:-2])


def counts(
    A: Tensor, thresholds: Tensor | None, atol: float, rtol: float, center: bool, float32_sums: bool
) -> tuple[Tensor, Tensor]:
    """Counts (B, t)."""
    found, _ = centred_gram_stage([A], precision_of(float32_sums), center)
    return count_stage(found, atol, rtol, pairs=thresholds).counts, torch.empty(0, dtype=torch.float64)


def grouped_counts(
    As: Sequence[Tensor], atol: float, rtol: Sequence[float], center: bool, float32_sums: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Near-rank (len(As),) of matrices (*, n_i), whose leading dimensions are all rows.

    All that share a dtype and an accumulation go through the Gram stage and the count stage together.
    """
    # float64 input is looked over for extreme values first: apart, so that only it pays.
    kinds = [(float32, A.dtype == torch.float64) for float32, A in zip(float32_sums, As, strict=True)]
    found: dict[int, Tensor] = {}
    for kind in dict.fromkeys(kinds):
        members = [i for i, own in enumerate(kinds) if own == kind]
        grams, _ = centred_gram_stage([As[i] for i in members], precision_of(kind[0]), center, batch=False)
        own = [(atol, rtol[i]) for i in members]
        pairs = None if len(set(own)) == 1 else device_pairs(own, As[0].device)
        part = count_stage(grams, *own[0], pairs=pairs).counts[:, 0]
        if len(members) == len(As):
            return part, torch.empty(0, dtype=torch.float64)
        found |= zip(members, part.split(1), strict=True)
    return torch.cat([found[i] for i in range(len(As))]), torch.empty(0, dtype=torch.float64)


def intervals(
    A: Tensor, atol: float, rtol: float, center: bool, probed: bool, seed: int
) -> tuple[Tensor, Tensor]:
    """Certified lower and upper bounds (*,) of the near-rank."""
    if not _native.has_cuda_kernels():
        return on_host("_intervals", A, atol, rtol, center, probed, seed)
    error: Tensor | None
    if probed:
        from ..triton.gram import gram_set
        from ..triton.probe import probe_error

        view = view_of(A)
        found = gram_set([view], precision="float32")
        error = probe_error(view, found, seed)
    else:
        found, error = centred_gram_stage([A], "float64", center)
    counted = count_stage(found, atol, rtol, gram_error=error, certify=True)
    return counted.lower.view(A.shape[:-2]), counted.upper.view(A.shape[:-2])


def precision_of(float32_sums: bool) -> Precision:
    """The accumulation's name."""
    return "float32" if float32_sums else "float64"


def on_host(op: str, *args: Any) -> Any:
    """Run a private op on copies in host memory, which waits for the device; results go back to it."""
    devices = [x.device for x in _tensors(args)]
    result = getattr(torch.ops.bsgap, op)(*_moved(args, torch.device("cpu")))
    return _moved(result, devices[0])


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, (list, tuple)):
        return [x for item in value for x in _tensors(item)]
    return [value] if isinstance(value, Tensor) else []


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(item, device) for item in value)
    return value.to(device) if isinstance(value, Tensor) else value


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
    return gram_set(views, precision=precision, features_side=features_side, shift=shift)


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
    """Mark the matrices whose rows are not all equal, (count,); A and batch as in `gram_stage`."""
    if not batch:
        return (A[(0,) * (A.dim() - 1)] != A).any().view(1)
    return (A[..., :1, :] != A).flatten(-2).any(-1).view(-1)


@dataclass(frozen=True)
class Counted:
    """Results of the counting kernels, in the order of the views; empty tensors where not asked for."""

    counts: Tensor
    lower: Tensor
    upper: Tensor
    eigenvalues: Tensor
    moments: Tensor


def count_stage(
    found: GramSet,
    atol: float = 0.0,
    rtol: float = 0.0,
    *,
    pairs: Tensor | None = None,
    gram_error: Tensor | None = None,
    certify: bool = False,
    spectrum: bool = False,
    moments: bool = False,
) -> Counted:
    """Counts (N, t), certified bounds, eigenvalues and moments (N, 3) of a set of Gram matrices."""
    return Counted(
        *torch.ops.bsgap._cuda_counts(
            found.grams, found.table, found.plan.sides, found.plan.batches, pairs, atol, rtol, found.exponent,
            gram_error, certify, spectrum, moments,
        )
    )  # fmt: skip


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


KERNELS: PrivateKernels = {
    "_near_rank": near_rank,
    "_counts": counts,
    "_grouped_counts": grouped_counts,
    "_intervals": intervals,
}
implement_private(KERNELS, "CUDA")
