// Counts, spectra and certified intervals of all matrices of at most kSmallSide rows, in one launch.
//
// A matrix of up to 32 rows takes a warp, one of up to 128 rows a block of 128 threads: reading the matrix
// from shared memory binds the tridiagonalisation (16 doubles a clock of an SM), and 4 warps already ask for
// that. The packed triangle of 128 rows and its vectors are 71 KB, which fits the 99 KB a block may have on
// the smallest of the GPUs served.
//
// Latency of one matrix of 64 rows, in clocks, from an instruction count (a dependent float64 operation taken
// as 10, a division or square root as 100, a shuffle or a shared read as 30, a barrier as 40):
//   tridiagonalisation  62 steps x (2 reductions 560 + root and division 200 + matrix product and update,
//                       22 + 22 rounds of 10 on average)                              about 75,000
//   largest eigenvalue  8 rounds x 64 pivots x 120                                    about 61,000
//   the count itself    64 pivots x 120                                               about  8,000
// together 144,000, which is 80 us at 1.8 GHz. With more multiprocessors than matrices nothing waits.
// An interval adds four LDL^T of 64 columns x (barrier, division, 32 rounds of 10 on average), 30,000 each.
#pragma once

#include <cmath>
#include <limits>

#include "ldlt_small.cuh"

