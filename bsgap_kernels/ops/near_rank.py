"""near_rank: #{σ > max(atol, rtol·σ_max)}, where torch.linalg.matrix_rank stood."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..schema import LIBRARY
from . import _checks, _hermitian
from ._real_form import halved, real_form
from ._register import implement
from ._solvers import eigenvalue_counts, svd_counts
from ._tolerances import effective_tolerances, scalar_pair, threshold_pairs

Tolerance = float | Tensor | None
_NEAR_RANK: Callable[..., Tensor] = torch.ops.bsgap._near_rank.default
_COUNTS: Callable[..., tuple[Tensor, Tensor]] = torch.ops.bsgap._counts.default


def near_rank(
    A: Tensor,
    tol: Tolerance = None,
    hermitian: bool = False,
    *,
    atol: Tolerance = None,
    rtol: Tolerance = None,
    center: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Number of singular values above τ = max(atol, rtol·σ_max), as torch.linalg.matrix_rank counts them.

    Shapes: A (*, m, n), any strides, float64 / float32 / bfloat16 / float16 / complex128 / complex64; result
    (*), int64 (tensor tolerances broadcast with the batch). `center` subtracts the column means of a real
    matrix first. A complex one is counted as the real [[Re, -Im], [Im, Re]], four times its arithmetic.
    `hermitian`: A is square, and only its lower triangle is read; σ are |eigenvalues|, which
    `torch.linalg.eigvalsh` gives where a Gram matrix would not resolve τ.
    Defaults: rtol = eps·max(m, n), or 0 where atol > 0; eps is float32's for the 16-bit formats. `tol`,
    NumPy's name that torch documents as deprecated, stands for atol with rtol = 0. `out` receives the counts
    and is returned.
    Accumulation and band: the count is right for every matrix without singular values within a relative
    distance d of τ. From rtol 8.3e-3 (on a GPU 9.95e-3) on sums are float32, added in float64 every 128 rows
    (on a GPU 256, of float32 input 64), below float64. Below 2e-7 of a few rows to 7e-6 of a
    million (on a GPU 4e-5; `float64_gram_min_rtol` in dispatch.py) float64 singular values are computed; on a
    GPU only for a plain rtol: with atol or tensor tolerances nothing is read back, and a count below that
    limit may be wrong without notice. On a CPU d < 1 % is
    proven of the sums where no entry is negative. Entries of both signs have d < 1 % where they were measured
    (benchmarks/results/gram_error.json); proven is ‖A‖_F²/σ_max² times as much, and constructed matrices
    reach 21 %. On a GPU a published model of Hopper's tensor cores takes the place of the proof, for 16-bit
    input with d < 4.9 % in the worst case; not yet measured. `near_rank_interval` proves its counts, this
    does not.
    Non-finite input gives -1; an empty matrix gives 0. Never requires grad.
    Cost: half a Gram matrix (m n k flops, k = min(m, n)) and two LDLᵀ (k³/3 each), or an SVD.
    Raises TypeError / ValueError that name the argument.
    Source: torch.linalg.matrix_rank for the rules; docs/certificates.md for the numerics.
    """
    if tol is not None:
        _checks.raise_public(
            _checks.counted_matrix(A) or _checks.tolerance(tol, "tol", A) or _tol_problem(tol, atol, rtol)
        )
        atol, rtol = tol, 0.0
    atol, rtol = checked_tolerances(A, atol, rtol, center, hermitian=hermitian)
    of_tensors = isinstance(atol, Tensor) or isinstance(rtol, Tensor)
    if out is not None:
        _checks.raise_public(_out_problem(A, out))
        op = torch.ops.bsgap.near_rank.tensor_out if of_tensors else torch.ops.bsgap.near_rank.out
        return op(A, None, hermitian, atol=atol, rtol=rtol, center=center, out=out)
    if of_tensors:
        return torch.ops.bsgap.near_rank.tensor(A, None, hermitian, atol=atol, rtol=rtol, center=center)
    return torch.ops.bsgap.near_rank.default(A, None, hermitian, atol=atol, rtol=rtol, center=center)


def _tol_problem(tol: Tolerance, atol: Tolerance, rtol: Tolerance) -> _checks.Problem | None:
    if tol is not None and (atol is not None or rtol is not None):
        return TypeError, "tol is another name of atol with rtol = 0: pass it alone, or atol and rtol"
    return None


def _out_problem(A: Tensor, out: object) -> _checks.Problem | None:
    if not isinstance(out, Tensor):
        return TypeError, f"out must be a torch.Tensor or None, got {type(out).__name__}"
    if out.dtype == torch.bool:  # the one dtype that int64 is not cast to; the words are torch's
        return TypeError, "out: expected a dtype that holds counts, but got result with dtype Bool"
    if out.device != A.device:
        text = f"out: expected all tensors to be on the same device, A is on {A.device}, out on {out.device}"
        return ValueError, text
    return None


