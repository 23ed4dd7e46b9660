// Summary columns of every matrix from the eigenvalues that the count kernels wrote: csrc/core/summary.h with
// the lanes of a warp.
#pragma once

#include <limits>

#include "../core/summary.h"
#include "group.cuh"
#include "matrix.cuh"

namespace bsgap::cuda {

// What csrc/core/summary.h asks of lanes.
struct WarpLanes {
  static constexpr int kSize = kWarp;
  __device__ int rank() const { return static_cast<int>(threadIdx.x % kWarp); }
  __device__ double sum(double x) const { return detail::warp_sum(x); }
  __device__ double from_lane(double x, int lane) const { return warp_shuffle(x, lane); }
};

inline constexpr int kSummaryThreads = 128;

// summary: (N, kSummaryColumns), caller's order. A warp per matrix, matrices in table order.
__global__ void __launch_bounds__(kSummaryThreads, 4)
    summary_kernel(const __grid_constant__ CountProblem p, const double* spectra, int64_t matrices,
                   double* summary) {
  const int64_t matrix = static_cast<int64_t>(blockIdx.x) * (kSummaryThreads / kWarp) + threadIdx.x / kWarp;
  if (matrix >= matrices) return;
  const MatrixTask task = find_matrix(p, matrix);
  WarpGroup group(nullptr);
  const WarpLanes lanes;
  const int64_t* row = p.table + task.row * kTableColumns;
  const int64_t m = row[kObservations], n = row[kFeatures], k = m < n ? m : n;
  double* out = summary + task.result * kSummaryColumns;
  // A Gram matrix larger than min(m, n) has zeros in front.
  const double* eigenvalues = spectra + first_eigenvalue(group, p, task) + (task.side - k);
  if (k == 0 || std::isnan(eigenvalues[k - 1])) {
    for (int c = lanes.rank(); c < kSummaryColumns; c += kWarp)
      out[c] = k == 0 ? 0.0 : std::numeric_limits<double>::quiet_NaN();
    return;
  }
  summarize(eigenvalues, m, n, exponent_of(p, task), out, lanes);
}

// eigenvalues: as the count kernels write them. Of the problem are read: table, rows, batches, exponent.
inline void summarize_grams(const CountProblem& problem, const double* eigenvalues, double* summary,
                            cudaStream_t stream) {
  constexpr int64_t kWarps = kSummaryThreads / kWarp;
  int64_t matrices = 0;
  for (int64_t r = 0; r < problem.rows; ++r) matrices += problem.batches[r];
  const int64_t blocks = (matrices + kWarps - 1) / kWarps;
  BSGAP_LAUNCH(summary_kernel, dim3(static_cast<unsigned>(blocks)), kSummaryThreads, size_t{0}, stream,
               problem, eigenvalues, matrices, summary);
}

}  // namespace bsgap::cuda
