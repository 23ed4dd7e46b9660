// y = G x from the lower triangle of a symmetric matrix, each entry read once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "buffer.h"
#include "isa.h"
#include "parallel.h"
#include "rounding.h"

namespace bsgap {

namespace detail {

// Rows [i, i + kRows) of G, as rows and as columns: y += G x but for what other rows bring.
template <class T, int kRows>
[[gnu::always_inline]] inline void symmetric_rows_body(std::integral_constant<int, kRows>, const T* g,
                                                       int64_t n, int64_t i, const T* x, T* y) {
  const T* row[kRows];
  T xi[kRows], sum[kRows] = {};
  for (int r = 0; r < kRows; ++r) {
    row[r] = g + (i + r) * n;
    xi[r] = x[i + r];
  }
  if constexpr (kRows == 4) {
    T s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t j = 0; j < i; ++j) {
      s0 += row[0][j] * x[j];
      s1 += row[1][j] * x[j];
      s2 += row[2][j] * x[j];
      s3 += row[3][j] * x[j];
      y[j] += (row[0][j] * xi[0] + row[1][j] * xi[1]) + (row[2][j] * xi[2] + row[3][j] * xi[3]);
    }
    sum[0] = s0, sum[1] = s1, sum[2] = s2, sum[3] = s3;
  } else {
    T s0 = 0;
#pragma omp simd reduction(+ : s0)
    for (int64_t j = 0; j < i; ++j) {
      s0 += row[0][j] * x[j];
      y[j] += row[0][j] * xi[0];
    }
    sum[0] = s0;
  }
  for (int r = 0; r < kRows; ++r) {
    for (int q = 0; q < r; ++q) {
      sum[r] += row[r][i + q] * xi[q];
      y[i + q] += row[r][i + q] * xi[r];
    }
    y[i + r] += sum[r] + row[r][i + r] * xi[r];
  }
}
BSGAP_PER_ISA_TEMPLATE((class T, int kRows), void, symmetric_rows,
                       (std::integral_constant<int, kRows> rows, const T* g, int64_t n, int64_t i, const T* x,
                        T* y),
                       (rows, g, n, i, x, y))

}  // namespace detail

// Roundings that a term of an entry of y goes through: its product, n additions at most, and the joining of
// shares.
inline double symmetric_product_roundings(double n) { return n + 20; }

template <class T>
void symmetric_product(const T* g, int64_t n, const T* x, T* y, const ParallelFor& parallel) {
  constexpr int64_t kShares = 16, kRows = 4;
  const int64_t shares = n < 512 ? 1 : kShares;  // by the size only: the same result on any number of threads
  Buffer<T> partial(shares * n);
  balanced_for(shares, parallel, [&](int64_t share) {
    ScopedIeee ieee;
    T* out = partial.data() + share * n;
    std::fill(out, out + n, T(0));
    for (int64_t i = share * kRows; i < n; i += shares * kRows) {
      if (i + kRows <= n) {
        detail::symmetric_rows(std::integral_constant<int, kRows>(), g, n, i, x, out);
      } else {
        for (int64_t r = i; r < n; ++r)
          detail::symmetric_rows(std::integral_constant<int, 1>(), g, n, r, x, out);
      }
    }
  });
  ScopedIeee ieee;
  std::copy(partial.data(), partial.data() + n, y);
  for (int64_t share = 1; share < shares; ++share)
    for (int64_t i = 0; i < n; ++i) y[i] += partial[share * n + i];
}

// Upper bound of the Frobenius norm of a symmetric matrix given by its lower triangle.
inline double frobenius_bound(const double* g, int64_t n) {
  ScopedIeee ieee;
  double below = 0, diagonal = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double* row = g + i * n;
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < i; ++j) sum += row[j] * row[j];
    below += sum;
    diagonal += row[i] * row[i];
  }
  const double squares = 2 * below + diagonal, nd = static_cast<double>(n);
  return std::sqrt(round_up(squares * (1 + gamma(nd * nd + 8)) + nd * nd * kTiny));
}

}  // namespace bsgap