def checked_tolerances(
    A: Tensor,
    atol: Tolerance,
    rtol: Tolerance,
    center: object,
    m: int | None = None,
    *,
    hermitian: object = False,
) -> tuple[Tolerance, Tolerance]:
    """Raises what is wrong with the arguments; where one tolerance is a tensor both come back as tensors.

    m: the number of rows, if it is not A.shape[-2].
    """
    _checks.raise_public(_checks.counted_matrix(A))
    _checks.raise_public(
        _checks.first(
            _checks.tolerance(atol, "atol", A),
            _checks.tolerance(rtol, "rtol", A),
            _checks.flag(center, "center"),
            _checks.centred(A, center),
            _hermitian.problem(A, center, hermitian),
        )
    )
    if isinstance(atol, Tensor) or isinstance(rtol, Tensor):
        return as_tensor(atol, A), as_tensor(rtol, A)
    atol, rtol = (None if value is None else float(value) for value in (atol, rtol))
    if (rtol is None or rtol >= 1) and not torch.compiler.is_compiling() and A.numel() > 0:
        relative = effective_tolerances(A, atol, rtol, m)[1]
        if relative >= 1:
            warnings.warn(
                f"rtol is {relative:g}: no singular value exceeds σ_max, so every count is 0. "
                "Pass a smaller rtol, or atol for an absolute threshold.",
                stacklevel=3,
            )
    return atol, rtol


def as_tensor(value: Tolerance, A: Tensor) -> Tensor | None:
    """A tolerance as a float64 tensor on A's device."""
    if value is None or isinstance(value, Tensor):
        return value
    return torch.full((), float(value), dtype=torch.float64, device=A.device)


def argument_problem(
    A: Tensor,
    center: bool,
    atol: Tolerance,
    rtol: Tolerance,
    tol: Tolerance = None,
    *,
    hermitian: bool = False,
) -> _checks.Problem | None:
    """What is wrong with the arguments of a raw op."""
    return (
        _checks.counted_matrix(A)
        or _checks.centred(A, center)
        or _hermitian.problem(A, center, hermitian)
        or _checks.tolerance(atol, "atol", A)
        or _checks.tolerance(rtol, "rtol", A)
        or _checks.tolerance(tol, "tol", A)
        or _tol_problem(tol, atol, rtol)
    )


def tensor_batch(A: Tensor, atol: Tensor | None, rtol: Tensor | None) -> torch.Size:
    """Result shape of the tensor overloads."""
    if A.numel() == 0:
        return A.shape[:-2]
    shapes = [t.shape for t in (atol, rtol) if t is not None]
    return torch.broadcast_shapes(A.shape[:-2], *shapes)


def _kernel(
    A: Tensor,
    tol: float | None = None,
    hermitian: bool = False,
    *,
    atol: float | None = None,
    rtol: float | None = None,
    center: bool = False,
) -> Tensor:
    _checks.raise_raw("near_rank", argument_problem(A, center, atol, rtol, tol, hermitian=hermitian))
    if A.numel() == 0:
        return A.new_zeros(A.shape[:-2], dtype=torch.int64)
    if tol is not None:
        atol, rtol = tol, 0.0
    return count("near_rank", A, *effective_tolerances(A, atol, rtol), center, hermitian)


def count(op: str, A: Tensor, atol: float, rtol: float, center: bool, hermitian: bool = False) -> Tensor:
    """Near-rank (*,) of matrices that are not empty, for one pair of tolerances."""
    if hermitian:
        A = _hermitian.of_lower_triangle(A)
    counts = _count(op, A, atol, rtol, center, hermitian)
    return counts.clamp_(max=dispatch.largest_rank(A.shape[-2], A.shape[-1], center)) if center else counts


def _count(op: str, A: Tensor, atol: float, rtol: float, center: bool, hermitian: bool) -> Tensor:
    static = atol == 0  # then sigma_max does not matter: tau_rel is rtol
    B = real_form(A)
    plan = dispatch.plan_of(op, B, rtol if static else None, center, hermitian=hermitian)
    if plan.count == "kernels":
        if static:
            return halved(_NEAR_RANK(B, rtol, center, plan.gram == "float32"), A)
        counts, smallest_tau = _COUNTS(B, None, atol, rtol, center, False)
        if dispatch.resolved(op, B, smallest_tau, hermitian=hermitian):
            return halved(counts.view(A.shape[:-2]), A)
    pair = scalar_pair(A, atol, rtol)
    if plan.gram is not None and plan.count == "eigvalsh":
        return halved(eigenvalue_counts(op, B, pair, center, hermitian)[..., 0], A)
    return svd_counts(op, A, pair, center, hermitian)[..., 0]


