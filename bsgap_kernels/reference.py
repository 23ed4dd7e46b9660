"""Float64 oracles: one plain reference for each metric, to test against and to read.

Conventions, for every function here unless its docstring says otherwise:

* ``A`` has shape (*, m, n): m observations (rows), n features (columns); any real float dtype. It is
  converted to float64 first, so the result belongs to the values as given, rounding of the input included.
* σ_1 ≥ σ_2 ≥ … ≥ σ_k are the singular values, k = min(m, n), by ``torch.linalg.svdvals`` in float64;
  λ_i = σ_i² are the eigenvalues of the Gram matrix AᵀA that can be non-zero.
* ``center=True`` subtracts each column's mean over the rows first. Then λ_i / (m − 1) are the eigenvalues of
  the covariance. All ratios of eigenvalues are the same for the Gram matrix and the covariance.
* A matrix with a non-finite entry gives NaN, or −1 where the result is an integer count; the other matrices
  of the batch are not affected. An empty matrix (m = 0 or n = 0) and a zero matrix give 0. Two exceptions:
  ``alpha_req`` is NaN without at least three eigenvalues to fit, and ``gram`` and ``covariance`` are plain
  arithmetic.
* Float metrics are float64, counts int64, both of the batch shape of ``A``.

Nothing in the ops imports this module, so that an error here and an error there are independent.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_EPS64 = torch.finfo(torch.float64).eps


def _float64(A: Tensor, center: bool) -> Tensor:
    """Returns A in float64, each column less its mean if ``center``."""
    if A.ndim < 2 or not A.is_floating_point():
        raise TypeError(
            f"expected a real float tensor of shape (*, m, n), got {A.dtype} of shape {tuple(A.shape)}"
        )
    values = A.to(torch.float64)
    if center and A.shape[-2] > 0:
        values = values - values.mean(dim=-2, keepdim=True)
    return values


def _count(flags: Tensor, sigma: Tensor) -> Tensor:
    """Number of true flags in each row, −1 where the singular values are NaN."""
    return torch.where(sigma.isnan().any(dim=-1), -1, flags.sum(dim=-1))


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient with x / 0 = 0: a zero matrix has every metric 0. NaN stays NaN."""
    return torch.where(denominator == 0, 0.0, numerator / torch.where(denominator == 0, 1.0, denominator))


def _relative(sigma: Tensor) -> Tensor:
    """σ_i / σ_1, so that squares neither overflow nor underflow. Zero for a zero matrix."""
    return _divide(sigma, sigma[..., :1])


# Matrices


def gram(A: Tensor, *, center: bool = False) -> Tensor:
    """Gram matrix AᵀA of the columns.

    Args:
        A: (*, m, n).
        center: subtract the column means first.

    Returns:
        (*, n, n), float64. All zero for m = 0. Non-finite input propagates as IEEE arithmetic does.
    """
    values = _float64(A, center)
    return values.mT @ values


def covariance(A: Tensor, *, correction: int = 1) -> Tensor:
    """Covariance of the columns, (A − 1ā)ᵀ(A − 1ā) / max(m − correction, 0); ``torch.cov`` of Aᵀ.

    Args:
        A: (*, m, n).
        correction: 1 is the unbiased estimate, 0 divides by m.

    Returns:
        (*, n, n), float64 (the op returns the input's dtype). 0 / 0 = NaN for m ≤ correction, as in
        ``torch.cov``.
    """
    return gram(A, center=True) / max(A.shape[-2] - correction, 0)


# The spectrum and its norms


def singular_values(A: Tensor, *, center: bool = False) -> Tensor:
    """Singular values in descending order.

    Args:
        A: (*, m, n).
        center: subtract the column means first.

    Returns:
        (*, min(m, n)), float64. NaN throughout for a matrix with a non-finite entry.
    """
    values = _float64(A, center)
    # One reduction over both dimensions; LAPACK must not see NaN or infinity.
    finite = values.isfinite().all(dim=-1).all(dim=-1)
    sigma: Tensor = torch.linalg.svdvals(torch.where(finite[..., None, None], values, 0.0))
    return torch.where(finite[..., None], sigma, torch.nan)


