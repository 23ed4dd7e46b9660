"""One file a public op: checks, composition of private ops, fake, autograd, public function, read downward.

Importing this package registers every op of `schema.py`; those of the CPU in C++ are there already.
"""

from . import (  # noqa: F401 - the private ops
    _batching,
    _cpu,
    _cuda,
    _cuda_gram,
    _cuda_sums,
)
from .covariance import covariance
from .gram import gram
from .gram_accumulate import gram_accumulate_
from .near_rank import near_rank
from .near_rank_grouped import near_rank_grouped
from .near_rank_interval import CountInterval, near_rank_interval
from .near_rank_ratio import near_rank_ratio
from .singular_value_counts import singular_value_counts
from .spectral_summary import SUMMARY_COLUMNS, spectral_summary

__all__ = [
    "SUMMARY_COLUMNS",
    "CountInterval",
    "covariance",
    "gram",
    "gram_accumulate_",
    "near_rank",
    "near_rank_grouped",
    "near_rank_interval",
    "near_rank_ratio",
    "singular_value_counts",
    "spectral_summary",
]
