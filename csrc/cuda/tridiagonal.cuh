// Householder tridiagonalisation of a matrix of at most Group::kSize rows by the threads of a group, in
// shared memory, and Sturm counts on the result, float64. Point counts only.
//
// The lower triangle is packed by rows. Row i starts at i(i + 1) / 2, and 16 consecutive triangular numbers
// take every value modulo 16 once: threads that walk down 16 rows in step, as all loops here do, hit 16
// different 8-byte banks, and so do threads that read along a row.
#pragma once

#include <cmath>

#include "../core/rounding.h"
#include "group.cuh"

namespace bsgap::cuda {

__host__ __device__ inline constexpr int packed(int i) { return i * (i + 1) / 2; }

// Shared memory of one matrix; `side` is the largest of the launch, Group::kSize threads work on it.
struct MatrixMemory {
  double* lower;     // packed(side)
  double* diagonal;  // side; of the tridiagonal matrix, then of G
  double* off;       // side
  double* squares;   // side; of `off`
  double* v;         // side
  double* lanes;     // Group::kSize
  double* scratch;   // Group::kScratch

  template <class Group>
  __host__ __device__ static constexpr int doubles(int side) {
    return packed(side) + 4 * side + Group::kSize + Group::kScratch;
  }
  template <class Group>
  __device__ static MatrixMemory at(double* memory, int side) {
    MatrixMemory m;
    m.lower = memory;
    m.diagonal = m.lower + packed(side);
    m.off = m.diagonal + side;
    m.squares = m.off + side;
    m.v = m.squares + side;
    m.lanes = m.v + side;
    m.scratch = m.lanes + Group::kSize;
    return m;
  }
};

// The lower triangle of factor * G - shift I, warps over rows so that global reads are contiguous.
template <class Group>
__device__ void load_lower(Group& group, const double* __restrict__ g, int n, double factor, double shift,
                           double* lower) {
  group.sync();
  const int lane = group.rank() % kWarp;
#pragma unroll 2
  for (int i = group.rank() / kWarp; i < n; i += Group::kSize / kWarp) {
#pragma unroll
    for (int j = lane; j < Group::kSize; j += kWarp)
      if (j <= i) lower[packed(i) + j] = factor * g[static_cast<int64_t>(i) * n + j] - (i == j ? shift : 0.0);
  }
  group.sync();
}

// What Sturm counts need of a tridiagonal matrix.
struct Sturm {
  const double* diagonal;
  const double* squares;  // of the off-diagonal
  int n;
  double smallest;  // pivots below it are replaced, as in LAPACK's dstebz