def sigma_max(A: Tensor, *, center: bool = False) -> Tensor:
    """Spectral norm σ_1, the largest singular value."""
    return singular_values(A, center=center)[..., :1].sum(dim=-1)


def frobenius_norm(A: Tensor, *, center: bool = False) -> Tensor:
    """Frobenius norm ‖A‖_F = √(Σ σ_i²)."""
    sigma = singular_values(A, center=center)
    return sigma[..., :1].sum(dim=-1) * _relative(sigma).square().sum(dim=-1).sqrt()


# Counts above a threshold


def numerical_rank(
    A: Tensor, *, atol: float | Tensor | None = None, rtol: float | Tensor | None = None, center: bool = False
) -> Tensor:
    """Numerical rank #{σ_i > max(atol, rtol·σ_1)} by the rules of ``torch.linalg.matrix_rank``.

    ``atol`` defaults to 0. ``rtol`` defaults to eps(dtype of A)·max(m, n), but to 0 where ``atol`` > 0.
    Tensor tolerances broadcast against the batch shape of A; the default of ``rtol`` is then decided element
    by element.

    Args:
        A: (*, m, n), float32 or float64 (``matrix_rank`` takes no half; ``near_rank`` does).
        atol: absolute tolerance, a number or a tensor.
        rtol: relative tolerance, a number or a tensor.
        center: subtract the column means first (no such option in ``matrix_rank``).

    Returns:
        int64, the batch shape of A broadcast with the tolerances.

    Source: ``torch.linalg.matrix_rank`` and ``numpy.linalg.matrix_rank``, documentation.
    """
    if A.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"numerical_rank takes float32 or float64, got {A.dtype}")
    return _rank(A, atol, rtol, center, torch.finfo(A.dtype).eps)


def near_rank(
    A: Tensor, *, atol: float | Tensor | None = None, rtol: float | Tensor | None = None, center: bool = False
) -> Tensor:
    """Near-rank #{σ_i > max(atol, rtol·σ_1)}: ``numerical_rank``, for halves too.

    bfloat16 and float16 take float32's eps in the default ``rtol``: with its own, eps(bfloat16)·128 ≥ 1 and
    every count is 0.

    Args:
        A: (*, m, n).
        atol: absolute tolerance, a number or a tensor.
        rtol: relative tolerance, a number or a tensor.
        center: subtract the column means first.

    Returns:
        int64, the batch shape of A broadcast with the tolerances.

    Source: the near-rank loss of arXiv 2210.12184 counts σ ≪ 1 and gives no number; the threshold is ours to
        choose.
    """
    eps_dtype = torch.float64 if A.dtype == torch.float64 else torch.float32
    return _rank(A, atol, rtol, center, torch.finfo(eps_dtype).eps)


def _rank(
    A: Tensor, atol: float | Tensor | None, rtol: float | Tensor | None, center: bool, eps: float
) -> Tensor:
    sigma = singular_values(A, center=center)
    absolute = torch.as_tensor(0.0 if atol is None else atol, dtype=torch.float64)
    if rtol is None:
        relative = torch.where(absolute > 0, 0.0, eps * max(A.shape[-2:]))
    else:
        relative = torch.as_tensor(rtol, dtype=torch.float64)
    largest = sigma[..., :1].sum(dim=-1)
    tau = torch.maximum(absolute, relative * largest)  # broadcast over the batch
    sigma = sigma.expand(*tau.shape, sigma.shape[-1])
    return _count(sigma > tau[..., None], sigma)


def near_rank_ratio(
    A: Tensor, *, atol: float | Tensor | None = None, rtol: float | Tensor | None = None, center: bool = False
) -> Tensor:
    """Near-rank divided by min(m, n), in [0, 1]; 0 for an empty matrix. Arguments as ``near_rank``."""
    count = near_rank(A, atol=atol, rtol=rtol, center=center).to(torch.float64)
    return torch.where(count < 0, torch.nan, count) / max(min(A.shape[-2:]), 1)


