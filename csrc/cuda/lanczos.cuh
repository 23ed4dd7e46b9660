// Proposals for the largest eigenvalue of every matrix of a batch: Lanczos, and the Rayleigh quotient of what
// it found. As in csrc/core/spectral_norm.h nothing is believed of the proposal but that quotient, a lower
// bound.
//
// No reorthogonalisation: rounding costs orthogonality to a Ritz vector only once its value has converged to
// about sqrt(u), and the run stops when four steps gained less than 1e-9. What then appears are copies of
// converged values: the largest stays right. (Reorthogonalising would read the whole basis at each step, on
// one block.) At most 96 steps: with a relative gap g below the top the error falls like 4 exp(-4 j sqrt(g)),
// to 1e-9 after 96 steps for g >= 0.4 %; each step reads the matrix, so more would cost more than the two or
// three factorisations that repair a low proposal.
//
// Everything is done in units of the matrix times a power of two with a trace about 1, so that norms neither
// overflow nor vanish.
#pragma once

#include <cfloat>

#include "../core/philox.h"
#include "large_matrix.cuh"

namespace bsgap::cuda {

namespace detail {

inline constexpr int kRowsPerWarp = 4;
inline constexpr int kLanczosRows = kLargeThreads / kWarp * kRowsPerWarp;  // of one block
inline constexpr int kChosenVector = kLanczosSteps + 1;  // slot after the basis; first the rows' square sums
inline constexpr int kProductVector = kLanczosSteps;

// Reductions; the flag of last_to_arrive; the small tridiagonal matrix twice over.
inline constexpr int kLanczosFlag = BlockGroup<kLargeThreads>::kScratch;
inline constexpr size_t kLanczosShared = sizeof(double) * (kLanczosFlag + 1 + 4 * kLanczosSteps + 1);

__device__ inline double* lanczos_vector(const LargeBatch& b, const LargeMatrix& m, int64_t slot) {
  return b.scratch + (m.scratch - b.first_scratch) * b.shifts + slot * leading_dimension(m.task.side);
}

__device__ inline bool wants_lanczos(const LargeMatrix& m) {
  return m.content == kContentFinite && m.needs_top;
}

// y = scale * G x for the block's rows, and the square sums of the scaled rows if `squares` is not null.
__device__ inline void multiply_rows(const LargeMatrix& m, const double* x, double* y, double* squares) {
  const int64_t n = m.task.side;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kLanczosRows + threadIdx.x / kWarp * kRowsPerWarp;
  double sum[kRowsPerWarp] = {}, square[kRowsPerWarp] = {};
  for (int64_t j = lane; j < n; j += kWarp) {
    const double xj = x[j];
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) {
      const double g = first + r < n ? m.task.g[(first + r) * n + j] : 0.0;
      sum[r] += g * xj;
      if (squares != nullptr) square[r] += (g * m.scale) * (g * m.scale);
    }
  }
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) {
    sum[r] = warp_sum(sum[r]);
    if (squares != nullptr) square[r] = warp_sum(square[r]);
    if (lane == 0 && first + r < n) {
      y[first + r] = m.scale * sum[r];
      if (squares != nullptr) squares[first + r] = square[r];
    }
  }
}

__device__ inline bool last_block_of(LargeMatrix& m, double* shared) {
  const int64_t n = m.task.side;
  const unsigned blocks = static_cast<unsigned>((n + kLanczosRows - 1) / kLanczosRows);
  if (!last_to_arrive(&m.arrivals, blocks, reinterpret_cast<unsigned*>(shared + kLanczosFlag))) return false;
  if (threadIdx.x == 0) m.arrivals = 0;  // for the next launch
  return true;
}

// Whether the leading `size` x `size` part of the tridiagonal matrix has an eigenvalue above x.
__device__ inline bool any_above(const double* diagonal, const double* off_diagonal, int size, double x) {
  double pivot = 1;
  for (int i = 0; i < size; ++i) {
    const double e = i > 0 ? off_diagonal[i - 1] : 0;
    pivot = diagonal[i] - x - (i > 0 ? e * e / pivot : 0);
    if (pivot > 0) return true;
    if (pivot > -DBL_MIN) pivot = -DBL_MIN;
  }
  return false;
}