namespace bsgap::cuda {

inline constexpr int kSmallThreads = 128;
inline constexpr int kSmallBlocks = 4;  // on a multiprocessor at once: 128 registers a thread, no spills
inline constexpr int kNarrowSide = 32;  // a warp each

using SmallBlock = BlockGroup<kSmallThreads>;

struct SmallLaunch {
  CountProblem problem;
  int64_t first_matrix;  // table order, of the first matrix of at most kSmallSide rows
  int64_t wide;          // matrices that take a block; the narrow ones follow, kSmallThreads / 32 to a block
  int64_t narrow;
  int wide_side, narrow_side;  // the largest of each, which shape the shared memory
};

// NaN, infinities and zero: section "Range" of docs/certificates.md.
template <class Group>
__device__ void write_trivial(Group& group, const CountProblem& p, const MatrixTask& task, bool zero) {
  for (int64_t j = group.rank(); j < p.threshold_count; j += Group::kSize) {
    const Threshold t = threshold_of(p, task, j);
    const int64_t count = !zero || is_nan(t) ? -1 : is_negative(t) ? task.side : 0;
    const int64_t at = task.result * p.threshold_count + j;
    p.counts[at] = count;
    if (p.certify) p.lower[at] = p.upper[at] = count;
  }
  const double value = zero ? 0.0 : std::numeric_limits<double>::quiet_NaN();
  if (p.moments != nullptr && group.rank() < kMoments)
    p.moments[task.result * kMoments + group.rank()] = value;
  if (!p.spectrum) return;
  double* out = p.eigenvalues + first_eigenvalue(group, p, task);
  for (int64_t i = group.rank(); i < task.side; i += Group::kSize) out[i] = value;
}

// t: of G * 2^-exponent. top: the largest eigenvalue of G.
__device__ inline int64_t point_count(const Sturm& t, const Threshold& threshold, double top, int exponent) {
  if (is_nan(threshold)) return -1;
  if (is_negative(threshold)) return t.n;
  if (threshold.relative >= 1) return 0;  // tau >= sigma_max
  const double a = detail::larger(threshold.absolute, 0.0), r = detail::larger(threshold.relative, 0.0);
  const double tau_squared = detail::larger(a * a, r * (r * detail::larger(top, 0.0)));
  return tau_squared < kInfinity ? t.count_above(std::ldexp(tau_squared, -exponent)) : 0;
}

__device__ inline int clamped(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

template <class Group>
__device__ bool any_relative(Group& group, const CountProblem& p, const MatrixTask& task) {
  double found = 0;
  for (int64_t j = group.rank(); j < p.threshold_count; j += Group::kSize)
    if (const double r = threshold_of(p, task, j).relative; r > 0 && r < 1) found = 1;
  return group.max(found) > 0;
}

template <class Group>
__device__ void write_intervals(Group& group, const MatrixMemory& m, const CountProblem& p,
                                const MatrixTask& task, CertifiedMatrix& c, double proposal) {
  const int i = group.rank();
  const double diagonal = i < c.n ? c.g[static_cast<int64_t>(i) * c.n + i] : -kInfinity;
  group.sync();  // the tridiagonal matrix has been read
  if (i < c.n) m.diagonal[i] = diagonal;
  c.largest_diagonal = group.max(diagonal);
  Bounds top = largest_eigenvalue(group, m, c, proposal);
  top.lower = round_down(top.lower - c.gram_error);
  top.upper = round_up(top.upper + c.gram_error);
  for (int64_t j = 0; j < p.threshold_count; ++j) {
    const Interval found = certified_interval(group, m, c, top, threshold_of(p, task, j));
    if (i != 0) continue;
    const int64_t at = task.result * p.threshold_count + j;
    p.lower[at] = found.lower;
    p.upper[at] = found.upper;
    if (p.counts[at] < found.lower) p.counts[at] = found.lower;
    if (p.counts[at] > found.upper) p.counts[at] = found.upper;
  }
}

template <class Group>
__device__ void count_matrix(Group& group, const MatrixMemory& m, const CountProblem& p, int64_t matrix) {
  const MatrixTask task = find_matrix(p, matrix);
  const int n = static_cast<int>(task.side), rank = group.rank();
  const double trace = group.sum(rank < n ? task.g[static_cast<int64_t>(rank) * n + rank] : 0.0);
  const bool zero = is_zero(p, task, trace);
  if (!std::isfinite(trace) || zero) {
    write_trivial(group, p, task, zero);
    return;
  }
  // Squares of entries must stay numbers: the tridiagonal form is that of G * 2^-exponent, of trace 1 ... 2.
  const int exponent = clamped(std::ilogb(trace), -1000, 1000);
  load_lower(group, task.g, n, std::ldexp(1.0, -exponent), 0.0, m.lower);
  CertifiedMatrix c{task.g, n, 0, 0, 0};
  double frobenius = 0;  // of G * 2^-exponent, squared
  if (p.certify || p.moments != nullptr) {
    double squares = 0;
    if (rank < n) {
      for (int j = 0; j < rank; ++j) squares += 2 * (m.lower[packed(rank) + j] * m.lower[packed(rank) + j]);
      squares += m.lower[packed(rank) + rank] * m.lower[packed(rank) + rank];
    }
    frobenius = group.sum(squares);
  }
  if (p.certify) {
    const double nd = n;
    const double scaled_norm =
        std::sqrt(round_up(frobenius * (1 + gamma(nd * nd + 8)) + nd * nd * kTiny)) + nd * kTiny;
    c.frobenius = round_up(std::ldexp(round_up(scaled_norm), exponent));
    c.gram_error = gram_error_of(p, task, trace);
  }
  const Sturm t = tridiagonalize(group, m, n);
  const Spread s = spread(group, m, n);
  double top = 0;
  if (p.certify || p.moments != nullptr || any_relative(group, p, task))
    top = std::ldexp(largest_by_multisection(group, t, s), exponent);
  if (p.moments != nullptr && rank == 0) {
    double* out = p.moments + task.result * kMoments;
    out[0] = trace;
    out[1] = std::ldexp(std::sqrt(frobenius), exponent);
    out[2] = detail::larger(top, 0.0);
  }
  for (int64_t j = rank; j < p.threshold_count; j += Group::kSize)
    p.counts[task.result * p.threshold_count + j] = point_count(t, threshold_of(p, task, j), top, exponent);
  if (p.spectrum)
    all_by_bisection(group, m, t, s, exponent, p.eigenvalues + first_eigenvalue(group, p, task));
  if (p.certify) write_intervals(group, m, p, task, c, top);
}

__global__ void __launch_bounds__(kSmallThreads, kSmallBlocks)
    count_small_kernel(const __grid_constant__ SmallLaunch l) {
  const int64_t block = blockIdx.x;
  double* memory = dynamic_shared<double>();
  if (block < l.wide) {
    const MatrixMemory m = MatrixMemory::at<SmallBlock>(memory, l.wide_side);
    SmallBlock group(m.scratch);
    count_matrix(group, m, l.problem, l.first_matrix + block);
    return;
  }
  const int warp = static_cast<int>(threadIdx.x / kWarp);
  const int64_t matrix = (block - l.wide) * (kSmallThreads / kWarp) + warp;
  if (matrix >= l.narrow) return;
  const MatrixMemory m = MatrixMemory::at<WarpGroup>(
      memory + warp * MatrixMemory::doubles<WarpGroup>(l.narrow_side), l.narrow_side);
  WarpGroup group(m.scratch);
  count_matrix(group, m, l.problem, l.first_matrix + l.wide + matrix);
}

// Bytes of shared memory of a launch whose largest sides are these (0: none of that kind).
inline constexpr size_t small_shared_bytes(int wide_side, int narrow_side) {
  const int wide = wide_side > 0 ? MatrixMemory::doubles<SmallBlock>(wide_side) : 0;
  const int narrow =
      narrow_side > 0 ? kSmallThreads / kWarp * MatrixMemory::doubles<WarpGroup>(narrow_side) : 0;
  return sizeof(double) * static_cast<size_t>(wide > narrow ? wide : narrow);
}

// Serves the table rows of at most kSmallSide; needs no workspace.
inline void count_small_grams(const CountProblem& problem, cudaStream_t stream) {
  SmallLaunch l{problem, 0, 0, 0, 0, 0};
  for (int64_t r = 0; r < problem.rows; ++r) {
    const int64_t side = problem.sides[r], count = problem.batches[r];
    if (side > kSmallSide) {
      l.first_matrix += count;
    } else if (side > kNarrowSide) {
      l.wide += count;
      if (count > 0 && side > l.wide_side) l.wide_side = static_cast<int>(side);
    } else {
      l.narrow += count;
      if (count > 0 && side > l.narrow_side) l.narrow_side = static_cast<int>(side);
    }
  }
  if (l.wide + l.narrow == 0 || problem.threshold_count + problem.spectrum == 0) return;
  constexpr int64_t kWarps = kSmallThreads / kWarp;
  const int64_t blocks = l.wide + (l.narrow + kWarps - 1) / kWarps;
  BSGAP_LAUNCH(count_small_kernel, dim3(static_cast<unsigned>(blocks)), kSmallThreads,
               small_shared_bytes(l.wide_side, l.narrow_side), stream, l);
}

}  // namespace bsgap::cuda
