// Point counts of kLanes small symmetric matrices at once, one a lane of the vector unit: Householder
// tridiagonalisation, the largest eigenvalue by Laguerre's iteration, Sturm counts. A matrix of side 32 alone
// has rows too short for wide vectors; here every operation of every step fills them.
//
// Point counts only: no backward-error theorem with constants stands behind them, so no certificate is built
// on them (interval ends come from ldlt.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "buffer.h"
#include "isa.h"
#include "rounding.h"

namespace bsgap {

inline constexpr int kLanes = 8;
typedef double Lanes __attribute__((vector_size(kLanes * sizeof(double))));

namespace detail {

inline int64_t triangle(int64_t i) { return i * (i + 1) / 2; }

// Row blocks of kRows rows by columns [first, columns): p += A v, with A as rows and as columns.
template <int kRows>
[[gnu::always_inline]] inline void lanes_multiply(const Lanes* a, int64_t i, int64_t first, const Lanes* v,
                                                  Lanes* p) {
  const Lanes* row[kRows];
  Lanes sum[kRows], vi[kRows];
  for (int r = 0; r < kRows; ++r) {
    row[r] = a + triangle(i + r);
    sum[r] = Lanes{};
    vi[r] = v[i + r];
  }
  for (int64_t j = first; j < i; ++j) {
    const Lanes vj = v[j];
    Lanes pj = p[j];
    for (int r = 0; r < kRows; ++r) {
      const Lanes entry = row[r][j];
      sum[r] += entry * vj;
      pj += entry * vi[r];
    }
    p[j] = pj;
  }
  for (int r = 0; r < kRows; ++r) {
    for (int q = 0; q < r; ++q) {
      sum[r] += row[r][i + q] * vi[q];
      p[i + q] += row[r][i + q] * vi[r];
    }
    p[i + r] += sum[r] + row[r][i + r] * vi[r];
  }
}

// The same rows: A -= v p^T + p v^T.
template <int kRows>
[[gnu::always_inline]] inline void lanes_update(Lanes* a, int64_t i, int64_t first, const Lanes* v,
                                                const Lanes* p) {
  Lanes* row[kRows];
  Lanes vi[kRows], pi[kRows];
  for (int r = 0; r < kRows; ++r) {
    row[r] = a + triangle(i + r);
    vi[r] = v[i + r];
    pi[r] = p[i + r];
  }
  for (int64_t j = first; j < i; ++j) {
    const Lanes vj = v[j], pj = p[j];
    for (int r = 0; r < kRows; ++r) row[r][j] = row[r][j] - vi[r] * pj - pi[r] * vj;
  }
  for (int r = 0; r < kRows; ++r)
    for (int q = 0; q <= r; ++q) row[r][i + q] = row[r][i + q] - vi[r] * pi[q] - pi[r] * vi[q];
}

// Of matrices whose largest entry is about 1: entries below 1e-140 are dropped, because reciprocals of their
// squares overflow and one NaN would make a wrong count of the lane. No eigenvalue moves by more.
inline constexpr double kNegligibleSquares = 1e-280;

// a: lower triangles, row after row, overwritten. Golub & Van Loan, Matrix Computations, section 8.3.1.
// scratch: 2 n.
[[gnu::always_inline]] inline void lanes_tridiagonalize_body(Lanes* a, int64_t n, Lanes* diagonal,
                                                             Lanes* off_diagonal, Lanes* scratch) {
  Lanes *v = scratch, *p = scratch + n;
  for (int64_t k = 0; k + 2 < n; ++k) {
    const int64_t first = k + 1;
    for (int64_t i = first; i < n; ++i) v[i] = a[triangle(i) + k];
    Lanes tail{};
    for (int64_t i = first + 1; i < n; ++i) tail += v[i] * v[i];
    const Lanes head = v[first];
    Lanes alpha = head * head + tail, zero{};
    for (int l = 0; l < kLanes; ++l) alpha[l] = std::sqrt(alpha[l]);
    alpha = head > 0 ? -alpha : alpha;
    const auto nothing = tail < kNegligibleSquares;
    alpha = nothing ? head : alpha;  // nothing to eliminate: the factor is then 0
    v[first] = head - alpha;
    const Lanes beta = nothing ? zero : 2.0 / (tail + v[first] * v[first]);
    for (int64_t i = first; i < n; ++i) p[i] = zero;
    int64_t i = first;
    for (; i + 4 <= n; i += 4) lanes_multiply<4>(a, i, first, v, p);
    for (; i < n; ++i) lanes_multiply<1>(a, i, first, v, p);
    Lanes vp{};
    for (i = first; i < n; ++i) {
      p[i] *= beta;
      vp += v[i] * p[i];
    }
    const Lanes half = 0.5 * beta * vp;
    for (i = first; i < n; ++i) p[i] -= half * v[i];
    for (i = first; i + 4 <= n; i += 4) lanes_update<4>(a, i, first, v, p);
    for (; i < n; ++i) lanes_update<1>(a, i, first, v, p);
    off_diagonal[k] = alpha;
  }
  for (int64_t k = 0; k < n; ++k) diagonal[k] = a[triangle(k) + k];
  if (n > 1) off_diagonal[n - 2] = a[triangle(n - 1) + n - 2];
}
BSGAP_PER_ISA(void, lanes_tridiagonalize,
              (Lanes * a, int64_t n, Lanes* diagonal, Lanes* off_diagonal, Lanes* scratch),
              (a, n, diagonal, off_diagonal, scratch))

// Largest eigenvalues: Laguerre's iteration from Gershgorin's upper bound, which comes down to the largest
// root without passing it, cubically near it (J. H. Wilkinson, The Algebraic Eigenvalue Problem, 1965,
// section 7.62). The characteristic polynomial is the product of the pivots of T - x I, its logarithmic
// derivatives are sums.
[[gnu::always_inline]] inline void lanes_largest_body(const Lanes* diagonal, const Lanes* off_diagonal,
                                                      int64_t n, Lanes* result) {
  Lanes upper = diagonal[0] - diagonal[0];  // of a positive semidefinite matrix: at least 0
  for (int64_t i = 0; i < n; ++i) {
    Lanes radius{};
    if (i > 0) radius += off_diagonal[i - 1] < 0 ? -off_diagonal[i - 1] : off_diagonal[i - 1];
    if (i + 1 < n) radius += off_diagonal[i] < 0 ? -off_diagonal[i] : off_diagonal[i];
    const Lanes bound = diagonal[i] + radius;
    upper = bound > upper ? bound : upper;
  }
  constexpr double kSmallest = 1e-290;  // below, reciprocals overflow: Gershgorin's bound has to do
  Lanes x = upper * (1 + 1e-6);
  auto active = upper > kSmallest;
  const double nd = static_cast<double>(n);
  for (int step = 0; step < 60; ++step) {
    Lanes inverse{}, first{}, second{}, s1{}, s2{};
    auto passed = x < 0;
    for (int64_t i = 0; i < n; ++i) {
      const Lanes e = i > 0 ? off_diagonal[i - 1] * inverse : Lanes{}, e2 = e * e;
      const Lanes pivot = diagonal[i] - x - (i > 0 ? off_diagonal[i - 1] * e : Lanes{});
      passed |= pivot >= 0;
      second = e2 * (second - 2.0 * inverse * first * first);
      first = e2 * first - 1.0;
      inverse = 1.0 / pivot;
      const Lanes ratio = first * inverse;
      s1 += ratio;
      s2 += ratio * ratio - second * inverse;
    }
    Lanes discriminant = (nd - 1) * (nd * s2 - s1 * s1);
    for (int l = 0; l < kLanes; ++l) discriminant[l] = discriminant[l] > 0 ? std::sqrt(discriminant[l]) : 0;
    const Lanes down = nd / (s1 + discriminant), next = x - down;
    active &= ~passed & (down > 1e-15 * x);
    x = active ? next : x;
    bool any = false;
    for (int l = 0; l < kLanes; ++l) any |= active[l] != 0;
    if (!any) break;
  }
  *result = upper > kSmallest ? x : upper;
}
BSGAP_PER_ISA(void, lanes_largest,
              (const Lanes* diagonal, const Lanes* off_diagonal, int64_t n, Lanes* result),
              (diagonal, off_diagonal, n, result))

// #{eigenvalues above x}: positive pivots of T - x I. A vanishing pivot is replaced by a tiny negative one,
// as in LAPACK's dstebz, so that an eigenvalue equal to x is not counted.
[[gnu::always_inline]] inline void lanes_sturm_body(const Lanes* diagonal, const Lanes* off_diagonal,
                                                    int64_t n, const Lanes* at, Lanes* count) {
  Lanes smallest = Lanes{} + 1.0;
  for (int64_t i = 0; i + 1 < n; ++i) {
    const Lanes square = off_diagonal[i] * off_diagonal[i];
    smallest = square > smallest ? square : smallest;
  }
  smallest *= std::numeric_limits<double>::min();
  const Lanes x = *at, zero{};
  Lanes pivot = zero + 1.0, total{};
  for (int64_t i = 0; i < n; ++i) {
    const Lanes e = i > 0 ? off_diagonal[i - 1] : zero;
    pivot = diagonal[i] - x - e * e / pivot;
    const Lanes size = pivot < 0 ? -pivot : pivot;
    pivot = size < smallest ? -smallest : pivot;
    total += pivot > 0 ? zero + 1.0 : zero;
  }
  *count = total;
}
BSGAP_PER_ISA(void, lanes_sturm,
              (const Lanes* diagonal, const Lanes* off_diagonal, int64_t n, const Lanes* x, Lanes* count),
              (diagonal, off_diagonal, n, x, count))

}  // namespace detail

// Tridiagonal forms of up to kLanes matrices of side n, and what is asked of them.
class LaneSpectra {
 public:
  // g: `count` matrices, n x n, row-major, lower triangle read. Lanes without a matrix hold zeros.
  LaneSpectra(const double* const* g, int count, int64_t n) : n_(n), storage_(detail::triangle(n) + 4 * n) {
    // Powers of two bring the largest diagonal entries near 1, so that no square leaves the range.
    for (int l = 0; l < count; ++l) {
      double largest = 0;
      for (int64_t i = 0; i < n; ++i) largest = std::max(largest, g[l][i * n + i]);
      scale_[l] = largest > 0 ? std::ldexp(1.0, std::clamp(-std::ilogb(largest), -1000, 1000)) : 1.0;
    }
    Lanes *diagonal = storage_.data(), *off_diagonal = diagonal + n, *a = off_diagonal + n;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j <= i; ++j) {
        Lanes entry{};
        for (int l = 0; l < count; ++l) entry[l] = g[l][i * n + j];
        a[detail::triangle(i) + j] = entry * scale_;
      }
    detail::lanes_tridiagonalize(a, n, diagonal, off_diagonal, a + detail::triangle(n));
  }

  // Of the matrices times scale().
  const Lanes* diagonal() const { return storage_.data(); }           // n
  const Lanes* off_diagonal() const { return storage_.data() + n_; }  // n - 1
  Lanes scale() const { return scale_; }

  Lanes largest() const {
    Lanes result;
    detail::lanes_largest(diagonal(), off_diagonal(), n_, &result);
    return result / scale_;
  }
  Lanes count_above(const Lanes& x) const {
    const Lanes scaled = x * scale_;
    Lanes count;
    detail::lanes_sturm(diagonal(), off_diagonal(), n_, &scaled, &count);
    return count;
  }

 private:
  int64_t n_;
  Lanes scale_ = Lanes{} + 1.0;
  Buffer<Lanes> storage_;
};

}  // namespace bsgap
