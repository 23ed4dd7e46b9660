// The probed bound of a Gram error (docs/certificates.md, "Probes"): no model of how g was rounded.
//
// With r Gaussian vectors w, ||g - X^T X||_2 <= alpha sqrt(2/pi) max ||(g - X^T X) w|| fails with
// probability at most alpha^-r (Halko, Martinsson & Tropp, SIAM Review 53 (2011), lemma 4.1).
// alpha = 10, r = 9: 1e-9. X^T X w is formed in float64 and its own rounding is added.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "certified_gram.h"
#include "isa.h"
#include "philox.h"
#include "symmetric_product.h"

namespace bsgap {

// Where a float32 Gram matrix with probes beats a float64 one: on smaller sides nine probe products cost more
// than it saves (benchmarks/results/crossovers-*.json), below this rtol the probes' factor of about 100 blurs
// the threshold.
inline constexpr int64_t kProbedMinSide = 288;
inline constexpr double kProbedMinRtol = 8.3e-3;

inline constexpr int kProbes = 9;
inline constexpr double kProbeFactor = 7.978845608028655;  // 10 sqrt(2/pi), rounded up

// kProbes Gaussian vectors of length n, row by row.
inline std::vector<double> probe_vectors(int64_t n, uint64_t seed) {
  std::vector<double> omega(kProbes * n);
  for (int64_t r = 0; r < kProbes; ++r)
    for (int64_t j = 0; j < n; ++j) omega[r * n + j] = gaussian_pair(seed, j, r + 1).first;
  return omega;
}

// Bound of ||g - M||_2 from y = fl(M omega), whose own error is at most product_error * ||omega||.
// g: n x n; omega, y: kProbes x n.
inline double probe_bound(const double* g, int64_t n, const double* omega, const double* y,
                          double product_error, const ParallelFor& parallel) {
  ScopedIeee ieee;
  const double nd = static_cast<double>(n), frobenius = frobenius_bound(g, n);
  double worst = 0;
  std::vector<double> gw(n);
  for (int r = 0; r < kProbes; ++r) {
    const double* w = omega + r * n;
    symmetric_product(g, n, w, gw.data(), parallel);
    double difference = 0, length = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double e = gw[i] - y[r * n + i];
      difference += e * e;
      length += w[i] * w[i];
    }
    const double rounding = (gamma(symmetric_product_roundings(nd) + 2) * frobenius + product_error) *
                            std::sqrt(length) * (1 + gamma(nd + 8));
    const double bound = std::sqrt(difference) * (1 + gamma(nd + 8)) + rounding + std::sqrt(nd * kTiny);
    if (!(bound < kInfinity)) return kInfinity;  // overflow inside g: std::max would drop a NaN
    worst = std::max(worst, bound);
  }
  return round_up(kProbeFactor * worst);
}

struct ProbeProduct {
  std::vector<double> y;    // kProbes x side: X^T X omega
  double error = 0;         // bound of each row's error divided by ||omega||
  double frobenius_sq = 0;  // upper bound of ||X||_F^2
};

namespace detail {

// Adds sum_i x_i (x_i . omega_r) to out_r for every probe, x_i one of kRows rows, `ld` apart; returns the sum
// of all squares of x. Blocks of kRows rows x 3 probes: each number read serves three or more products.
template <int kRows>
[[gnu::always_inline]] inline double probe_rows_body(std::integral_constant<int, kRows>, const double* x,
                                                     int64_t ld, const double* omega, int64_t side,
                                                     double* out) {
  static_assert(kProbes % 3 == 0);
  for (int r = 0; r < kProbes; r += 3) {
    const double *w0 = omega + r * side, *w1 = w0 + side, *w2 = w1 + side;
    double *o0 = out + r * side, *o1 = o0 + side, *o2 = o1 + side;
    double z[kRows][3];
    for (int i = 0; i < kRows; ++i) {
      double s0 = 0, s1 = 0, s2 = 0;
#pragma omp simd reduction(+ : s0, s1, s2)
      for (int64_t j = 0; j < side; ++j) {
        const double xj = x[i * ld + j];
        s0 += xj * w0[j];
        s1 += xj * w1[j];
        s2 += xj * w2[j];
      }
      z[i][0] = s0, z[i][1] = s1, z[i][2] = s2;
    }
#pragma omp simd
    for (int64_t j = 0; j < side; ++j) {
      double s0 = o0[j], s1 = o1[j], s2 = o2[j];
      for (int i = 0; i < kRows; ++i) {
        s0 += z[i][0] * x[i * ld + j];
        s1 += z[i][1] * x[i * ld + j];
        s2 += z[i][2] * x[i * ld + j];
      }
      o0[j] = s0, o1[j] = s1, o2[j] = s2;
    }
  }
  double squares = 0;
  for (int i = 0; i < kRows; ++i)
#pragma omp simd reduction(+ : squares)
    for (int64_t j = 0; j < side; ++j) squares += x[i * ld + j] * x[i * ld + j];
  return squares;
}
BSGAP_PER_ISA_TEMPLATE((int kRows), double, probe_rows,
                       (std::integral_constant<int, kRows> rows, const double* x, int64_t ld,
                        const double* omega, int64_t side, double* out),
                       (rows, x, ld, omega, side, out))

}  // namespace detail

