// Certified intervals of one matrix of at most Group::kSize rows by the threads of a group: the unpivoted
// LDL^T of csrc/core/ldlt.h and the bounds of csrc/core/counts.h, with the constants of docs/certificates.md.
#pragma once

#include <cmath>

#include "matrix.cuh"
#include "tridiagonal.cuh"

namespace bsgap::cuda {

struct Inertia {
  int positive = 0;    // positive pivots
  bool valid = false;  // false: a pivot was zero or not finite, nothing is known
  double error = 0;    // factorisation, shift and underflow terms together, rounded up
};

// What a certificate starts from.
struct CertifiedMatrix {
  const double* g;
  int n;
  double gram_error;        // ||g - M||_2
  double frobenius;         // upper bound of ||g||_F
  double largest_diagonal;  // a lower bound of the largest eigenvalue of g, exactly
};

// LDL^T of G - shift I, one barrier a column: thread i owns row i, publishes its entry of the next column as
// soon as it is known, and divides by the pivot itself. Two buffers for the columns: a thread writes to one
// of them only after the barrier that ends every read of the column before.
template <class Group>
__device__ Inertia count_above(Group& group, const MatrixMemory& m, const double* g, int n, double shift) {
  Inertia result;
  load_lower(group, g, n, 1.0, shift, m.lower);
  const int i = group.rank();
  const bool owns = i < n;
  double* __restrict__ row = m.lower + packed(owns ? i : 0);
  double growth = 0, largest = 0;
  if (owns) {
    largest = std::abs(row[i]);
    m.v[i] = row[0];
  }
  for (int k = 0; k < n; ++k) {
    group.sync();
    const double* __restrict__ w = k % 2 == 0 ? m.v : m.lanes;
    double* __restrict__ next = k % 2 == 0 ? m.lanes : m.v;
    const double pivot = w[k];
    if (pivot == 0 || !std::isfinite(pivot)) return result;
    result.positive += pivot > 0;
    if (i == k) growth += std::abs(pivot);
    if (owns && i > k) {
      const double wi = w[i], l = wi / pivot;
      growth += std::abs(wi * l);
      next[i] = row[k + 1] - l * w[k + 1];
#pragma unroll 4
      for (int j = k + 2; j <= i; ++j) row[j] -= l * w[j];
    }
  }
  growth = group.sum(growth);
  largest = group.max(largest);
  if (!std::isfinite(growth)) return result;
  const double nd = n;
  result.valid = true;
  const double factor = gamma(nd + 4) * growth * (1.0 + gamma(nd * nd / 2 + 2 * nd + 8));
  const double of_shift = shift == 0 ? 0 : kUnitRoundoff * largest * (1.0 + 4 * kUnitRoundoff);
  result.error = round_up(factor + of_shift + (nd + 1) * (nd + 1) * kTiny);
  return result;
}

// Bounds of the largest eigenvalue of g. `proposal` (from the tridiagonal matrix) is not believed: a shift at
// which LDL^T finds a positive pivot bounds from below, one without any from above. The proposal is right to
// about n u, so the first gap of 2^-27 = 7e-9 passes unless the factorisation cannot resolve it. Both ends
// and all guesses share one copy of the factorisation, here and below: it is most of the kernel's code.
template <class Group>
__device__ Bounds largest_eigenvalue(Group& group, const MatrixMemory& m, const CertifiedMatrix& c,
                                     double proposal) {
  constexpr int kGuesses = 4;
  Bounds b{c.largest_diagonal > 0 ? c.largest_diagonal : 0.0, round_up(c.frobenius)};
  if (!(proposal > 0) || !(proposal < kInfinity)) return b;
#pragma unroll 1
  for (int end = 0; end < 2; ++end) {
    const bool below = end == 0;
    double gap = 0x1p-27;
#pragma unroll 1
    for (int guess = 0; guess < kGuesses; ++guess, gap *= 64) {
      const double shift = below ? proposal * (1 - gap) : proposal * (1 + gap) + kTiny;
      if (below ? !(shift > b.lower) : !(shift < b.upper)) break;  // the end is already as good
      const Inertia i = count_above(group, m, c.g, c.n, shift);
      if (!i.valid) continue;
      if (i.positive > 0) {
        b.lower = detail::larger(b.lower, round_down(shift - i.error));
        if (below && i.error <= gap * proposal) break;
      } else {
        const double upper = round_up(shift + i.error);
        b.upper = upper < b.upper ? upper : b.upper;
        if (!below) break;
      }
    }
  }
  return b;
}

// Only a guess of where to look.
template <class Group>
__device__ double a_priori_error(Group& group, const MatrixMemory& m, const CertifiedMatrix& c,
                                 double shift) {
  const int i = group.rank();
  const double trace = group.sum(i < c.n ? std::abs(m.diagonal[i] - shift) : 0.0);
  return c.gram_error + (2 * gamma(c.n + 4.0) + kUnitRoundoff) * trace;
}

inline constexpr int kShiftGuesses = 4;

// A bound of #{lambda(M) > t}: from below (`lower`) the count at a shift s with s - error(s) >= t, from above
// one with s + error(s) <= t.
template <class Group>
__device__ int certified_end(Group& group, const MatrixMemory& m, const CertifiedMatrix& c, double t,
                             bool lower) {
  const double outwards = lower ? 1 : -1;
  const int nothing = lower ? 0 : c.n;  // what holds without any arithmetic
  double shift = t + outwards * 1.25 * a_priori_error(group, m, c, t);
#pragma unroll 1
  for (int guess = 0; guess < kShiftGuesses; ++guess) {
    shift += outwards * outward_rounding(shift);
    if (!std::isfinite(shift)) break;
    const Inertia i = count_above(group, m, c.g, c.n, shift);
    if (!i.valid) {
      shift += outwards * 0.25 * detail::larger(std::abs(shift - t), kTiny);
      continue;
    }
    if (i.positive == nothing) break;
    const double error = round_up(c.gram_error + i.error);
    if (lower ? round_down(shift - error) >= t : round_up(shift + error) <= t) return i.positive;
    shift = t + outwards * 1.5 * error;
  }
  return nothing;
}

struct Interval {
  int64_t lower, upper;
};

// Holds #{lambda(M) > tau^2}. top: bounds of the largest eigenvalue of M. All threads call with the same
// arguments and get the same answer.
template <class Group>
__device__ Interval certified_interval(Group& group, const MatrixMemory& m, const CertifiedMatrix& c,
                                       const Bounds& top, const Threshold& threshold) {
  const int64_t n = c.n;
  if (is_nan(threshold)) return {-1, -1};
  if (is_negative(threshold)) return {n, n};
  if (threshold.relative >= 1) return {0, 0};  // tau >= sigma_max
  // r * (r * lambda), not (r * r) * lambda: r * r may underflow where the product does not.
  const double a = detail::larger(threshold.absolute, 0.0), r = detail::larger(threshold.relative, 0.0);
  const Bounds t{detail::larger(round_down(a * a), round_down(r * (r * top.lower))),
                 detail::larger(round_up(a * a), round_up(r * (r * top.upper)))};
  if (t.lower >= top.upper) return {0, 0};
  int64_t ends[2] = {0, n};
#pragma unroll 1
  for (int lower = 0; lower < 2; ++lower) {
    const int found = certified_end(group, m, c, lower == 1 ? t.upper : t.lower, lower == 1);
    (lower == 1 ? ends[0] : ends[1]) = found;
    if (found == 0) break;  // no more than 0 above: the lower end is 0 too
  }
  const int64_t lower = ends[0], upper = ends[1];
  // Ends that contradict each other: a bound was false (a broken processor), and nothing is known.
  if (lower > upper) return {0, n};
  return {lower, upper};
}

}  // namespace bsgap::cuda