def _tensor_kernel(
    A: Tensor,
    tol: Tensor | None = None,
    hermitian: bool = False,
    *,
    atol: Tensor | None = None,
    rtol: Tensor | None = None,
    center: bool = False,
) -> Tensor:
    _checks.raise_raw("near_rank", argument_problem(A, center, atol, rtol, tol, hermitian=hermitian))
    if tol is not None:
        atol, rtol = tol, torch.zeros((), dtype=torch.float64, device=A.device)
    if atol is None and rtol is None:  # torch takes this overload where neither is given
        return _kernel(A, None, hermitian, center=center)
    if A.numel() == 0:
        return A.new_zeros(A.shape[:-2], dtype=torch.int64)
    pairs = threshold_pairs(A, atol, rtol)[..., None, :]
    return count_pairs("near_rank", A, pairs, center, hermitian)[..., 0]


def count_pairs(op: str, A: Tensor, pairs: Tensor, center: bool, hermitian: bool = False) -> Tensor:
    """Counts (*, t) for float64 pairs (atol, rtol) (*, t, 2) that broadcast with the batch of A, t > 0.

    Without the one that centring takes, which rounding may leave above a small threshold; all min(m, n)
    singular values lie above a negative one.
    """
    if hermitian:
        A = _hermitian.of_lower_triangle(A)
    counts = _count_pairs(op, A, pairs, center, hermitian)
    if not center:
        return counts
    most = counts.clamp(max=dispatch.largest_rank(A.shape[-2], A.shape[-1], center))
    return torch.where(pairs.amax(-1) < 0, counts, most)


def _count_pairs(op: str, A: Tensor, pairs: Tensor, center: bool, hermitian: bool) -> Tensor:
    batch, t = torch.broadcast_shapes(A.shape[:-2], pairs.shape[:-2]), pairs.shape[-2]
    B = real_form(A).expand(*batch, -1, -1)
    plan = dispatch.plan_of(op, B, None, center, thresholds=t, hermitian=hermitian)
    if plan.count == "eigvalsh":
        return halved(eigenvalue_counts(op, B, pairs, center, hermitian), A)
    shared = pairs.numel() == 2 * t
    flat = pairs.reshape(1, t, 2) if shared else pairs.expand(*batch, t, 2).reshape(-1, t, 2)
    counts, smallest_tau = _COUNTS(B, flat.contiguous(), 0.0, 0.0, center, False)
    if dispatch.resolved(op, B, smallest_tau, hermitian=hermitian):
        return halved(counts.view(*batch, t), A)
    return svd_counts(op, A, pairs, center, hermitian)


def _fake(
    A: Tensor,
    tol: float | None = None,
    hermitian: bool = False,
    *,
    atol: float | None = None,
    rtol: float | None = None,
    center: bool = False,
) -> Tensor:
    _checks.raise_raw("near_rank", argument_problem(A, center, atol, rtol, tol, hermitian=hermitian))
    return A.new_empty(A.shape[:-2], dtype=torch.int64)


def _fake_tensor(
    A: Tensor,
    tol: Tensor | None = None,
    hermitian: bool = False,
    *,
    atol: Tensor | None = None,
    rtol: Tensor | None = None,
    center: bool = False,
) -> Tensor:
    _checks.raise_raw("near_rank", argument_problem(A, center, atol, rtol, tol, hermitian=hermitian))
    return A.new_empty(tensor_batch(A, atol if tol is None else tol, rtol), dtype=torch.int64)


def _into(out: Tensor, A: Tensor, op: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    """Counts by op, put into out as torch does: resized with a warning if need be, cast."""
    _checks.raise_raw("near_rank", _checks.counted_matrix(A) or _out_problem(A, out))
    return torch.add(op(A, *args, **options), 0, out=out)


def _out_kernel(A: Tensor, *args: Any, out: Tensor, **options: Any) -> Tensor:
    return _into(out, A, torch.ops.bsgap.near_rank.default, *args, **options)


def _tensor_out_kernel(A: Tensor, *args: Any, out: Tensor, **options: Any) -> Tensor:
    return _into(out, A, torch.ops.bsgap.near_rank.tensor, *args, **options)


implement("near_rank", _kernel, _fake, differentiable=False)
implement("near_rank.tensor", _tensor_kernel, _fake_tensor, differentiable=False)
# Composite: torch.compile has no way for an op of ours that returns what it was given, but takes this apart.
LIBRARY.impl("near_rank.out", _out_kernel, "CompositeImplicitAutograd")
LIBRARY.impl("near_rank.tensor_out", _tensor_out_kernel, "CompositeImplicitAutograd")
