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

#include "buffer.h"
#include "isa.h"
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

// Two levels: blocks of kBlock columns are factored one after the other; only when kStrip columns are done is
// the rest of the matrix updated, in one read and write.
inline constexpr int64_t kBlock = 64, kStrip = 256;
inline constexpr int64_t kGroup = kPanelCols<double>;  // rows that share a packed panel
static_assert(kGroup == kTileRows && kBlock % kGroup == 0 && kStrip % kBlock == 0);

// The strip's columns of L and W = L D for rows below, in panels of kGroup rows: entry (row, k) of the strip
// at (row / kGroup * columns + k) * kGroup + row % kGroup.
class PackedFactor {
 public:
  PackedFactor(int64_t n, int64_t columns)
      : columns_(columns), data_((n + kGroup - 1) / kGroup * kGroup * columns) {}
  double* at(int64_t row, int64_t k) {
    return data_.data() + (row / kGroup * columns_ + k) * kGroup + row % kGroup;
  }

 private:
  int64_t columns_;
  Buffer<double> data_;
};

// The block on the diagonal, kBlock columns at most, factored column by column. l: its unit lower factor in
// panels of kGroup rows, entry (i, k) at (i / kGroup * kBlock + k) * kGroup + i % kGroup. Returns the growth
// sum of the block below and on the diagonal, NaN if a pivot was zero or not finite.
[[gnu::always_inline]] inline double factor_block_body(double* a, int64_t ld, int64_t width, double* l,
                                                       double* d, int64_t* positive) {
  double growth = 0, column[kBlock];
  for (int64_t k = 0; k < width; ++k) {
    const double dk = a[k * ld + k];
    if (dk == 0 || !std::isfinite(dk)) return std::numeric_limits<double>::quiet_NaN();
    d[k] = dk;
    *positive += dk > 0;
    growth += std::abs(dk);
    for (int64_t i = k + 1; i < width; ++i) {
      const double w = a[i * ld + k];
      column[i] = w / dk;
      growth += std::abs(w * column[i]);
      l[(i / kGroup * kBlock + k) * kGroup + i % kGroup] = column[i];
    }
    for (int64_t i = k + 1; i < width; ++i) {
      const double w = a[i * ld + k];
      double* row = a + i * ld;
#pragma omp simd
      for (int64_t j = k + 1; j <= i; ++j) row[j] -= w * column[j];
    }
  }
  return growth;
}
BSGAP_PER_ISA(double, factor_block,
              (double* a, int64_t ld, int64_t width, double* l, double* d, int64_t* positive),
              (a, ld, width, l, d, positive))

// The last step of the solution below: kGroup columns among themselves, all rows of a panel at once.
[[gnu::always_inline]] inline void solve_columns_body(double* w, const double* l) {
  for (int64_t k = 0; k < kGroup; ++k)
    for (int64_t i = k + 1; i < kGroup; ++i) {
      const double factor = l[k * kGroup + i];
#pragma omp simd
      for (int64_t r = 0; r < kGroup; ++r) w[i * kGroup + r] -= factor * w[k * kGroup + r];
    }
}
BSGAP_PER_ISA(void, solve_columns, (double* w, const double* l), (w, l))

// L = W D^-1 for a panel; returns its share of the growth sum.
[[gnu::always_inline]] inline double divide_columns_body(const double* w, const double* d, int64_t width,
                                                         double* l) {
  double growth[kGroup] = {};
  for (int64_t k = 0; k < width; ++k)
#pragma omp simd
    for (int64_t r = 0; r < kGroup; ++r) {
      const double wk = w[k * kGroup + r], lk = wk / d[k];
      l[k * kGroup + r] = lk;
      growth[r] += std::abs(wk * lk);
    }
  double sum = 0;
  for (int64_t r = 0; r < kGroup; ++r) sum += growth[r];
  return sum;
}
BSGAP_PER_ISA(double, divide_columns, (const double* w, const double* d, int64_t width, double* l),
              (w, d, width, l))

// Work below this many rows is not worth waking other threads for.
inline constexpr int64_t kSerialRows = 384;