// Its largest eigenvalue to 1e-13 by sections: each round every thread tests one point, which leaves 1/257 of
// the interval for one pass over the matrix. `low`: any lower bound.
__device__ inline double largest_ritz_value(BlockGroup<kLargeThreads>& group, const double* diagonal,
                                            const double* off_diagonal, int size, double low) {
  double radius = -kInfinity, entry = -kInfinity;
  for (int i = group.rank(); i < size; i += kLargeThreads) {
    entry = larger(entry, diagonal[i]);
    radius = larger(radius, diagonal[i] + (i > 0 ? std::abs(off_diagonal[i - 1]) : 0) +
                                (i + 1 < size ? std::abs(off_diagonal[i]) : 0));
  }
  low = larger(low, group.max(entry));
  double high = group.max(radius);  // Gershgorin
  for (int round = 0; round < 8 && high - low > 1e-13 * std::abs(high); ++round) {
    const double step = (high - low) / (kLargeThreads + 1), x = low + step * (group.rank() + 1);
    const bool above = any_above(diagonal, off_diagonal, size, x);
    const double new_low = group.max(above ? x : low);
    const double new_high = -group.max(!above && x > new_low ? -x : -high);
    low = new_low;
    high = new_high;
  }
  return low;
}

}  // namespace detail

// q_0: a Gaussian vector, the same for every matrix of a side, of length 1. One block per matrix.
__global__ void __launch_bounds__(kLargeThreads, 2) lanczos_start_kernel(LargeBatch b) {
  BlockGroup<kLargeThreads> group(dynamic_shared<double>());
  const LargeMatrix& m = b.matrices[b.first + blockIdx.x];
  if (!detail::wants_lanczos(m)) return;
  double* q = detail::lanczos_vector(b, m, 0);
  double part = 0;
  for (int64_t i = threadIdx.x; i < m.task.side; i += kLargeThreads) {
    const double x = gaussian_pair(0x6273676170ULL, static_cast<uint64_t>(i), 0).first;
    q[i] = x;
    part += x * x;
  }
  const double length = std::sqrt(group.sum(part));
  for (int64_t i = threadIdx.x; i < m.task.side; i += kLargeThreads) q[i] /= length;
}

