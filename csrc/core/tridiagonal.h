// Householder tridiagonalisation of a symmetric matrix and Sturm counts on the result, float64.
//
// Point counts only: no backward-error theorem with constants stands behind them, so no certificate
// is built on them (interval ends come from ldlt.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "rounding.h"
#include "vector_ops.h"

namespace bsgap {

struct Tridiagonal {
  std::vector<double> diagonal;      // n
  std::vector<double> off_diagonal;  // n - 1
};

// g: n x n row-major, lower triangle read. Golub & Van Loan, Matrix Computations, section 8.3.1.
inline Tridiagonal tridiagonalize(const double* g, int64_t n) {
  ScopedIeee ieee;
  Tridiagonal t;
  t.diagonal.resize(n);
  t.off_diagonal.resize(n > 0 ? n - 1 : 0);
  std::vector<double> a(n * n), v(n), p(n);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j <= i; ++j) a[i * n + j] = a[j * n + i] = g[i * n + j];
  for (int64_t k = 0; k + 2 < n; ++k) {
    const int64_t first = k + 1;
    double* column = a.data() + k * n;  // row k equals column k
    double tail = 0;
    for (int64_t j = first + 1; j < n; ++j) tail += column[j] * column[j];
    if (tail == 0) {
      t.off_diagonal[k] = column[first];
      continue;
    }
    const double norm = std::sqrt(column[first] * column[first] + tail);
    const double alpha = column[first] > 0 ? -norm : norm;
    for (int64_t j = first; j < n; ++j) v[j] = column[j];
    v[first] -= alpha;
    const double beta = 2.0 / (tail + v[first] * v[first]);
    double vp = 0;
    for (int64_t i = first; i < n; ++i) {
      const double* row = a.data() + i * n;
      p[i] = beta * dot(row + first, v.data() + first, n - first);
      vp += v[i] * p[i];
    }
    const double half = 0.5 * beta * vp;
    for (int64_t i = first; i < n; ++i) p[i] -= half * v[i];
    for (int64_t i = first; i < n; ++i) {
      double* row = a.data() + i * n;
      add_multiple(-v[i], p.data() + first, row + first, n - first);
      add_multiple(-p[i], v.data() + first, row + first, n - first);
    }
    t.off_diagonal[k] = alpha;
  }
  for (int64_t k = 0; k < n; ++k) t.diagonal[k] = a[k * n + k];
  if (n > 1) t.off_diagonal[n - 2] = a[(n - 1) * n + n - 2];
  return t;
}

// #{eigenvalues of T above x}: positive pivots of T - x I. A vanishing pivot is replaced by a tiny
// negative one, as in LAPACK's dstebz, so that an eigenvalue equal to x is not counted.
inline int64_t sturm_count_above(const Tridiagonal& t, double x) {
  const int64_t n = static_cast<int64_t>(t.diagonal.size());
  double scale = 0;
  for (const double e : t.off_diagonal) scale = std::max(scale, e * e);
  const double smallest = std::max(scale, 1.0) * std::numeric_limits<double>::min();
  int64_t count = 0;
  double pivot = 1;
  for (int64_t i = 0; i < n; ++i) {
    const double e = i > 0 ? t.off_diagonal[i - 1] : 0;
    pivot = t.diagonal[i] - x - (i > 0 ? e * e / pivot : 0);
    if (std::abs(pivot) < smallest) pivot = -smallest;
    count += pivot > 0;
  }
  return count;
}

// The `rank`-th largest eigenvalue (1 = the largest) by bisection, to about one unit in the last
// place of the largest in magnitude.
inline double eigenvalue_by_bisection(const Tridiagonal& t, int64_t rank) {
  const int64_t n = static_cast<int64_t>(t.diagonal.size());
  double low = kInfinity, high = -kInfinity;
  for (int64_t i = 0; i < n; ++i) {  // Gershgorin
    const double radius =
        (i > 0 ? std::abs(t.off_diagonal[i - 1]) : 0) + (i + 1 < n ? std::abs(t.off_diagonal[i]) : 0);
    low = std::min(low, t.diagonal[i] - radius);
    high = std::max(high, t.diagonal[i] + radius);
  }
  const double resolution = 2 * kUnitRoundoff * std::max(std::abs(low), std::abs(high));
  while (high - low > resolution) {
    const double middle = low + (high - low) / 2;
    if (middle <= low || middle >= high) break;
    (sturm_count_above(t, middle) >= rank ? low : high) = middle;
  }
  return low + (high - low) / 2;
}

}  // namespace bsgap