inline void over_rows(int64_t first, int64_t n, int64_t step, const ParallelFor& parallel,
                      const std::function<void(int64_t, int64_t)>& body) {
  const int64_t items = (n - first + step - 1) / step;
  if (items <= 0) return;
  // From the bottom up: the triangle gives later rows more work.
  balanced_for(items, n - first < kSerialRows ? ParallelFor(serial_for) : parallel, [&](int64_t item) {
    ScopedIeee ieee;
    const int64_t begin = first + (items - 1 - item) * step;
    body(begin, std::min(n, begin + step));
  });
}

}  // namespace detail

// Leading dimension of the matrix that is factored: rows a power of two apart would share the sets of a
// cache.
inline int64_t factor_stride(int64_t n) { return n + (n % 64 == 0 ? detail::kGroup : 0); }

// g: n x n row-major with leading dimension n, of which the lower triangle is read.
// work: n x factor_stride(n), overwritten. shift: any finite number.
inline InertiaCount count_above(const double* g, int64_t n, double shift, double* work,
                                const ParallelFor& parallel) {
  using detail::kBlock, detail::kGroup, detail::kStrip;
  ScopedIeee ieee;
  InertiaCount result;
  const int64_t ld = factor_stride(n);
  detail::over_rows(0, n, 64, parallel, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::copy(g + i * n, g + i * n + i + 1, work + i * ld);
      work[i * ld + i] -= shift;
    }
  });
  double largest_diagonal = 0, growth = 0;
  for (int64_t i = 0; i < n; ++i) largest_diagonal = std::max(largest_diagonal, std::abs(work[i * ld + i]));

  const auto product = TileProduct<double>::select<true>();
  const int64_t columns =
      n > kBlock ? std::min(kStrip, (n - 1) / kBlock * kBlock) : 0;  // the last block needs none
  detail::PackedFactor l(n, columns), w(n, columns);
  Buffer<double> group_growth((n + kGroup - 1) / kGroup);
  double block[kBlock * kBlock], d[kBlock];
  // C[i][j] -= sum over the strip's columns [k, k + depth) of L[i] W[j], for rows and columns from `first`.
  const auto update = [&](int64_t k, int64_t depth, int64_t first, int64_t columns_end, int64_t step) {
    detail::over_rows(first, n, step, parallel, [&](int64_t begin, int64_t end) {
      for (int64_t j = first; j < std::min(end, columns_end); j += kTileCols<double>)
        for (int64_t i = std::max(begin, j); i < end; i += kTileRows)
          product.lower_triangle(depth, l.at(i, k), w.at(j, k), columns * kGroup, work, ld, i, j, end,
                                 columns_end);
    });
  };
  for (int64_t strip = 0; strip < n; strip += kStrip) {
    const int64_t strip_end = std::min(n, strip + kStrip);
    for (int64_t k0 = strip; k0 < strip_end; k0 += kBlock) {
      const int64_t width = std::min(kBlock, n - k0), next = k0 + width, k = k0 - strip;
      growth += detail::factor_block(work + k0 * ld + k0, ld, width, block, d, &result.positive);
      if (std::isnan(growth)) return result;
      if (next >= n) break;
      detail::over_rows(next, n, 4 * kGroup, parallel, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row += kGroup) {
          double *wp = w.at(row, k), *lp = l.at(row, k);
          const int64_t rows = std::min(kGroup, n - row);
          for (int64_t r = 0; r < kGroup; ++r)
            for (int64_t c = 0; c < kBlock; ++c)
              wp[c * kGroup + r] = r < rows ? work[(row + r) * ld + k0 + c] : 0.0;
          for (int64_t c = 0; c < kBlock; c += kGroup) {
            const double* factor = block + c * kBlock;
            if (c > 0) product.tile(c, factor, wp, wp + c * kGroup, kGroup);
            detail::solve_columns(wp + c * kGroup, factor + c * kGroup);
          }
          group_growth[row / kGroup] = detail::divide_columns(wp, d, kBlock, lp);
        }
      });
      for (int64_t row = next; row < n; row += kGroup) growth += group_growth[row / kGroup];
      if (next < strip_end) update(k, kBlock, next, strip_end, 64);
    }
    if (strip_end < n) update(0, kStrip, strip_end, n, 64);
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
