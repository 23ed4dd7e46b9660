// Eigenvalues of one symmetric tridiagonal matrix, as Lanczos leaves it: Sturm counts and bisection, float64.
//
// No backward-error theorem with constants stands behind them, so no certificate is built on them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "rounding.h"

namespace bsgap {

struct Tridiagonal {
  std::vector<double> diagonal;      // n
  std::vector<double> off_diagonal;  // n - 1
};

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