def feature_rank(A: Tensor, *, eps: float = 0.01, center: bool = False) -> Tensor:
    """Feature rank #{σ_i(Φ/√m) > ε}: an absolute threshold on the root-mean-square scale of the features.

    Args:
        A: (*, m, n), the feature matrix Φ, one row a sample. The source writes n for the number of samples;
            it is the number of rows, m, here.
        eps: the threshold ε, 0.01 in the source.
        center: subtract the column means first; the source does not.

    Returns:
        int64 counts.

    Source: Lyle, Rowland, Dabney 2022, arXiv 2204.09560, section on feature rank; the definition there is the
        expectation of this count as the number of samples grows, this is its estimate from one sample.
    """
    sigma = singular_values(A, center=center)
    return _count(sigma / max(A.shape[-2], 1) ** 0.5 > eps, sigma)


def _first_k_reaching(share: float, weights: Tensor) -> Tensor:
    """Smallest {k : Σ_{i≤k} w_i ≥ share·Σ w_i} for descending weights, 0 if they are all 0."""
    total = weights.cumsum(dim=-1)
    # Divided by the last partial sum, not by a separate sum, so that the last fraction is exactly 1.
    fraction = _divide(total, total[..., -1:])
    below = (fraction < share).sum(dim=-1)
    return _count(torch.arange(weights.shape[-1]) <= below[..., None], weights) * (total != 0).any(dim=-1)


def srank(A: Tensor, *, delta: float = 0.01, center: bool = False) -> Tensor:
    """Effective rank srank_δ = min {k : Σ_{i≤k} σ_i / Σ_i σ_i ≥ 1 − δ}.

    The singular values are *not* squared; ``pca_rank`` is the same with squares. Not the stable rank, for
    which public code sometimes uses this name.

    Args:
        A: (*, m, n).
        delta: the share left out, 0.01 in the source.
        center: subtract the column means first; the source does not.

    Returns:
        int64 counts.

    Source: Kumar, Agarwal, Ghosh, Levine 2021, arXiv 2010.14498, section 3.
    """
    return _first_k_reaching(1 - delta, singular_values(A, center=center))


def pca_rank(A: Tensor, *, share: float = 0.99, center: bool = False) -> Tensor:
    """PCA rank min {k : Σ_{i≤k} σ_i² / Σ_i σ_i² ≥ share}: directions that hold ``share`` of the energy.

    Args:
        A: (*, m, n).
        share: share of the sum of squares to explain, 0.99 in the source.
        center: subtract the column means first. True is principal component analysis proper (share of the
            variance); False counts the mean as a direction.

    Returns:
        int64 counts.

    Source: Yang et al. 2019, arXiv 1909.12255. The package delve counts the directions whose cumulative share
        stays *below* the threshold, at least 1: one less than this, except where that would be 0.
    """
    sigma = singular_values(A, center=center)
    return _first_k_reaching(share, _relative(sigma).square())


def saturation(A: Tensor, *, share: float = 0.99, center: bool = True) -> Tensor:
    """Layer saturation: ``pca_rank`` divided by the number of features n, in [0, 1].

    Args:
        A: (*, m, n).
        share: share of the variance to explain.
        center: True in the source (the covariance of the layer's output).

    Returns:
        float64.

    Source: Shenk, Richter et al., the package delve (doi 10.5281/zenodo.5233860), "saturation". See
        ``pca_rank`` for how its count differs by one.
    """
    count = pca_rank(A, share=share, center=center).to(torch.float64)
    return torch.where(count < 0, torch.nan, count) / max(A.shape[-1], 1)


# Ranks without a threshold


def _exp_entropy(p: Tensor) -> Tensor:
    """exp(−Σ p log p) with 0·log 0 = 0."""
    entropy: Tensor = -torch.special.xlogy(p, p).sum(dim=-1)
    return entropy.exp()


