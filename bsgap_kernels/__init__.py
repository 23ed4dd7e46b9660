"""Near-rank and spectral metrics of activations, cheap enough to run at every training step.

>>> import torch, bsgap_kernels
>>> bsgap_kernels.near_rank(torch.eye(4), rtol=1e-2)
tensor(4)
"""

__version__ = "0.1.0"

from ._native import build_info
from ._patch import patch
from .ops import (
    SUMMARY_COLUMNS,
    CountInterval,
    covariance,
    gram,
    gram_accumulate_,
    near_rank,
    near_rank_grouped,
    near_rank_interval,
    near_rank_ratio,
    singular_value_counts,
    spectral_summary,
)
from .tracking import RankTracker, SpectralAccumulator

__all__ = [
    "SUMMARY_COLUMNS",
    "CountInterval",
    "RankTracker",
    "SpectralAccumulator",
    "__version__",
    "build_info",
    "covariance",
    "gram",
    "gram_accumulate_",
    "near_rank",
    "near_rank_grouped",
    "near_rank_interval",
    "near_rank_ratio",
    "patch",
    "singular_value_counts",
    "spectral_summary",
]
