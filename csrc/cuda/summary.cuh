// Summary columns of every matrix from the eigenvalues that the count kernels wrote: csrc/core/summary.h with
// the lanes of a warp.
#pragma once

#include <limits>

#include "../core/summary.h"
#include "group.cuh"
#include "matrix.cuh"

namespace bsgap::cuda {

struct SummaryProblem {  // device pointers; N, t and orders as in CountProblem
  const double* eigenvalues = nullptr;
  const int64_t* table = nullptr;
  int64_t rows = 0, matrices = 0, threshold_count = 1;
  const int32_t* exponent = nullptr;                 // (N) or null
  const int64_t* counts = nullptr;                   // (N, t)
  const int64_t *lower = nullptr, *upper = nullptr;  // (N, t) or null
  int64_t* clamped = nullptr;                        // (N, t): counts, within [lower, upper]
  double* summary = nullptr;                         // (N, kSummaryColumns)
};

// What csrc/core/summary.h asks of lanes.
struct WarpLanes {
  static constexpr int kSize = kWarp;
  __device__ int rank() const { return static_cast<int>(threadIdx.x % kWarp); }
  __device__ double sum(double x) const { return detail::warp_sum(x); }
  __device__ double from_lane(double x, int lane) const { return warp_shuffle(x, lane); }
};

inline constexpr int kSummaryThreads = 128;

// A warp per matrix, matrices in table order.
__global__ void __launch_bounds__(kSummaryThreads, 4)
    summary_kernel(const __grid_constant__ SummaryProblem p) {
  const int64_t matrix = static_cast<int64_t>(blockIdx.x) * (kSummaryThreads / kWarp) + threadIdx.x / kWarp;
  if (matrix >= p.matrices) return;
  CountProblem where;
  where.table = p.table;
  where.rows = p.rows;
  const MatrixTask task = find_matrix(where, matrix);
  WarpGroup group(nullptr);
  const WarpLanes lanes;
  for (int64_t j = lanes.rank(); j < p.threshold_count; j += kWarp) {
    const int64_t at = task.result * p.threshold_count + j;
    int64_t count = p.counts[at];
    if (p.lower != nullptr && p.lower[at] >= 0 && count >= 0) {
      count = count < p.lower[at] ? p.lower[at] : count;
      count = count > p.upper[at] ? p.upper[at] : count;
    }
    p.clamped[at] = count;
  }
  const int64_t* row = p.table + task.row * kTableColumns;
  const int64_t m = row[kObservations], n = row[kFeatures], k = m < n ? m : n;
  double* out = p.summary + task.result * kSummaryColumns;
  // A Gram matrix larger than min(m, n) has zeros in front.
  const double* eigenvalues = p.eigenvalues + first_eigenvalue(group, where, task) + (task.side - k);
  if (k == 0 || std::isnan(eigenvalues[k - 1])) {
    for (int c = lanes.rank(); c < kSummaryColumns; c += kWarp)
      out[c] = k == 0 ? 0.0 : std::numeric_limits<double>::quiet_NaN();
    return;
  }
  summarize(eigenvalues, m, n, p.exponent == nullptr ? 0 : p.exponent[task.result], out, lanes);
}

inline void summarize_grams(const SummaryProblem& problem, cudaStream_t stream) {
  constexpr int64_t kWarps = kSummaryThreads / kWarp;
  const int64_t blocks = (problem.matrices + kWarps - 1) / kWarps;
  BSGAP_LAUNCH(summary_kernel, dim3(static_cast<unsigned>(blocks)), kSummaryThreads, size_t{0}, stream,
               problem);
}

}  // namespace bsgap::cuda