// Step `step`: a product by blocks of rows, then the block that arrives last makes the next vector and looks
// whether the value still grows. Grid: (blocks of 32 rows, matrices).
__global__ void __launch_bounds__(kLargeThreads, 2) lanczos_step_kernel(LargeBatch b, int32_t step) {
  double* shared = dynamic_shared<double>();
  LargeMatrix& m = b.matrices[b.first + blockIdx.y];
  const int64_t n = m.task.side;
  if (static_cast<int64_t>(blockIdx.x) * detail::kLanczosRows >= n || !detail::wants_lanczos(m) || m.done)
    return;
  const double* q = detail::lanczos_vector(b, m, step);
  double* y = detail::lanczos_vector(b, m, step + 1);
  double* squares = step == 0 ? detail::lanczos_vector(b, m, detail::kChosenVector) : nullptr;
  detail::multiply_rows(m, q, y, squares);
  if (!detail::last_block_of(m, shared)) return;

  BlockGroup<kLargeThreads> group(shared);
  double* diagonal = shared + detail::kLanczosFlag + 1;
  double* off_diagonal = diagonal + kLanczosSteps;
  if (step == 0) {
    double part = 0;
    for (int64_t i = threadIdx.x; i < n; i += kLargeThreads) part += squares[i];
    const double sum = group.sum(part), nd = static_cast<double>(n);
    // Twice n^2 kTiny: scaling an entry may underflow, and so may its square.
    if (threadIdx.x == 0)
      m.frobenius = round_up(std::sqrt(round_up(sum * (1 + gamma(nd * nd + 8)) + 2 * nd * nd * kTiny)));
  }
  double part = 0;
  for (int64_t i = threadIdx.x; i < n; i += kLargeThreads) part += q[i] * y[i];
  const double alpha = group.sum(part);
  const double* before = step > 0 ? detail::lanczos_vector(b, m, step - 1) : q;
  const double coupling = step > 0 ? m.off_diagonal[step - 1] : 0;
  part = 0;
  for (int64_t i = threadIdx.x; i < n; i += kLargeThreads) {
    const double x = y[i] - alpha * q[i] - coupling * before[i];
    y[i] = x;
    part += x * x;
  }
  const double beta = std::sqrt(group.sum(part));
  for (int i = group.rank(); i < step; i += kLargeThreads) {
    diagonal[i] = m.diagonal[i];
    off_diagonal[i] = m.off_diagonal[i];
  }
  if (threadIdx.x == 0) {
    diagonal[step] = m.diagonal[step] = alpha;
    off_diagonal[step] = m.off_diagonal[step] = beta;
    m.steps = step + 1;
  }
  const double previous = m.ritz;
  group.sync();
  const bool last = step + 1 == kLanczosSteps || !(beta > 1e-14 * (std::abs(previous) + std::abs(alpha)));
  bool done = last;
  if (last || step % 4 == 3) {
    const double ritz =
        detail::largest_ritz_value(group, diagonal, off_diagonal, step + 1, step > 3 ? previous : -kInfinity);
    done = last || ritz - previous <= 1e-9 * ritz;
    group.sync();  // `previous` has been read
    if (threadIdx.x == 0) m.ritz = ritz;
  }
  if (done) {
    if (threadIdx.x == 0) m.done = 1;
    return;
  }
  for (int64_t i = threadIdx.x; i < n; i += kLargeThreads) y[i] /= beta;
}

// The Ritz vector x = Q s; s by inverse iteration, three plain solves, formed by every block for itself.
// Grid: (blocks of kLargeThreads rows, matrices).
__global__ void __launch_bounds__(kLargeThreads, 2) ritz_vector_kernel(LargeBatch b) {
  double* s = dynamic_shared<double>();
  const LargeMatrix& m = b.matrices[b.first + blockIdx.y];
  const int64_t n = m.task.side;
  if (static_cast<int64_t>(blockIdx.x) * kLargeThreads >= n || !detail::wants_lanczos(m)) return;
  double* pivots = s + kLanczosSteps;
  double* diagonal = pivots + kLanczosSteps;
  double* off_diagonal = diagonal + kLanczosSteps;
  for (int i = static_cast<int>(threadIdx.x); i < m.steps; i += kLargeThreads) {
    s[i] = 1;
    diagonal[i] = m.diagonal[i];
    off_diagonal[i] = m.off_diagonal[i];
  }
  // Beyond convergence T holds copies of its top value, whose vectors may cancel in Q s: the leading part up
  // to the first row at which the value is reached has it once.
  int* size = reinterpret_cast<int*>(off_diagonal + kLanczosSteps);
  block_sync();
  if (threadIdx.x == 0) {
    const double reached = m.ritz - 1e-9 * std::abs(m.ritz);
    int steps = 0;
    for (double pivot = -1; steps < m.steps && pivot <= 0; ++steps) {
      const double e = steps > 0 ? off_diagonal[steps - 1] : 0;
      pivot = diagonal[steps] - reached - e * (e / (pivot > -DBL_MIN ? -DBL_MIN : pivot));
    }
    *size = steps;
    const double shift = m.ritz * (1 + 1e-14) + kTiny;
    double norm = 0;
    for (int pass = 0; pass < 3; ++pass) {
      norm = 0;
      for (int i = 0; i < steps; ++i) {
        const double l = i > 0 ? off_diagonal[i - 1] / pivots[i - 1] : 0;
        double pivot = diagonal[i] - shift - (i > 0 ? l * off_diagonal[i - 1] : 0);
        if (pivot == 0) pivot = -kUnitRoundoff * detail::larger(std::abs(shift), kTiny);
        pivots[i] = pivot;
        if (i > 0) s[i] -= l * s[i - 1];
      }
      for (int i = steps - 1; i >= 0; --i) {
        s[i] = (s[i] - (i + 1 < steps ? off_diagonal[i] * s[i + 1] : 0)) / pivots[i];
        norm = detail::larger(norm, std::abs(s[i]));
      }
      for (int i = 0; i < steps; ++i) s[i] /= norm;
    }
    norm = 0;
    for (int i = 0; i < steps; ++i) norm += s[i] * s[i];
    norm = std::sqrt(norm);
    for (int i = 0; i < steps; ++i) s[i] /= norm;
  }
  block_sync();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kLargeThreads + threadIdx.x;
  if (row >= n) return;
  const double* basis = detail::lanczos_vector(b, m, 0) + row;
  double x = 0;
  for (int j = 0; j < *size; ++j) x += s[j] * basis[j * leading_dimension(n)];
  detail::lanczos_vector(b, m, detail::kChosenVector)[row] = x;
}