def effective_rank(A: Tensor, *, center: bool = False) -> Tensor:
    """Effective rank exp(−Σ p_i log p_i), p_i = σ_i / Σσ, 0·log 0 = 0, natural logarithm; no ε.

    Args:
        A: (*, m, n).
        center: subtract the column means first; the source does not.

    Returns:
        float64, between 1 and min(m, n), 0 for a zero matrix.

    Source: Roy, Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007, section
        3.
    """
    sigma = singular_values(A, center=center)
    total = sigma.sum(dim=-1, keepdim=True)
    return torch.where(total[..., 0] == 0, 0.0, _exp_entropy(_divide(sigma, total)))


def rankme(A: Tensor, *, eps: float = 1e-7, center: bool = False) -> Tensor:
    """RankMe exp(−Σ p_i log p_i), p_i = σ_i / Σσ + ε, over the k = min(m, n) singular values.

    The sum is over singular values, not over eigenvalues of the covariance as in some public code. ε is added
    to every p_i after the normalisation, so the p_i sum to 1 + kε and the result can slightly exceed k.

    Args:
        A: (*, m, n), the embeddings, one row a sample.
        eps: ε, 1e-7 in the source (implementations also use 1e-5 and 1e-12).
        center: subtract the column means first; the source does not.

    Returns:
        float64, 0 for a zero matrix.

    Source: Garrido, Balestriero, Najman, LeCun 2023, arXiv 2210.02885, the definition of RankMe.
    """
    sigma = singular_values(A, center=center)
    total = sigma.sum(dim=-1, keepdim=True)
    return torch.where(total[..., 0] == 0, 0.0, _exp_entropy(_divide(sigma, total) + eps))


def stable_rank(A: Tensor, *, center: bool = False) -> Tensor:
    """Stable rank ‖A‖_F² / σ_1² = Σ σ_i² / σ_1², between 1 and the rank.

    Source: Rudelson, Vershynin, "Sampling from large matrices", J. ACM 54(4), 2007 ("numerical rank" there).
    """
    return _relative(singular_values(A, center=center)).square().sum(dim=-1)


def participation_ratio(A: Tensor, *, center: bool = False) -> Tensor:
    """Participation ratio (Σ λ_i)² / Σ λ_i² = tr(G)² / ‖G‖_F², between 1 and the rank.

    Args:
        A: (*, m, n).
        center: True is the source's form (eigenvalues of the covariance).

    Returns:
        float64.

    Source: Gao et al., "A theory of multineuronal dimensionality, dynamics and measurement", bioRxiv 214262,
        2017.
    """
    lam = _relative(singular_values(A, center=center)).square()
    return _divide(lam.sum(dim=-1).square(), lam.square().sum(dim=-1))


def mean_energy(A: Tensor) -> Tensor:
    """Share of the squares that the column means hold: m‖μ‖² / ‖A‖_F², in [0, 1]; 0 of a zero matrix.

    Args:
        A: (*, m, n).

    Returns:
        float64.

    What centring takes away: near 1 the largest singular value is that of the mean, and thresholds relative
        to it count the mean's size.
    """
    X = _float64(A, False)
    total = X.square().sum(dim=(-2, -1))
    return _divide(X.mean(dim=-2).square().sum(dim=-1) * X.shape[-2], total)


def nesum(A: Tensor, *, center: bool = True) -> Tensor:
    """Normalised eigenvalue sum Σ λ_i / λ_1 of the covariance: the stable rank of the centred matrix.

    Args:
        A: (*, m, n).
        center: True in the source.

    Returns:
        float64, between 1 and the rank.

    Source: He, Ozay, "Exploring the gap between collapsed and whitened features in self-supervised learning",
        ICML 2022.
    """
    return stable_rank(A, center=center)