  // Eigenvalues above x: positive pivots of T - x I. A vanishing pivot counts as negative, so that an
  // eigenvalue equal to x is not counted.
  __device__ int count_above(double x) const {
    double pivot = diagonal[0] - x;
    if (std::abs(pivot) < smallest) pivot = -smallest;
    int count = pivot > 0;
    for (int i = 1; i < n; ++i) {
      pivot = diagonal[i] - x - squares[i - 1] / pivot;
      if (std::abs(pivot) < smallest) pivot = -smallest;
      count += pivot > 0;
    }
    return count;
  }
};

// A column of a matrix of trace 1 ... 2 below this (the square of its norm) is far below the rounding of the
// trace, and 2 / tail stays a number above it.
inline constexpr double kNegligible = 0x1p-900;

// Overwrites m.lower, of trace 1 ... 2; four barriers a step. Thread r owns row first + r of the trailing
// matrix; where fewer than half the threads have a row, more warps share the columns of each ("parts").
template <class Group>
__device__ Sturm tridiagonalize(Group& group, const MatrixMemory& m, int n) {
  constexpr int kWarps = Group::kSize / kWarp;
  const int rank = group.rank(), warp = rank / kWarp;
  double* __restrict__ a = m.lower;
  double* __restrict__ v = m.v;
  double* __restrict__ p = m.lanes;
  for (int k = 0; k + 2 < n; ++k) {
    const int first = k + 1, rows = n - first;
    double tail = 0;
    if (rank < rows) {
      const double x = a[packed(first + rank) + k];
      v[rank] = x;
      tail = rank > 0 ? x * x : 0.0;
    }
    tail = group.sum(tail);
    const double head = a[packed(first) + k];
    if (tail < kNegligible) {
      if (rank == 0) m.off[k] = head;
      continue;
    }
    const double norm = std::sqrt(head * head + tail);
    const double alpha = head > 0 ? -norm : norm;
    const double v_first = head - alpha;  // v[0], for everyone only after the next barrier
    const double beta = 2.0 / (tail + v_first * v_first);
    if (rank == 0) {
      m.off[k] = alpha;
      v[0] = v_first;
    }

    const int warps_of_rows = (rows + kWarp - 1) / kWarp;
    const int parts = kWarps / warps_of_rows;
    const int part = warp / warps_of_rows, row = rank - part * warps_of_rows * kWarp, i = first + row;
    const bool active = part < parts && row < rows;
    const double vi = row == 0 ? v_first : active ? v[row] : 0.0;
    const int start = packed(i);
    double share = 0;
    if (active) {
      double sums[4] = {part == 0 ? a[start + first] * v_first : 0.0, 0, 0, 0};
      for (int j = first + 1 + part; j < n; j += 4 * parts) {
#pragma unroll
        for (int u = 0; u < 4; ++u) {
          const int column = j + u * parts;
          if (column < n) sums[u] += a[column <= i ? start + column : packed(column) + i] * v[column - first];
        }
      }
      share = beta * ((sums[0] + sums[1]) + (sums[2] + sums[3]));
      p[part * warps_of_rows * kWarp + row] = share;
    }
    const double half = 0.5 * beta * group.sum(vi * share);
    if (parts > 1) {
      if (rank < rows) {
        double sum = p[rank];
        for (int q = 1; q < parts; ++q) sum += p[q * warps_of_rows * kWarp + rank];
        p[rank] = sum;
      }
      group.sync();
    }
    // A -= v w^T + w v^T with w = p - half v: both multiples of v v^T go to the row's own factor.
    if (active) {
      const double wi = p[row] - 2 * half * vi;
#pragma unroll 4
      for (int j = first + part; j <= i; j += parts)
        a[start + j] = (a[start + j] - vi * p[j - first]) - wi * v[j - first];
    }
#ifdef BSGAP_PLANT_OUT_OF_BOUNDS
    if (rank == 0) m.scratch[Group::kScratch] = 0;
#endif
#ifndef BSGAP_PLANT_MISSING_BARRIER
    group.sync();
#endif
  }
  group.sync();
  double square = 0;
  if (rank < n) {
    m.diagonal[rank] = a[packed(rank) + rank];
    if (n > 1 && rank == n - 2) m.off[rank] = a[packed(n - 1) + n - 2];
    if (rank + 1 < n) square = m.off[rank] * m.off[rank];
    m.squares[rank] = square;
  }
  const double scale = group.max(square);
  return {m.diagonal, m.squares, n, detail::larger(scale, 1.0) * std::numeric_limits<double>::min()};
}

// Where the eigenvalues are (Gershgorin) and how closely bisection can tell: about a unit in the last place
// of the largest in magnitude.
struct Spread {
  double low, high, largest_diagonal, resolution;
};

template <class Group>
__device__ Spread spread(Group& group, const MatrixMemory& m, int n) {
  const int i = group.rank();
  double low = kInfinity, high = -kInfinity, diagonal = -kInfinity;
  if (i < n) {
    const double radius = (i > 0 ? std::abs(m.off[i - 1]) : 0) + (i + 1 < n ? std::abs(m.off[i]) : 0);
    diagonal = m.diagonal[i];
    low = diagonal - radius;
    high = diagonal + radius;
  }
  Spread s;
  s.low = -group.max(-low);
  s.high = group.max(high);
  s.largest_diagonal = group.max(diagonal);
  s.resolution = 2 * kUnitRoundoff * detail::larger(std::abs(s.low), std::abs(s.high));
  return s;
}

// Point `index` of `points` that cut low ... high into equal pieces, ends included at -1 and `points`.
__device__ __forceinline__ double section(double low, double high, int index, int points) {
  if (index < 0) return low;
  const double x = low + (high - low) / (points + 1) * (index + 1);
  return index >= points || x > high ? high : x;
}

// Each round cuts the interval into kSize + 1 pieces: 8 rounds for 128 threads, 11 for 32.
template <class Group>
__device__ double largest_by_multisection(Group& group, const Sturm& t, const Spread& s) {
  constexpr int kMaxRounds = 16;
  double low = s.largest_diagonal, high = s.high;
  for (int round = 0; round < kMaxRounds && high - low > s.resolution; ++round) {
    const int below = group.count(t.count_above(section(low, high, group.rank(), Group::kSize)) >= 1);
    const double next_low = section(low, high, below - 1, Group::kSize);
    const double next_high = section(low, high, below, Group::kSize);
    if (!(next_high - next_low < high - low)) break;
    low = next_low;
    high = next_high;
  }
  return low + (high - low) / 2;
}

// All eigenvalues times 2^exponent in ascending order, a thread each: one multisection together, then
// bisection. All walk the same tree of intervals and a larger rank never goes higher, so the results are
// monotone.
template <class Group>
__device__ void all_by_bisection(Group& group, const MatrixMemory& m, const Sturm& t, const Spread& s,
                                 int exponent, double* out) {
  const int rank = group.rank();
  m.lanes[rank] = t.count_above(section(s.low, s.high, rank, Group::kSize));
  group.sync();
  if (rank < t.n) {
    const int from_top = t.n - rank;
    int below = 0;
    for (int i = 0; i < Group::kSize; ++i) below += m.lanes[i] >= from_top;
    double low = section(s.low, s.high, below - 1, Group::kSize);
    double high = section(s.low, s.high, below, Group::kSize);
    while (high - low > s.resolution) {
      const double middle = low + (high - low) / 2;
      if (middle <= low || middle >= high) break;
      (t.count_above(middle) >= from_top ? low : high) = middle;
    }
    out[rank] = std::ldexp(low + (high - low) / 2, exponent);
  }
}

}  // namespace bsgap::cuda
