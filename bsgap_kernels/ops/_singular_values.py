"""Counting on the CPU, shared by every op that counts: tolerances, the choice of path, the SVD path."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import FLOAT64_GRAM_MIN_RTOL, default_rtol, select_backend


def effective_tolerances(A: Tensor, atol: float | None, rtol: float | None) -> tuple[float, float]:
    """torch.linalg.matrix_rank's rules: rtol defaults to eps * max(m, n), or to 0 where atol > 0."""
    atol_value = 0.0 if atol is None else float(atol)
    if rtol is None:
        rtol_value = 0.0 if atol_value > 0 else default_rtol(A.dtype, A.shape[-2], A.shape[-1])
    else:
        rtol_value = float(rtol)
    return atol_value, rtol_value


def threshold_pairs(A: Tensor, atol: Tensor | None, rtol: Tensor | None) -> Tensor:
    """(atol, rtol) pairs in float64, shape (*, 2), by the same rules for tensors."""
    absolute = (
        torch.zeros((), dtype=torch.float64, device=A.device)
        if atol is None
        else atol.to(A.device, torch.float64)
    )
    if rtol is None:
        default = torch.full((), default_rtol(A.dtype, *A.shape[-2:]), dtype=torch.float64, device=A.device)
        relative = default if atol is None else torch.where(absolute > 0, torch.zeros_like(default), default)
    else:
        relative = rtol.to(A.device, torch.float64)
    return torch.stack(torch.broadcast_tensors(absolute, relative), -1)


def centred(A: Tensor) -> Tensor:
    """A in float64 less its column means."""
    wide = A.double()
    return wide - wide.mean(-2, keepdim=True)


def svd_counts(A: Tensor, pairs: Tensor, center: bool) -> Tensor:
    """Counts (*, t) from float64 singular values, -1 for non-finite; pairs (*, t, 2) broadcast."""
    finite = torch.isfinite(A).all(-1).all(-1)
    wide = torch.where(finite[..., None, None], A.double(), torch.zeros((), dtype=torch.float64))
    sigma = torch.linalg.svdvals(centred(wide) if center else wide)
    tau = torch.maximum(pairs[..., 0], pairs[..., 1] * sigma[..., :1])
    counts = (sigma[..., None, :] > tau[..., None]).sum(-1)
    return counts.masked_fill(~finite[..., None] | torch.isnan(tau), -1)


def count_scalar(op: str, A: Tensor, atol: float | None, rtol: float | None, center: bool) -> Tensor:
    """Near-rank (*,) for one pair of tolerances."""
    batch = A.shape[:-2]
    m, n = A.shape[-2:]
    if A.numel() == 0:
        return torch.zeros(batch, dtype=torch.int64)
    absolute, relative = effective_tolerances(A, atol, rtol)
    static = absolute == 0  # then sigma_max does not matter: tau_rel is rtol
    plan = select_backend(op, A.dtype, m, n, rtol=relative if static else None)
    if plan.gram != "svd":
        counts, smallest_tau = torch.ops.bsgap._counts(
            A, None, absolute, relative, center, plan.gram == "float32"
        )
        if static or bool((smallest_tau >= FLOAT64_GRAM_MIN_RTOL).all()):
            return counts.view(batch)
    pair = torch.tensor([[absolute, relative]], dtype=torch.float64)
    return svd_counts(A, pair, center)[..., 0]


def count_pairs(op: str, A: Tensor, pairs: Tensor, center: bool) -> Tensor:
    """Counts (*, t) for float64 threshold pairs (*, t, 2) that broadcast with the batch of A."""
    batch = A.shape[:-2]
    t = pairs.shape[-2]
    if A.numel() == 0 or t == 0:
        return torch.zeros((*torch.broadcast_shapes(batch, pairs.shape[:-2]), t), dtype=torch.int64)
    plan = select_backend(op, A.dtype, A.shape[-2], A.shape[-1], rtol=None, thresholds=t)
    full = torch.broadcast_shapes(batch, pairs.shape[:-2])
    if full != batch:  # more thresholds than matrices: one Gram matrix serves all that share it
        return svd_counts(A, pairs, center)
    if plan.count == "eigenvalues":
        sigma = gram_singular_values(A, center)
        tau = torch.maximum(pairs[..., 0], pairs[..., 1] * sigma[..., :1])
        counts = (sigma[..., None, :] > tau[..., None]).sum(-1)
        counts = counts.masked_fill(torch.isnan(sigma[..., :1]) | torch.isnan(tau), -1)
        unresolved = bool((tau < FLOAT64_GRAM_MIN_RTOL * sigma[..., :1]).any())
    else:
        shared = pairs.numel() == 2 * t
        flat = pairs.reshape(1, t, 2) if shared else pairs.expand(*batch, t, 2).reshape(-1, t, 2)
        flat_counts, smallest_tau = torch.ops.bsgap._counts(A, flat.contiguous(), 0.0, 0.0, center, False)
        counts = flat_counts.view(*batch, t)
        unresolved = bool((smallest_tau < FLOAT64_GRAM_MIN_RTOL).any())
    return svd_counts(A, pairs, center) if unresolved else counts


def gram_singular_values(A: Tensor, center: bool) -> Tensor:
    """Singular values (*, k), descending, from the float64 Gram matrix; NaN for non-finite input."""
    gram, exponent, _, _ = torch.ops.bsgap._small_gram(A, 0.0, 0.0, center, False)
    sigma = torch.linalg.eigvalsh(gram).flip(-1).clamp_min_(0).sqrt_()
    non_finite = exponent == torch.iinfo(torch.int32).min  # the mark that the private op leaves
    sigma = torch.ldexp(sigma, -exponent.masked_fill(non_finite, 0)[:, None])
    return sigma.masked_fill_(non_finite[:, None], torch.nan).view(*A.shape[:-2], min(A.shape[-2:]))