// Its Rayleigh quotient, and what that proves. Grid: (blocks of 32 rows, matrices).
__global__ void __launch_bounds__(kLargeThreads, 2) rayleigh_kernel(LargeBatch b) {
  double* shared = dynamic_shared<double>();
  LargeMatrix& m = b.matrices[b.first + blockIdx.y];
  const int64_t n = m.task.side;
  if (static_cast<int64_t>(blockIdx.x) * detail::kLanczosRows >= n || !detail::wants_lanczos(m)) return;
  const double* x = detail::lanczos_vector(b, m, detail::kChosenVector);
  double* y = detail::lanczos_vector(b, m, detail::kProductVector);
  detail::multiply_rows(m, x, y, nullptr);
  if (!detail::last_block_of(m, shared)) return;

  BlockGroup<kLargeThreads> group(shared);
  double product = 0, length = 0;
  for (int64_t i = threadIdx.x; i < n; i += kLargeThreads) {
    product += x[i] * y[i];
    length += x[i] * x[i];
  }
  product = group.sum(product);
  length = group.sum(length);
  if (threadIdx.x != 0) return;
  const double nd = static_cast<double>(n), tiny = (nd + 1) * (nd + 1) * kTiny;
  m.theta = m.back * m.diagonal[0];  // the start vector's quotient, should Lanczos have broken down
  if (length > 0.5 && product < kInfinity) {
    const double theta = product / length;
    // n-term sums in the product and at the quotient's two ends; underflow of products in either unit.
    const double proven = round_down(theta - (gamma(3 * nd + 8) * m.frobenius * (1 + 1e-10) + tiny));
    m.theta = m.back * theta;
    m.top_lower = round_down(m.back * proven - tiny);
  }
  m.top_upper = std::fmin(m.top_upper, round_up(m.back * m.frobenius));
}

// Leaves theta, top_lower and top_upper of every matrix that needs them: 3 + steps launches.
inline void propose_top(const LargeBatch& b, const LargeShapes& shapes, cudaStream_t stream,
                        int32_t steps = kLanczosSteps) {
  const int64_t side = shapes.side(b.first);
  const unsigned matrices = static_cast<unsigned>(b.count);
  const dim3 rows(static_cast<unsigned>((side + detail::kLanczosRows - 1) / detail::kLanczosRows), matrices);
  const dim3 blocks(static_cast<unsigned>((side + kLargeThreads - 1) / kLargeThreads), matrices);
  BSGAP_LAUNCH(lanczos_start_kernel, dim3(matrices), kLargeThreads, detail::kLanczosShared, stream, b);
  for (int32_t step = 0; step < steps; ++step)
    BSGAP_LAUNCH(lanczos_step_kernel, rows, kLargeThreads, detail::kLanczosShared, stream, b, step);
  BSGAP_LAUNCH(ritz_vector_kernel, blocks, kLargeThreads, detail::kLanczosShared, stream, b);
  BSGAP_LAUNCH(rayleigh_kernel, rows, kLargeThreads, detail::kLanczosShared, stream, b);
}

}  // namespace bsgap::cuda