def alpha_req(A: Tensor, *, center: bool = False, first: int = 10, stop: int = 100) -> Tensor:
    """Decay exponent α of λ_i ∝ i^(−α): *minus* the least-squares slope of log λ_i against log i.

    Positive for a decaying spectrum, 0 for a flat one. i counts from 1 and enters as log i (a regression
    against i itself would fit an exponential). The fit takes first ≤ i < stop, cut at min(m, n), and of these
    only λ_i > max(m, n)·2⁻⁵²·λ_1: below it λ_i is the rounding of a float64 Gram matrix and its logarithm is
    noise. This floor is ours; the source gives none.

    Args:
        A: (*, m, n).
        center: subtract the column means first.
        first: first index of the fit.
        stop: index after the last one of the fit.

    Returns:
        float64, NaN with fewer than three eigenvalues to fit.

    Source: Agrawal, Mondal, Ghosh, Richards, "α-ReQ: assessing representation quality in self-supervised
        learning by measuring eigenspectrum decay", NeurIPS 2022.
    """
    sigma = _relative(singular_values(A, center=center))[..., first - 1 : stop - 1]
    keep = sigma.square() > max(A.shape[-2:]) * _EPS64
    y = 2 * torch.where(keep, sigma, 1.0).log()
    x = torch.arange(first, first + y.shape[-1], dtype=torch.float64).log().expand_as(y)
    number = keep.sum(dim=-1)
    x_mean = _divide((x * keep).sum(dim=-1), number)[..., None]
    y_mean = _divide((y * keep).sum(dim=-1), number)[..., None]
    dx = (x - x_mean) * keep
    slope = _divide((dx * (y - y_mean)).sum(dim=-1), dx.square().sum(dim=-1))
    return torch.where(number < 3, torch.nan, -slope)


# Activations


def dormant_units(A: Tensor, *, tau: float = 0.0) -> Tensor:
    """Number of τ-dormant units #{j : mean_i |a_ij| / (mean over i and j of |a_ij|) ≤ τ}.

    Args:
        A: (*, m, n), m samples of the activations of a layer's n units, not centred.
        tau: the threshold τ; 0 counts dead units only, 0.025 and 0.1 are common.

    Returns:
        int64 counts; n (every unit) for a zero matrix, 0 for an empty one, −1 for non-finite input.

    Source: Sokar, Agarwal, Castro, Evci 2023, arXiv 2302.12902, definition 3.1.
    """
    if 0 in A.shape[-2:]:
        return torch.zeros(A.shape[:-2], dtype=torch.int64)
    size = _float64(A, center=False).abs()
    # Scaled by the largest entry: a mean of huge entries must not overflow.
    activity = _divide(size, size.amax(dim=(-2, -1), keepdim=True)).mean(dim=-2)
    dormant = activity <= tau * activity.mean(dim=-1, keepdim=True)
    return torch.where(size.isfinite().all(dim=-1).all(dim=-1), dormant.sum(dim=-1), -1)


# The columns of bsgap_kernels.spectral_summary, in its order, each with the constants that it uses.
SUMMARY: dict[str, Callable[..., Tensor]] = {
    "sigma_max": sigma_max,
    "frobenius_norm": frobenius_norm,
    "stable_rank": stable_rank,
    "participation_ratio": participation_ratio,
    "effective_rank": effective_rank,
    "rankme": rankme,
    "srank": srank,
    "pca_rank": pca_rank,
    "feature_rank": feature_rank,
    "alpha_req": alpha_req,
}


def spectral_summary(A: Tensor, *, center: bool = False) -> Tensor:
    """Every metric of ``SUMMARY``, in its order, at its default constants.

    srank δ = 0.01, pca_rank share 0.99, rankme ε = 1e-7, feature_rank ε = 0.01, alpha_req over [10, 100).

    Args:
        A: (*, m, n).
        center: subtract the column means first, for every column.

    Returns:
        (*, len(SUMMARY)), float64. NaN throughout for a matrix with a non-finite entry.
    """
    columns = [metric(A, center=center) for metric in SUMMARY.values()]
    bad = columns[0].isnan()
    return torch.stack([torch.where(bad, torch.nan, column.to(torch.float64)) for column in columns], dim=-1)
