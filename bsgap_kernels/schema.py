"""Every op schema of the library `bsgap`, in one place. Names that start with `_` are private.

A public op is one file in `ops/`: checks, composition of private ops, fake, autograd. A private op has one
implementation a device: for the CPU in C++ (`csrc/cpu`) or `ops/_cpu.py`, for CUDA in `ops/_cuda*.py`.
"""

from __future__ import annotations

import torch

_PUBLIC = (
    "gram(Tensor A, *, bool center=False) -> Tensor",
    "covariance(Tensor A, *, int correction=1) -> Tensor",
    "covariance.weighted(Tensor A, *, int correction=1, Tensor? fweights=None, Tensor? aweights=None)"
    " -> Tensor",
    # The overloads of floats first: torch tries them in this order, and a miss takes 10 µs. They take a
    # tensor of one number too, by waiting for its value: name the overload `tensor` where that matters.
    "near_rank(Tensor A, float? tol=None, bool hermitian=False, *, float? atol=None, float? rtol=None,"
    " bool center=False) -> Tensor",
    "near_rank.tensor(Tensor A, Tensor? tol=None, bool hermitian=False, *, Tensor? atol=None,"
    " Tensor? rtol=None, bool center=False) -> Tensor",
    "near_rank.out(Tensor A, float? tol=None, bool hermitian=False, *, float? atol=None, float? rtol=None,"
    " bool center=False, Tensor(a!) out) -> Tensor(a!)",
    "near_rank.tensor_out(Tensor A, Tensor? tol=None, bool hermitian=False, *, Tensor? atol=None,"
    " Tensor? rtol=None, bool center=False, Tensor(a!) out) -> Tensor(a!)",
    "near_rank_ratio(Tensor A, *, float? atol=None, float? rtol=None, bool center=False) -> Tensor",
    "near_rank_ratio.tensor(Tensor A, *, Tensor? atol=None, Tensor? rtol=None, bool center=False) -> Tensor",
    "near_rank_interval(Tensor A, *, float? atol=None, float? rtol=None, bool center=False, "
    'bool hermitian=False, str mode="rigorous", int seed=0) -> (Tensor lower, Tensor upper)',
    "singular_value_counts(Tensor A, Tensor thresholds, *, bool relative=True, bool center=False) -> Tensor",
    "spectral_summary(Tensor A, *, bool center=False) -> Tensor",
    "near_rank_grouped(Tensor[] As, *, float? atol=None, float? rtol=None, bool center=False) -> Tensor",
    "gram_accumulate_(Tensor(a!) state, Tensor A, Tensor shift) -> ()",
)

_PRIVATE = (
    # Counts (*,) at one rtol > 0 that the Gram matrix resolves.
    "_near_rank(Tensor A, float rtol, bool center, bool float32_sums) -> Tensor",
    # thresholds: float64 (B or 1, t, 2), pairs (atol, rtol); None: the two floats for every matrix.
    # counts (B, t). smallest_tau (B,): a lower bound of tau / sigma_max; empty on CUDA, where it is not read.
    "_counts(Tensor A, Tensor? thresholds, float atol, float rtol, bool center, bool float32_sums)"
    " -> (Tensor counts, Tensor smallest_tau)",
    # Matrices (*, n) of a list, leading dimensions rows, with one rtol and one kind of sums each.
    "_grouped_counts(Tensor[] As, float atol, float[] rtol, bool center, bool[] float32_sums)"
    " -> (Tensor counts, Tensor smallest_tau)",
    "_intervals(Tensor A, float atol, float rtol, bool center, bool probed, int seed)"
    " -> (Tensor lower, Tensor upper)",
    # Of the B matrices of A. exponent: int32, its least value marks a matrix that is not finite.
    "_eigenvalues(Tensor A, bool center) -> (Tensor eigenvalues, Tensor exponent)",
    "_spectral_summary(Tensor A, bool center) -> Tensor",
    "_feature_gram(Tensor A, bool center, bool float32_sums=False) -> Tensor",
    "_shifted_gram(Tensor A, Tensor shift) -> (Tensor sums, Tensor gram)",
    # Adds AᵀA, or AAᵀ, to a lower triangle, or with `fresh` puts it there; dimensions [first, last) of A are
    # its features, all others its rows. totals: rows, a bound of the error of gram (float64 sums), additions.
    "_accumulate_gram_(Tensor(a!) gram, Tensor(b!) totals, Tensor(c!)? sums, Tensor A, int first, int last,"
    " bool features_side, bool center, bool float32_sums, bool fresh) -> ()",
    # About the column means; with column sums of AᵀA, without AAᵀ. The lower triangle, and its totals.
    "_centred_gram(Tensor gram, Tensor totals, Tensor? sums) -> (Tensor gram, Tensor totals)",
    # Of each Gram matrix: rows, trace, Frobenius norm, largest eigenvalue, then for each rtol the count and
    # its bounds (-1 unless certified); float64 (N, 4 + 3 t).
    "_gram_counts(Tensor[] grams, Tensor[] totals, float atol, float[] rtol, bool certify) -> Tensor",
    "_gram_eigenvalues(Tensor[] grams) -> Tensor",
    # A tracker's hooks in compiled code (tracking/hooks.py). `token` is not written: it keeps the calls in
    # order.
    "_begin_pass_(Tensor(a!) token, Tensor? mask, int reader, bool training) -> ()",
    "_observe_(Tensor(a!) token, Tensor activation, int reader, int module) -> ()",
    # These have CPU kernels only: the steps of `_eigenvalues` and `_spectral_summary` around torch's solver.
    "_small_gram(Tensor A, bool center) -> (Tensor gram, Tensor exponent)",
    "_summarize(Tensor eigenvalues, Tensor? exponent, int m, int n) -> Tensor",
    # What follows has CUDA kernels only (csrc/cuda/spectra.cu). `table` describes the matrices on the device
    # (triton/table.py), sides and batches repeat the side and the number of matrices of its rows on the host.
    "_cuda_fill(Tensor(a!) out, int[] values) -> ()",
    "_cuda_exchange_capture_mode(int mode) -> int",
    "_cuda_counts(Tensor grams, Tensor table, int[] sides, int[] batches, Tensor? thresholds, float atol,"
    " float rtol, Tensor? exponent, Tensor? gram_error, bool certify, bool spectrum, bool moments=False)"
    " -> (Tensor counts, Tensor lower, Tensor upper, Tensor eigenvalues, Tensor moments)",
    "_cuda_summaries(Tensor eigenvalues, Tensor table, int[] sides, int[] batches, Tensor? exponent)"
    " -> Tensor",
)

LIBRARY = torch.library.Library("bsgap", "DEF")
for _schema in _PUBLIC + _PRIVATE:
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

OP_NAMES = tuple(dict.fromkeys(s.split("(")[0].split(".")[0] for s in _PUBLIC))
