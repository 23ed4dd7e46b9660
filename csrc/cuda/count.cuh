// Counts, certified intervals and eigenvalues of many Gram matrices of different sides: what a call asks for,
// and which kernels serve it. No torch here, no allocation and no synchronisation: launches on one stream
// only.
#pragma once

#include <cstdint>

#include "platform.cuh"
#include "table.cuh"

namespace bsgap::cuda {

// Sides up to this are served by one launch for all matrices (count_small.cuh), the others by
// count_large.cuh.
#ifdef BSGAP_TEST_SMALL_SIDE
inline constexpr int64_t kSmallSide =
    BSGAP_TEST_SMALL_SIDE;  // the sanitizers' runs: the same code, less of it
#else
inline constexpr int64_t kSmallSide = 128;
#endif

inline constexpr int64_t kMoments = 3;

// Pointers are to device memory unless said otherwise. N matrices in all, `rows` table rows in descending
// order of side; t = threshold_count. "Caller's order": index kFirstResult of the row + index in the row.
struct CountProblem {
  const double* grams = nullptr;   // see kFirstGram
  const int64_t* table = nullptr;  // rows x kTableColumns
  int64_t rows = 0;
  const int64_t* sides = nullptr;    // host: side of every table row
  const int64_t* batches = nullptr;  // host: matrices in every table row
  const double* thresholds =
      nullptr;                    // (N or 1, t, 2) pairs (atol, rtol), caller's order; null: the two below
  bool thresholds_shared = true;  // the first dimension is 1
  int64_t threshold_count = 1;
  double atol = 0, rtol = 0;
  const int32_t* exponent = nullptr;  // (N) or null: grams are those of A * 2^exponent
  const double* gram_error =
      nullptr;  // (N) or null: bound of ||G - exact||_2; null: section 1 of docs/certificates.md
  bool certify = false, spectrum = false;
  int64_t* counts = nullptr;                   // (N, t), caller's order
  int64_t *lower = nullptr, *upper = nullptr;  // (N, t), if certify
  double* eigenvalues = nullptr;               // ascending, table order back to back, if spectrum
  // (N, kMoments) or null: trace, Frobenius norm and, to about 1e-6, largest eigenvalue of the matrices as
  // they stand; not together with `spectrum`.
  double* moments = nullptr;
};

}  // namespace bsgap::cuda
