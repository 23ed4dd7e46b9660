"""near_rank_interval: a count with its proof, as bounds that hold for any rounding."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..dispatch import largest_rank, plan_of
from . import _checks, _hermitian
from ._real_form import halved_interval, real_form
from ._register import implement
from ._tolerances import effective_tolerances
from .near_rank import argument_problem, checked_tolerances

MODES = ("rigorous", "probed")


class CountInterval(NamedTuple):
    """lower <= near-rank <= upper, int64; equal bounds prove the count."""

    lower: Tensor
    upper: Tensor


def near_rank_interval(
    A: Tensor,
    *,
    atol: float | None = None,
    rtol: float | None = None,
    center: bool = False,
    hermitian: bool = False,
    mode: Literal["rigorous", "probed"] = "rigorous",
    seed: int = 0,
    **refused: Any,
) -> CountInterval:
    """Bounds lower <= #{σ > max(atol, rtol·σ_max)} <= upper that hold whatever rounding did.

    Shapes: A (*, m, n) as `near_rank`; results (*), int64. Defaults of the tolerances as `near_rank`.
    mode "rigorous" is deterministic: float64 Gram matrix, a-priori bound of its rounding, LDLᵀ whose
    error is computed from its own factors, σ_max bounded on both sides. mode "probed" lets 9 Gaussian
    probes drawn from `seed` bound the error of a cheaper Gram matrix and fails with probability at most
    1e-9 a matrix, over the seed; where that does not pay (min(m, n) < 288 or rtol < 8.3e-3, on a GPU < 424 or
    < 9.95e-3; atol, float64 input; on a GPU, centring) it is "rigorous".
    A complex matrix is counted as the real [[Re, -Im], [Im, Re]], which has each singular value twice.
    `hermitian` as `near_rank`.
    A threshold that cannot be resolved gives a wide interval, at worst [0, min(m, n)]; singular values
    equal to the threshold (ties) lie in it. Resolves rtol ≥ about √(50·γ·‖A‖_F²/σ_max²),
    γ ≈ 1e-16·(256 + max(m, n)/256 + min(m, n)).
    Non-finite input gives (-1, -1), an empty matrix (0, 0). Never requires grad; does not synchronise.
    Cost: `near_rank`'s with a float64 Gram matrix and one LDLᵀ more.
    Raises as `near_rank`; ValueError for mode and seed.
    Source: docs/certificates.md; Higham, Accuracy and Stability of Numerical Algorithms (2002), chapters 3,
    8 and 10; Halko, Martinsson & Tropp, SIAM Review 53 (2011), lemma 4.1.
    """
    _checks.refuse("near_rank_interval", refused)
    for name, value in (("atol", atol), ("rtol", rtol)):
        if isinstance(value, Tensor):
            raise TypeError(f"{name} must be a number or None for near_rank_interval, got a tensor")
    checked_tolerances(A, atol, rtol, center, hermitian=hermitian)
    atol, rtol = (None if value is None else float(value) for value in (atol, rtol))
    _checks.raise_public(_option_problem(mode, seed))
    lower, upper = torch.ops.bsgap.near_rank_interval(
        A, atol=atol, rtol=rtol, center=center, hermitian=hermitian, mode=mode, seed=seed
    )
    return CountInterval(lower, upper)


def _option_problem(mode: object, seed: object) -> _checks.Problem | None:
    if mode not in MODES:
        return ValueError, f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}"
    if isinstance(seed, bool) or not isinstance(seed, int):
        return TypeError, f"seed must be an int, got {seed!r}"
    if not 0 <= seed < 2**63:
        return ValueError, f"seed must lie in 0 ... 2^63 - 1, got {seed}"
    return None


def _kernel(
    A: Tensor,
    *,
    atol: float | None = None,
    rtol: float | None = None,
    center: bool = False,
    hermitian: bool = False,
    mode: str = "rigorous",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    wrong = argument_problem(A, center, atol, rtol, hermitian=hermitian)
    _checks.raise_raw("near_rank_interval", wrong or _option_problem(mode, seed))
    batch = A.shape[:-2]
    if A.numel() == 0:
        return A.new_zeros(batch, dtype=torch.int64), A.new_zeros(batch, dtype=torch.int64)
    absolute, relative = effective_tolerances(A, atol, rtol)
    if hermitian:
        A = _hermitian.of_lower_triangle(A)
    B = real_form(A)
    plan = plan_of("near_rank_interval", B, relative if absolute == 0 else None, center, mode=mode)
    probed = plan.certificate == "probed"
    lower, upper = torch.ops.bsgap._intervals(B, absolute, relative, center, probed, seed)
    lower, upper = halved_interval(lower, upper, A)
    return lower, upper.clamp_(max=largest_rank(A.shape[-2], A.shape[-1], center)) if center else upper


def _fake(
    A: Tensor,
    *,
    atol: float | None = None,
    rtol: float | None = None,
    center: bool = False,
    hermitian: bool = False,
    mode: str = "rigorous",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    wrong = argument_problem(A, center, atol, rtol, hermitian=hermitian)
    _checks.raise_raw("near_rank_interval", wrong or _option_problem(mode, seed))
    return A.new_empty(A.shape[:-2], dtype=torch.int64), A.new_empty(A.shape[:-2], dtype=torch.int64)


implement("near_rank_interval", _kernel, _fake, differentiable=False)