// X^T (X omega) in float64, in chunks of rows; X as in gram_product.
inline ProbeProduct probe_product(const GramSource& s, const double* omega, const ParallelFor& parallel) {
  constexpr int64_t kRows = 4, kChunkRows = 64;
  const int64_t side = s.x.cols, depth = s.x.rows;
  const int64_t slabs = std::clamp<int64_t>(depth / (4 * kChunkRows), 1, 16);
  const int64_t slab_rows = (depth + slabs - 1) / slabs;
  std::vector<double> partial(slabs * kProbes * side, 0.0), squares(slabs, 0.0);
  balanced_for(slabs, parallel, [&](int64_t slab) {
    ScopedIeee ieee;
    Buffer<double> x(kChunkRows * side), chunk(kProbes * side);
    double* total = partial.data() + slab * kProbes * side;
    const int64_t end = std::min(depth, (slab + 1) * slab_rows);
    for (int64_t p0 = slab * slab_rows; p0 < end; p0 += kChunkRows) {
      const int64_t rows = std::min(kChunkRows, end - p0);
      detail::read_rows(s, p0, rows, x.data());
      std::fill(chunk.data(), chunk.data() + kProbes * side, 0.0);
      double chunk_squares = 0;
      int64_t p = 0;
      for (; p + kRows <= rows; p += kRows)
        chunk_squares += detail::probe_rows(std::integral_constant<int, kRows>(), x.data() + p * side, side,
                                            omega, side, chunk.data());
      for (; p < rows; ++p)
        chunk_squares += detail::probe_rows(std::integral_constant<int, 1>(), x.data() + p * side, side,
                                            omega, side, chunk.data());
      for (int64_t i = 0; i < kProbes * side; ++i) total[i] += chunk[i];
      squares[slab] += chunk_squares;
    }
  });
  ProbeProduct result;
  result.y.assign(partial.begin(), partial.begin() + kProbes * side);
  for (int64_t t = 1; t < slabs; ++t)
    for (int64_t i = 0; i < kProbes * side; ++i) result.y[i] += partial[t * kProbes * side + i];
  double sum = 0;
  for (const double q : squares) sum += q;
  const double chunks = std::ceil(static_cast<double>(slab_rows) / static_cast<double>(kChunkRows));
  const double c =
      static_cast<double>(side) + static_cast<double>(kChunkRows) + chunks + static_cast<double>(slabs) + 8;
  // The squares of kRows rows are added one after the other.
  result.frobenius_sq = round_up(sum * (1 + gamma(c + (kRows - 1) * static_cast<double>(side))));
  result.error = gamma(c) * result.frobenius_sq * (1 + 1e-10);
  return result;
}

// Replaces what is known of r's errors by what the probes say of them.
inline void probe(const MatrixView& a, bool features_side, uint64_t seed, CertifiedGram& r,
                  const ParallelFor& parallel) {
  ScopedIeee ieee;
  const std::vector<double> omega = probe_vectors(r.side, seed);
  const ProbeProduct product =
      probe_product(detail::gram_source(a, features_side, r), omega.data(), parallel);
  r.frobenius_sq = product.frobenius_sq;
  r.rounding_error = probe_bound(r.g.data(), r.side, omega.data(), product.y.data(), product.error, parallel);
  if (!r.mean.empty()) r.centring_error = detail::centring_error(a, r, 0);
}

}  // namespace bsgap
