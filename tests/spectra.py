"""Test matrices whose singular values are known: prescribed and rounded, or represented exactly.

``from_singular_values`` multiplies random orthogonal factors by chosen singular values in float64 and rounds
once; ``with_count`` also proves that the rounding kept the margin around the threshold. ``hadamard_spectrum``
and ``signed_permutation_spectrum`` are exact: every entry is representable, so that ties and clusters are
what they say.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def orthogonal(n: int, columns: int | None = None, *, seed: int = 0) -> Tensor:
    """First ``columns`` columns of a random orthogonal n x n matrix (Haar), float64."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(n, n if columns is None else columns, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    # The signs of R's diagonal make the distribution uniform; QR alone prefers some signs.
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(torch.float64)
    return q * signs


def from_singular_values(
    sigma: Tensor | Sequence[float], m: int, n: int, *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Tensor:
    """U diag(σ) Vᵀ of shape (m, n), U and V random orthogonal, in float64 and rounded once to ``dtype``.

    Fewer than min(m, n) values are filled up with zeros: the matrix is then rank-deficient up to the
    rounding.
    """
    values = torch.as_tensor(sigma, dtype=torch.float64)
    if values.numel() > min(m, n):
        raise ValueError(f"{values.numel()} singular values do not fit a {m} x {n} matrix")
    u = orthogonal(m, values.numel(), seed=2 * seed)
    v = orthogonal(n, values.numel(), seed=2 * seed + 1)
    return ((u * values) @ v.mT).to(dtype)


def with_count(
    m: int,
    n: int,
    count: int,
    rtol: float,
    *,
    margin: float,
    dtype: torch.dtype = torch.float64,
    scale: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Matrix with exactly ``count`` singular values above rtol·σ_1, none within a relative ``margin`` of it.

    The values above are spread geometrically from σ_1 = ``scale`` down to rtol·(1 + 2 margin), those below
    from rtol·(1 − 2 margin) downwards. By Weyl's inequality rounding to ``dtype`` moves each by at most
    ‖ΔA‖_F, which is measured; a rounding that could eat the margin is an error here, not a wrong count later.
    """
    k = min(m, n)
    if not 1 <= count <= k or not 0 < rtol * (1 + 2 * margin) < 1 or not 0 < margin < 0.25:
        raise ValueError(f"no {m} x {n} matrix has {count} values above {rtol} with margin {margin}")
    above = geometric(count, rtol * (1 + 2 * margin))
    below = rtol * (1 - 2 * margin) * geometric(k - count, 0.01)
    exact = from_singular_values(scale * torch.cat([above, below]), m, n, seed=seed)
    rounded = exact.to(dtype)
    # The second term: the factors are orthogonal up to a few rounding errors.
    moved = float(torch.linalg.matrix_norm(rounded.to(torch.float64) - exact)) / scale + 1e-15 * max(m, n)
    if moved * (1 + rtol * (1 + margin)) > margin * rtol:
        raise ValueError(
            f"rounding to {dtype} moves singular values by {moved:.1e}: too much for margin {margin}"
        )
    return rounded


def geometric(k: int, last: float) -> Tensor:
    """k values from 1 down to ``last`` in a constant ratio (only 1 for k = 1), float64."""
    return torch.logspace(0, torch.tensor(last, dtype=torch.float64).log10().item(), k, dtype=torch.float64)


def clustered(k: int, centre: float, width: float, inside: int) -> Tensor:
    """1, ``inside`` values within centre·(1 ± width), then values up to centre/10: k in all, descending."""
    if not 0 < inside < k or not 0 < width < 0.5 or centre * (1 + width) >= 1:
        raise ValueError("a cluster needs 0 < inside < k, 0 < width < 0.5 and centre·(1 + width) < 1")
    cluster = centre * torch.linspace(1 + width, 1 - width, inside, dtype=torch.float64)
    rest = 0.1 * centre * geometric(k - 1 - inside, 0.1)
    return torch.cat([torch.ones(1, dtype=torch.float64), cluster, rest])


def hadamard(n: int) -> Tensor:
    """Sylvester's Hadamard matrix of order n (a power of two): entries ±1, H Hᵀ = n I, float64."""
    if n < 1 or n & (n - 1):
        raise ValueError(f"Sylvester's construction needs a power of two, got {n}")
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h


def hadamard_spectrum(
    sigma: Tensor | Sequence[float], m: int, *, dtype: torch.dtype = torch.float64, two_sided: bool = True
) -> Tensor:
    """Dense m x n matrix, n = len(σ), whose singular values are exactly ``sigma``.

    Two-sided: H_m[:, :n] diag(σ / √(mn)) H_n, with m, n powers of two and m·n a power of four so that √(mn)
    is one too. One-sided: H_m[:, :n] diag(σ / √m) with m a power of four, any n ≤ m. Both factors have
    orthogonal columns of equal norm. The entries are sums of ±σ_i/√(mn); σ must be dyadic with few enough
    bits that every sum is exact in ``dtype``, which is checked.
    """
    values = torch.as_tensor(sigma, dtype=torch.float64)
    n = values.numel()
    if n > m:
        raise ValueError(f"more singular values ({n}) than rows ({m})")
    root = (m * n if two_sided else m) ** 0.5
    if not root.is_integer():
        raise ValueError(f"{'m·n' if two_sided else 'm'} must be a power of four, got {m} x {n}")
    scaled = values / root
    left = hadamard(m)[:, :n]
    exact = (left * scaled) @ hadamard(n) if two_sided else left * scaled
    if two_sided and not _sums_are_exact(scaled):
        raise ValueError("the singular values span too many bits for exact sums in float64")
    rounded = exact.to(dtype)
    if not torch.equal(rounded.to(torch.float64), exact):
        raise ValueError(f"the singular values span too many bits for {dtype}")
    return rounded


def _sums_are_exact(values: Tensor) -> bool:
    """Whether every ± sum is exact in float64: all values are multiples of one u, and Σ|v| ≤ 2^53 u."""
    nonzero = [abs(v) for v in values.tolist() if v != 0]
    if not nonzero:
        return True
    ratios = [v.as_integer_ratio() for v in nonzero]
    denominator = max(d for _, d in ratios)  # dyadic: the largest is the common one
    return sum(p * (denominator // d) for p, d in ratios) <= 2**53


def signed_permutation_spectrum(
    sigma: Tensor | Sequence[float], m: int, n: int, *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Tensor:
    """Sparse m x n matrix with exactly the singular values ``sigma``, any that ``dtype`` represents.

    One entry ±σ_i in row p(i), column q(i); p, q and the signs are random.
    """
    values = torch.as_tensor(sigma, dtype=torch.float64)
    if values.numel() > min(m, n):
        raise ValueError(f"{values.numel()} singular values do not fit a {m} x {n} matrix")
    if not torch.equal(values.to(dtype).to(torch.float64), values):
        raise ValueError(f"a singular value is not representable in {dtype}")
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(m, generator=generator)[: values.numel()]
    columns = torch.randperm(n, generator=generator)[: values.numel()]
    signs = 1 - 2 * torch.randint(0, 2, (values.numel(),), generator=generator)
    result = torch.zeros(m, n, dtype=dtype)
    result[rows, columns] = (signs * values).to(dtype)
    return result
