// Unpivoted LDL^T of G - s I in float64: the positive pivots count the eigenvalues above s.
//
// Each factorisation certifies itself. With L, D the computed factors, L D L^T is exact for
// G - s I + E, and ||E||_2 <= gamma_{n+4} * T, T = sum_k |d_k| (1 + sum_{i>k} l_ik^2)
// (docs/certificates.md, "LDL^T"). By Sylvester's law of inertia the count is then at least
// #{lambda > s + ||E||} and at most #{lambda > s - ||E||}.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "parallel.h"
#include "rounding.h"
#include "tile_product.h"

namespace bsgap {

struct InertiaCount {
  int64_t positive = 0;        // positive pivots
  bool valid = false;          // false: a pivot was zero or not finite, nothing is known
  double factor_error = 0;     // bound of ||E||_2 from the factorisation
  double shift_error = 0;      // bound of the error of forming g_jj - s
  double underflow_error = 0;  // bound of what gradual underflow added
};

namespace detail {

inline constexpr int64_t kPanel = 64;  // columns factored before one trailing update

// Solves one row below the diagonal block of a panel: W = row (unit L)^-T, L = W D^-1. Returns its share
// of the growth sum. row: `width` entries, overwritten by L; lt: transpose of the block's L, row-major.
[[gnu::always_inline]] inline double solve_row_body(double* row, const double* lt, const double* d,
                                                    int64_t width, double* w) {
  for (int64_t k = 0; k < width; ++k) {
    const double wk = row[k];
    const double* l = lt + k * kPanel;
#pragma omp simd
    for (int64_t j = k + 1; j < width; ++j) row[j] -= wk * l[j];
  }
  double growth = 0;
#pragma omp simd reduction(+ : growth)
  for (int64_t k = 0; k < width; ++k) {
    const double wk = row[k], lk = wk / d[k];
    w[k] = wk;
    row[k] = lk;
    growth += std::abs(wk * lk);
  }
  return growth;
}

BSGAP_PER_ISA(double, solve_row, (double* row, const double* lt, const double* d, int64_t width, double* w),
              (row, lt, d, width, w))

// C[i][j] -= sum_k L[i][k] W[j][k] for the lower triangle of the trailing matrix.
inline void trailing_update(double* c, int64_t ld, int64_t first, int64_t n, const double* l_packed,
                            const double* w_packed, int64_t width, const ParallelFor& parallel) {
  constexpr int kCols = kTileCols<double>;
  const TileProduct<double> product = tile_product<double, true>();
  double* trailing = c + first * ld + first;
  const int64_t rest = n - first;
  const int64_t row_tiles = (rest + kTileRows - 1) / kTileRows;
  // Rows from the bottom up in strided groups: the triangle gives later rows more tiles.
  const int64_t groups = std::min<int64_t>(row_tiles, 32);
  const auto one_group = [&](int64_t g) {
    ScopedIeee ieee;
    for (int64_t ti = g; ti < row_tiles; ti += groups) {
      const int64_t i0 = ti * kTileRows, rows = std::min<int64_t>(kTileRows, rest - i0);
      for (int64_t j0 = 0; j0 < i0 + rows; j0 += kCols)
        lower_triangle_tile<double>(product, width, l_packed + i0 * width, kTileRows, w_packed + j0 * width,
                                    trailing, ld, i0, j0, rows);
    }
  };
  if (rest < 2 * kPanel) {
    serial_for(groups, one_group);
  } else {
    parallel(groups, one_group);
  }
}

}  // namespace detail

// g: n x n row-major with leading dimension n, of which the lower triangle is read.
// work: n x n, overwritten. shift: any finite number.
inline InertiaCount count_above(const double* g, int64_t n, double shift, double* work,
                                const ParallelFor& parallel) {
  using detail::kPanel;
  constexpr int kCols = kTileCols<double>;
  ScopedIeee ieee;
  InertiaCount result;
  double largest_diagonal = 0, growth = 0;
  for (int64_t i = 0; i < n; ++i) {
    std::copy(g + i * n, g + i * n + i + 1, work + i * n);
    work[i * n + i] -= shift;
    largest_diagonal = std::max(largest_diagonal, std::abs(work[i * n + i]));
  }
  double lt[kPanel * kPanel], d[kPanel];
  const int64_t padded = (n + kCols) / kCols * kCols + kCols;
  const int64_t packed_size = n > kPanel ? padded * kPanel : 0;
  PackedBuffer<double> l_packed(packed_size), w_packed(packed_size);
  std::vector<double> row_growth(n);
  for (int64_t k0 = 0; k0 < n; k0 += kPanel) {
    const int64_t width = std::min(kPanel, n - k0), next = k0 + width;
    // Diagonal block, column by column.
    for (int64_t k = 0; k < width; ++k) {
      const double dk = work[(k0 + k) * n + k0 + k];
      if (dk == 0 || !std::isfinite(dk)) return result;
      d[k] = dk;
      result.positive += dk > 0;
      growth += std::abs(dk);
      double* l = lt + k * kPanel;
      for (int64_t i = k + 1; i < width; ++i) {
        const double w = work[(k0 + i) * n + k0 + k];
        l[i] = w / dk;
        growth += std::abs(w * l[i]);
      }
      for (int64_t i = k + 1; i < width; ++i) {
        const double w = work[(k0 + i) * n + k0 + k];
        double* row = work + (k0 + i) * n + k0;
        for (int64_t j = k + 1; j <= i; ++j) row[j] -= w * l[j];
      }
    }
    if (next >= n) break;
    const int64_t rest = n - next;
    const auto solve = [&](int64_t tile) {
      ScopedIeee ieee_here;
      double w[kPanel];
      for (int64_t r = tile * kTileRows; r < std::min(rest, (tile + 1) * kTileRows); ++r) {
        double* row = work + (next + r) * n + k0;
        row_growth[next + r] = detail::solve_row(row, lt, d, width, w);
        double* lp = l_packed.data() + r / kTileRows * kTileRows * width + r % kTileRows;
        double* wp = w_packed.data() + r / kCols * kCols * width + r % kCols;
        for (int64_t k = 0; k < width; ++k) lp[k * kTileRows] = row[k];
        for (int64_t k = 0; k < width; ++k) wp[k * kCols] = w[k];
      }
    };
    const int64_t tiles = (rest + kTileRows - 1) / kTileRows;
    if (rest < 4 * kPanel) {
      serial_for(tiles, solve);
    } else {
      parallel(tiles, solve);
    }
    for (int64_t r = next; r < n; ++r) growth += row_growth[r];
    detail::trailing_update(work, n, next, n, l_packed.data(), w_packed.data(), width, parallel);
  }
  if (!std::isfinite(growth)) return result;
  const double nd = static_cast<double>(n);
  result.valid = true;
  result.factor_error = gamma(nd + 4) * growth * (1.0 + gamma(nd * nd / 2 + 2 * nd + 8));
  result.shift_error = shift == 0 ? 0 : kUnitRoundoff * largest_diagonal * (1.0 + 4 * kUnitRoundoff);
  result.underflow_error = (nd + 1) * (nd + 1) * kTiny;
  return result;
}

}  // namespace bsgap
