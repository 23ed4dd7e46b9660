// The probed bound of a Gram error (docs/certificates.md, "Probes"): no model of how g was rounded.
//
// With r Gaussian vectors w, ||g - X^T X||_2 <= alpha sqrt(2/pi) max ||(g - X^T X) w|| fails with
// probability at most alpha^-r (Halko, Martinsson & Tropp, SIAM Review 53 (2011), lemma 4.1).
// alpha = 10, r = 9: 1e-9. X^T X w is formed in float64 and its own rounding is added.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "certified_gram.h"
#include "isa.h"
#include "philox.h"

namespace bsgap {

// Where a float32 Gram matrix with probes beats a float64 one: on smaller sides nine probe products cost
// more than it saves, below this rtol the probes' factor of about 100 blurs the threshold.
inline constexpr int64_t kProbedMinSide = 73;
inline constexpr double kProbedMinRtol = 5e-3;

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
                          double product_error) {
  ScopedIeee ieee;
  const double nd = static_cast<double>(n);
  double squares = 0, worst = 0;
  for (int64_t i = 0; i < n * n; ++i) squares += g[i] * g[i];
  const double frobenius = std::sqrt(round_up(squares * (1 + gamma(nd * nd + 8)) + nd * nd * kTiny));
  for (int r = 0; r < kProbes; ++r) {
    const double* w = omega + r * n;
    double difference = 0, length = 0;
    for (int64_t i = 0; i < n; ++i) {
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < n; ++j) sum += g[i * n + j] * w[j];
      const double e = sum - y[r * n + i];
      difference += e * e;
      length += w[i] * w[i];
    }
    const double rounding =
        (gamma(nd + 2) * frobenius + product_error) * std::sqrt(length) * (1 + gamma(nd + 8));
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

// Adds x (x . omega_r) to out_r for every probe, x one row; returns x . x.
[[gnu::always_inline]] inline double probe_row_body(const double* x, const double* omega, int64_t side,
                                                    double* out) {
  double z[kProbes];
  for (int r = 0; r < kProbes; ++r) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < side; ++j) sum += x[j] * omega[r * side + j];
    z[r] = sum;
  }
  for (int r = 0; r < kProbes; ++r) {
#pragma omp simd
    for (int64_t j = 0; j < side; ++j) out[r * side + j] += z[r] * x[j];
  }
  double squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t j = 0; j < side; ++j) squares += x[j] * x[j];
  return squares;
}
BSGAP_PER_ISA(double, probe_row, (const double* x, const double* omega, int64_t side, double* out),
              (x, omega, side, out))

}  // namespace detail

// X^T (X omega) in float64, in chunks of rows; X as in gram_product.
inline ProbeProduct probe_product(const GramSource& s, const double* omega, const ParallelFor& parallel) {
  const int64_t side = s.x.cols, depth = s.x.rows;
  const int64_t slabs = std::clamp<int64_t>(depth / (4 * detail::kChunk), 1, 16);
  const int64_t slab_rows = (depth + slabs - 1) / slabs;
  std::vector<double> partial(slabs * kProbes * side, 0.0), squares(slabs, 0.0);
  parallel(slabs, [&](int64_t slab) {
    ScopedIeee ieee;
    std::vector<double> x(detail::kChunk * side), chunk(kProbes * side);
    double* total = partial.data() + slab * kProbes * side;
    const int64_t end = std::min(depth, (slab + 1) * slab_rows);
    for (int64_t p0 = slab * slab_rows; p0 < end; p0 += detail::kChunk) {
      const int64_t rows = std::min(detail::kChunk, end - p0);
      detail::pack(s, p0, rows, 0, side, side, x.data());
      std::fill(chunk.begin(), chunk.end(), 0.0);
      double chunk_squares = 0;
      for (int64_t p = 0; p < rows; ++p)
        chunk_squares += detail::probe_row(x.data() + p * side, omega, side, chunk.data());
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
  const double chunks = std::ceil(static_cast<double>(slab_rows) / static_cast<double>(detail::kChunk));
  const double c = static_cast<double>(side) + static_cast<double>(detail::kChunk) + chunks +
                   static_cast<double>(slabs) + 8;
  result.frobenius_sq = round_up(sum * (1 + gamma(c)));
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
  r.rounding_error = probe_bound(r.g.data(), r.side, omega.data(), product.y.data(), product.error);
  if (!r.mean.empty()) r.centring_error = detail::centring_error(a, r, 0);
}

}  // namespace bsgap
