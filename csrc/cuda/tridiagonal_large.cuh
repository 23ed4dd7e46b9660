// Whole spectra for sides above kSmallSide: Householder tridiagonalisation over the grid, then bisection with
// Sturm counts, as csrc/core/lanes.h. Point counts only; no certificate stands on it.
//
// One launch per column for all matrices together: blocks of rows apply the rank-2 update of the last column
// and multiply by the present vector in the same sweep; the block that arrives last forms w, the next column
// and its Householder vector. A launch reads and writes what is left of the matrix once, 16 n^3 / 3 bytes in
// all (0.09 TB at n = 2560), and n launches of some 10 us bind below n = 1500 or so. Both triangles are kept:
// the half saved would cost a second, scattered write.
#pragma once

#include <limits>

#include "lanczos.cuh"
#include "large_plan.cuh"
#include "tridiagonal.cuh"

namespace bsgap::cuda {

namespace detail {

struct Reduction {
  double *work, *v, *w, *p, *diagonal, *off_diagonal;  // v: two vectors, in turn
  int64_t ld;
};

__device__ inline Reduction reduction_of(const LargeBatch& b, const LargeMatrix& m) {
  const int64_t n = m.task.side, ld = leading_dimension(n);
  double* work = b.scratch + (m.scratch - b.first_scratch) * b.shifts;
  double* rest = work + n * ld;
  return {work, rest, rest + 2 * ld, rest + 3 * ld, rest + 4 * ld, rest + 5 * ld, ld};
}

__device__ inline int64_t sturm_count(const Reduction& r, int64_t n, double smallest, double x) {
  int64_t count = 0;
  double pivot = 1, e = 0;
  for (int64_t i = 0; i < n; ++i) {
    pivot = r.diagonal[i] - x - e * e / pivot;
    if (std::abs(pivot) < smallest) pivot = -smallest;
    count += pivot > 0;
    e = r.off_diagonal[i];
  }
  return count;
}

// Gershgorin's interval and the least pivot that is not replaced (sturm_count_above in csrc/core). All
// threads call.
struct SpectrumBounds {
  double low, high, smallest;
};

__device__ inline SpectrumBounds spectrum_bounds(BlockGroup<kLargeThreads>& group, const Reduction& r,
                                                 int64_t n) {
  double low = -kInfinity, high = -kInfinity, square = 0;
  for (int64_t i = group.rank(); i < n; i += kLargeThreads) {
    const double left = i > 0 ? r.off_diagonal[i - 1] : 0, right = i + 1 < n ? r.off_diagonal[i] : 0;
    const double radius = std::abs(left) + std::abs(right);
    low = larger(low, radius - r.diagonal[i]);
    high = larger(high, radius + r.diagonal[i]);
    square = larger(square, right * right);
  }
  return {-group.max(low), group.max(high), larger(group.max(square), 1.0) * DBL_MIN};
}

}  // namespace detail

// Column `column` >= -1: A -= v w^T + w v^T with the vectors of the column before, p = beta A v with the
// present one; then column + 1. At -1 there are none: the scaled matrix is copied. Grid: (blocks of 32 rows
// behind `column`, matrices).
__global__ void __launch_bounds__(kLargeThreads, 2) householder_kernel(LargeBatch b, int64_t column) {
  using detail::kRowsPerWarp;
  double* shared = dynamic_shared<double>();
  LargeMatrix& m = b.matrices[b.first + blockIdx.y];
  const int64_t n = m.task.side, first = column + 1;
  const int64_t block_row = first + static_cast<int64_t>(blockIdx.x) * detail::kLanczosRows;
  if (block_row >= n || m.content != kContentFinite) return;
  const detail::Reduction r = detail::reduction_of(b, m);
  double* const v = r.v + first % 2 * r.ld;              // of `column`
  const double* const u = r.v + (first + 1) % 2 * r.ld;  // of the column before, with r.w
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int64_t row = block_row + threadIdx.x / kWarp * kRowsPerWarp;
  if (column < 0) {
    for (int64_t j = lane; j < n; j += kWarp)
      for (int i = 0; i < kRowsPerWarp && row + i < n; ++i)
        r.work[(row + i) * r.ld + j] = m.task.g[(row + i) * n + j] * m.scale;
  } else {
    double sum[kRowsPerWarp] = {}, ui[kRowsPerWarp] = {}, wi[kRowsPerWarp] = {};
#pragma unroll
    for (int i = 0; i < kRowsPerWarp; ++i)
      if (column > 0 && row + i < n) ui[i] = u[row + i], wi[i] = r.w[row + i];
    for (int64_t j = first / kWarp * kWarp + lane; j < n; j += kWarp) {
      if (j < first) continue;
      const double uj = column > 0 ? u[j] : 0, wj = column > 0 ? r.w[j] : 0, vj = v[j];
#pragma unroll
      for (int i = 0; i < kRowsPerWarp; ++i) {
        if (row + i >= n) continue;
        double* a = r.work + (row + i) * r.ld + j;
        const double x = *a - ui[i] * wj - wi[i] * uj;
        *a = x;
        sum[i] += x * vj;
      }
    }
#pragma unroll
    for (int i = 0; i < kRowsPerWarp; ++i) {
      sum[i] = detail::warp_sum(sum[i]);
      if (lane == 0 && row + i < n) r.p[row + i] = sum[i];
    }
  }
  const unsigned blocks =
      static_cast<unsigned>((n - first + detail::kLanczosRows - 1) / detail::kLanczosRows);
  if (!last_to_arrive(&m.arrivals, blocks, reinterpret_cast<unsigned*>(shared + detail::kLanczosFlag)))
    return;
  if (threadIdx.x == 0) m.arrivals = 0;

  BlockGroup<kLargeThreads> group(shared);
  if (column >= 0) {
    // w = beta p - (beta^2 v.p / 2) v.
    const double beta = m.reflector;
    double part = 0;
    for (int64_t i = first + threadIdx.x; i < n; i += kLargeThreads) part += v[i] * r.p[i];
    const double half = 0.5 * beta * (beta * group.sum(part));
    for (int64_t i = first + threadIdx.x; i < n; i += kLargeThreads) r.w[i] = beta * r.p[i] - half * v[i];
    group.sync();
  }
  // Column `first` (a row: symmetric), whose entries up to the diagonal are done.
  double* next = r.v + (first + 1) % 2 * r.ld;
  const double* a = r.work + first * r.ld;
  const double v0 = column >= 0 ? v[first] : 0, w0 = column >= 0 ? r.w[first] : 0;
  double tail = 0;
  for (int64_t i = first + threadIdx.x; i < n; i += kLargeThreads) {
    const double x = column >= 0 ? a[i] - v0 * r.w[i] - w0 * v[i] : a[i];
    next[i] = x;
    if (i > first + 1) tail += x * x;
  }
  tail = group.sum(tail);
  const double head = first + 1 < n ? next[first + 1] : 0, diagonal = next[first];
  group.sync();  // both have been read
  if (tail < kNegligible) {
    for (int64_t i = first + threadIdx.x; i < n; i += kLargeThreads) next[i] = 0;
  }
  if (threadIdx.x != 0) return;
  r.diagonal[first] = diagonal;
  if (tail < kNegligible) {
    r.off_diagonal[first] = head;
    m.reflector = 0;
    return;
  }
  const double norm = std::sqrt(head * head + tail), alpha = head > 0 ? -norm : norm;
  r.off_diagonal[first] = alpha;
  next[first + 1] = head - alpha;
  m.reflector = 2.0 / (tail + (head - alpha) * (head - alpha));
}

// Eigenvalues, ascending: each thread bisects for one. Grid: (blocks of kLargeThreads eigenvalues, matrices).
__global__ void __launch_bounds__(kLargeThreads, 2) bisection_kernel(LargeBatch b) {
  BlockGroup<kLargeThreads> group(dynamic_shared<double>());
  const LargeMatrix& m = b.matrices[b.first + blockIdx.y];
  const int64_t n = m.task.side;
  if (static_cast<int64_t>(blockIdx.x) * kLargeThreads >= n) return;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kLargeThreads + threadIdx.x;
  double* out = b.problem.eigenvalues + m.eigenvalue;
  if (m.content != kContentFinite) {
    if (index < n) out[index] = m.content == kContentZero ? 0.0 : std::numeric_limits<double>::quiet_NaN();
    return;
  }
  const detail::Reduction r = detail::reduction_of(b, m);
  detail::SpectrumBounds s = detail::spectrum_bounds(group, r, n);
  if (index >= n) return;
  const int64_t rank = n - index;
  // All threads start with one interval and halve it at the same points: neighbours never cross.
  const double resolution = 2 * kUnitRoundoff * detail::larger(std::abs(s.low), std::abs(s.high));
  while (s.high - s.low > resolution) {
    const double middle = s.low + (s.high - s.low) / 2;
    if (middle <= s.low || middle >= s.high) break;
    (detail::sturm_count(r, n, s.smallest, middle) >= rank ? s.low : s.high) = middle;
  }
  out[index] = m.back * (s.low + (s.high - s.low) / 2);
}

// Point counts of all thresholds from the tridiagonal form. One block per matrix.
__global__ void __launch_bounds__(kLargeThreads, 2) sturm_counts_kernel(LargeBatch b) {
  BlockGroup<kLargeThreads> group(dynamic_shared<double>());
  const CountProblem& p = b.problem;
  const LargeMatrix& m = b.matrices[b.first + blockIdx.x];
  const int64_t n = m.task.side;
  const detail::Reduction r = detail::reduction_of(b, m);
  const bool finite = m.content == kContentFinite;
  double top = 0, smallest = DBL_MIN;
  if (finite) {
    smallest = detail::spectrum_bounds(group, r, n).smallest;
    if (m.needs_top)
      top = detail::largest_ritz_value(group, r.diagonal, r.off_diagonal, static_cast<int>(n), -kInfinity);
  }
  for (int64_t j = threadIdx.x; j < p.threshold_count; j += kLargeThreads) {
    const Threshold t = threshold_of(p, m.task, j);
    int64_t count = 0;
    if (!detail::decided_at_once(m, t, count)) {
      const double shift = detail::squared_threshold(t, m.back * detail::larger(top, 0.0));
      count = shift < kInfinity ? detail::sturm_count(r, n, smallest, m.scale * shift) : 0;
    }
    p.counts[m.task.result * p.threshold_count + j] = count;
  }
}

// After describe_kernel: leaves the tridiagonal form of every matrix of the batch in its scratch, n launches.
inline void tridiagonalise(const LargeBatch& b, const LargeShapes& shapes, cudaStream_t stream) {
  const int64_t side = shapes.side(b.first);
  for (int64_t column = -1; column + 1 < side; ++column) {
    const unsigned blocks =
        static_cast<unsigned>((side - column - 1 + detail::kLanczosRows - 1) / detail::kLanczosRows);
    const unsigned matrices = static_cast<unsigned>(shapes.above(b.first, b.count, column + 1));
    BSGAP_LAUNCH(householder_kernel, dim3(blocks, matrices), kLargeThreads, detail::kLanczosShared, stream, b,
                 column);
  }
}

}  // namespace bsgap::cuda
