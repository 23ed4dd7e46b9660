// One matrix of a grouped launch: its table row, its thresholds, and what needs no arithmetic.
#pragma once

#include <cmath>

#include "../core/rounding.h"
#include "../core/threshold.h"
#include "count.cuh"

namespace bsgap::cuda {

struct MatrixTask {
  const double* g;       // side x side, row-major, both triangles
  int64_t row;           // of the table
  int64_t in_row;        // index among the matrices of the row
  int64_t side, result;  // result: index in the caller's order
};

// The last row whose first matrix is not beyond `matrix` (table order): rows without matrices are passed
// over.
__device__ inline MatrixTask find_matrix(const CountProblem& p, int64_t matrix) {
  int64_t low = 0, high = p.rows;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (p.table[middle * kTableColumns + kFirstMatrix] <= matrix ? low : high) = middle;
  }
  const int64_t* row = p.table + low * kTableColumns;
  const int64_t in_row = matrix - row[kFirstMatrix];
  const int64_t side = row[kSide];
  return {p.grams == nullptr ? nullptr : p.grams + row[kFirstGram] + in_row * side * side, low, in_row, side,
          row[kFirstResult] + in_row};
}

// Place of the matrix's part of a buffer that holds size_of(side) elements for each matrix, in table order.
// All threads of the group call. Sums below 2^53 are exact.
template <class Group, class Size>
__device__ int64_t place_of(Group& group, const CountProblem& p, const MatrixTask& m, const Size& size_of) {
  double before = 0;
  for (int64_t r = group.rank(); r < m.row; r += Group::kSize) {
    const int64_t* row = p.table + r * kTableColumns;
    before += static_cast<double>(size_of(row[kSide]) * row[kCount]);
  }
  return static_cast<int64_t>(group.sum(before)) + m.in_row * size_of(m.side);
}

template <class Group>
__device__ int64_t first_eigenvalue(Group& group, const CountProblem& p, const MatrixTask& m) {
  return place_of(group, p, m, [](int64_t side) { return side; });
}

__device__ inline int exponent_of(const CountProblem& p, const MatrixTask& m) {
  return p.exponent == nullptr ? 0 : p.exponent[m.result];
}

// Threshold j of the matrix, for the scaled matrix whose Gram matrix is counted.
__device__ inline Threshold threshold_of(const CountProblem& p, const MatrixTask& m, int64_t j) {
  Threshold t{p.atol, p.rtol};
  if (p.thresholds != nullptr) {
    const double* pair = p.thresholds + ((p.thresholds_shared ? 0 : m.result * p.threshold_count) + j) * 2;
    t = {pair[0], pair[1]};
  }
  return scaled(t, exponent_of(p, m));
}

__device__ inline bool is_nan(const Threshold& t) { return std::isnan(t.absolute) || std::isnan(t.relative); }
// tau < 0 <= sigma: everything counts.
__device__ inline bool is_negative(const Threshold& t) { return t.absolute < 0 && t.relative < 0; }

// Whether a Gram matrix of this trace is that of a zero matrix. A given error above 0 says that more may have
// been there, lost to underflow: centred values are not scaled to their own size.
__device__ inline bool is_zero(const CountProblem& p, const MatrixTask& m, double trace) {
  return trace == 0 && (p.gram_error == nullptr || p.gram_error[m.result] == 0);
}

// Section 1 of docs/certificates.md: bound of ||G - X^T X||_2 from the computed trace.
__device__ inline double gram_error_of(const CountProblem& p, const MatrixTask& m, double trace) {
  if (p.gram_error != nullptr) return p.gram_error[m.result];
  const int64_t* row = p.table + m.row * kTableColumns;
  const double c = static_cast<double>(row[kRoundings]), k = static_cast<double>(m.side);
  const double cells = k * static_cast<double>(row[kOuter]) * static_cast<double>(row[kInner]);
  const double frobenius_sq = round_up(trace * (1 + 2 * gamma(c + k)) + cells * kTiny);
  const double rounding = round_up(gamma(c) * frobenius_sq + cells * kTiny);
  // Scaling down may have underflowed: every entry moved by at most kTiny / 2.
  const double lost = exponent_of(p, m) < 0 ? std::sqrt(cells) * kTiny : 0;
  return round_up(rounding + (2 * std::sqrt(frobenius_sq) + lost) * lost);
}

}  // namespace bsgap::cuda
