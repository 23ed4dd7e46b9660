// Largest eigenvalue of a positive semidefinite matrix known up to rounding, as an interval.
//
// Lanczos proposes a value theta and a vector; nothing is believed of them. The lower end is the
// Rayleigh quotient of the vector less its rounding. The upper end is a shift at which LDL^T finds no
// positive pivot, plus that factorisation's own error: a start vector orthogonal to the top
// eigenvector costs time (the shift is raised until the factorisation agrees), never truth.
// Where one eigenvalue outweighs all others, as of activations behind a ReLU, no factorisation is needed:
// the others are at most mu = sqrt(||G||_F^2 - lower^2), and by Temple's inequality
// lambda_max <= rho + ||G x - rho x||^2 / (rho - mu), rho the quotient of the unit vector x.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "lanes.h"
#include "ldlt.h"
#include "parallel.h"
#include "philox.h"
#include "rounding.h"
#include "symmetric_product.h"
#include "threshold.h"
#include "tridiagonal.h"
#include "vector_ops.h"

namespace bsgap {

// Which error terms of a certificate are applied. All of them, always; a term is switched off only by
// the tests, which show that the certificate is false without it.
struct ErrorTerms {
  bool gram = true;
  bool ldlt = true;
  bool shift = true;
  bool spectral_norm = true;
  bool underflow = true;

  double total(const InertiaCount& c) const {
    return round_up((ldlt ? c.factor_error : 0) + (shift ? c.shift_error : 0) +
                    (underflow ? c.underflow_error : 0));
  }
};

namespace detail {

inline constexpr int kMaxLanczosSteps = 160;

// y = G x for the proposal, of which nothing is believed: from a float32 copy of a large matrix, half the
// bytes a step. Scaled by a power of two, because float32 has less range.
class ProposalProduct {
 public:
  ProposalProduct(const double* g, int64_t n, const ParallelFor& parallel)
      : g_(g), n_(n), parallel_(parallel) {
    if (n < kCopySide) return;
    double largest = 0;
    for (int64_t i = 0; i < n; ++i) largest = std::max(largest, g[i * n + i]);
    const double scale = largest > 0 ? std::ldexp(1.0, std::clamp(-std::ilogb(largest), -1000, 1000)) : 1.0;
    copy_ = Buffer<float>(n * n);
    x_ = Buffer<float>(n);
    y_ = Buffer<float>(n);
    balanced_for((n + 63) / 64, parallel, [&](int64_t block) {
      for (int64_t i = block * 64; i < std::min(n, (block + 1) * 64); ++i)
        for (int64_t j = 0; j <= i; ++j) copy_[i * n + j] = static_cast<float>(g[i * n + j] * scale);
    });
  }
  void operator()(const double* x, double* y) {
    if (n_ < kCopySide) return symmetric_product(g_, n_, x, y, parallel_);
    std::copy(x, x + n_, x_.data());
    symmetric_product(copy_.data(), n_, x_.data(), y_.data(), parallel_);
    std::copy(y_.data(), y_.data() + n_, y);
  }

 private:
  static constexpr int64_t kCopySide = 512;
  const double* g_;
  int64_t n_;
  const ParallelFor& parallel_;
  Buffer<float> copy_, x_, y_;
};

// Largest eigenvalue of a tridiagonal matrix without negative ones: six steps of Laguerre's iteration where
// bisection takes fifty.
inline double largest_of_tridiagonal(const Tridiagonal& t) {
  const int64_t k = static_cast<int64_t>(t.diagonal.size());
  double largest = 0;
  for (const double x : t.diagonal) largest = std::max(largest, x);
  const double scale = largest > 0 ? std::ldexp(1.0, std::clamp(-std::ilogb(largest), -1000, 1000)) : 1.0;
  Buffer<Lanes> lanes(2 * k);
  for (int64_t i = 0; i < k; ++i) {
    lanes[i] = Lanes{} + t.diagonal[i] * scale;
    lanes[k + i] = Lanes{} + (i + 1 < k ? t.off_diagonal[i] * scale : 0.0);
  }
  Lanes result;
  lanes_largest(1, lanes.data(), lanes.data() + k, k, &result);
  return result[0] / scale;
}

// A unit vector whose Rayleigh quotient is close to the largest eigenvalue. Lanczos with full
// reorthogonalisation, stopped when four steps gained less than 1e-6 of the value: what is missing is then
// far less.
inline std::vector<double> top_ritz_vector(const double* g, int64_t n, const std::vector<double>& start,
                                           const ParallelFor& parallel) {
  const int64_t max_steps = std::min<int64_t>(n, kMaxLanczosSteps);
  ProposalProduct product(g, n, parallel);
  std::vector<std::vector<double>> basis;
  Tridiagonal t;
  std::vector<double> q = start, y(n);
  const double start_norm = std::sqrt(dot(q.data(), q.data(), n));
  for (double& x : q) x /= start_norm;
  double previous = 0, theta = 0;
  for (int64_t step = 0; step < max_steps; ++step) {
    basis.push_back(q);
    product(q.data(), y.data());
    t.diagonal.push_back(dot(q.data(), y.data(), n));
    for (int pass = 0; pass < 2; ++pass)
      for (const auto& b : basis) {
        add_multiple(-dot(b.data(), y.data(), n), b.data(), y.data(), n);
      }
    const double beta = std::sqrt(dot(y.data(), y.data(), n));
    const bool last = step + 1 == max_steps || !(beta > 1e-14 * std::abs(theta));
    if (step % 4 == 3 || last) {
      theta = largest_of_tridiagonal(t);
      if (last || theta - previous <= 1e-6 * theta) break;
      previous = theta;
    }
    t.off_diagonal.push_back(beta);
    for (int64_t i = 0; i < n; ++i) q[i] = y[i] / beta;
  }
  // Eigenvector of the small tridiagonal matrix: two steps of inverse iteration by a plain solve.
  const int64_t k = static_cast<int64_t>(t.diagonal.size());
  std::vector<double> s(k, 1.0), pivots(k);
  const double shift = theta * (1 + 1e-14) + kTiny;
  for (int pass = 0; pass < 3; ++pass) {
    for (int64_t i = 0; i < k; ++i) {
      const double l = i > 0 ? t.off_diagonal[i - 1] / pivots[i - 1] : 0;
      pivots[i] = t.diagonal[i] - shift - (i > 0 ? l * t.off_diagonal[i - 1] : 0);
      if (pivots[i] == 0) pivots[i] = -kUnitRoundoff * std::max(shift, kTiny);
      if (i > 0) s[i] -= l * s[i - 1];
    }
    for (int64_t i = k - 1; i >= 0; --i)
      s[i] = (s[i] - (i + 1 < k ? t.off_diagonal[i] * s[i + 1] : 0)) / pivots[i];
    double norm = 0;
    for (const double x : s) norm = std::max(norm, std::abs(x));
    for (double& x : s) x /= norm;
  }
  std::vector<double> x(n, 0.0);
  for (int64_t j = 0; j < k; ++j) add_multiple(s[j], basis[j].data(), x.data(), n);
  const double norm = std::sqrt(dot(x.data(), x.data(), n));
  if (!(norm > 0) || !std::isfinite(norm)) return start;
  for (double& xi : x) xi /= norm;
  return x;
}

}  // namespace detail

// Deterministic start: independent of the matrix, so orthogonal to its top vector only by design.
inline std::vector<double> default_start(int64_t n) {
  std::vector<double> start(n);
  for (int64_t i = 0; i < n; ++i) start[i] = gaussian_pair(0x6273676170ULL, i, 0).first;
  return start;
}

// Bounds of the largest eigenvalue of g (symmetric n x n, lower triangle read, no entry non-finite).
// work: as for count_above. Ends differ by about 1e-6 relatively where the factorisation resolves that.
inline Bounds largest_eigenvalue(const double* g, int64_t n, double* work, const ParallelFor& parallel,
                                 const ErrorTerms& terms = {}, const std::vector<double>* start = nullptr) {
  ScopedIeee ieee;
  const double nd = static_cast<double>(n), frobenius = frobenius_bound(g, n);

  const std::vector<double> x = detail::top_ritz_vector(g, n, start ? *start : default_start(n), parallel);
  std::vector<double> gx(n);
  symmetric_product(g, n, x.data(), gx.data(), parallel);
  const double length_sq = dot(x.data(), x.data(), n);
  const double theta = dot(x.data(), gx.data(), n) / length_sq;
  // |computed - exact| <= gamma_{3n+32} ||G||_F: the sums of the product, and those of the quotient's two
  // ends. The underflow term holds for vectors of about unit length, which x is unless Lanczos broke down.
  const double error = gamma(symmetric_product_roundings(nd) + 2 * nd + 12) * frobenius * (1 + 1e-10) +
                       (nd + 1) * (nd + 1) * kTiny;
  Bounds b;
  if (length_sq > 0.5) b.lower = round_down(theta - error);
  if (!terms.spectral_norm) return {theta, theta};

  b.upper = round_up(frobenius);  // always true: ||G||_2 <= ||G||_F
  // Squares of what is far below 1 would underflow, and with them what the bound stands on.
  const bool in_range = frobenius > 0x1p-400 && frobenius < 0x1p400;
  if (in_range && length_sq > 0.5 && b.lower > 0.708 * frobenius) {
    // Twice the error covers the residual's: that of the product, of the subtraction and of the norm.
    add_multiple(-theta, x.data(), gx.data(), n);
    const double residual = std::sqrt(dot(gx.data(), gx.data(), n) / length_sq) + 2 * error;
    const double others =
        std::sqrt((frobenius - b.lower) * (frobenius + b.lower)) * (1 + 8 * kUnitRoundoff) + kTiny;
    const double upper = theta + error + residual * residual / (b.lower - others) * (1 + 1e-10);
    if (b.lower > others * (1 + 1e-3) && upper <= theta * (1 + 2e-6)) {
      b.upper = std::min(b.upper, round_up(upper));
      return b;
    }
  }
  double gap = 1e-6;
  for (int attempt = 0; attempt < 8; ++attempt, gap *= 8) {
    const double shift = theta * (1 + gap) + kTiny;
    if (shift >= b.upper) break;
    const InertiaCount c = count_above(g, n, shift, work, parallel);
    if (!c.valid) continue;
    if (c.positive == 0) {
      b.upper = std::min(b.upper, round_up(shift + terms.total(c)));
      break;
    }
    // An eigenvalue stands above the shift: the proposal was low. The lower end rises with it.
    b.lower = std::max(b.lower, round_down(shift - terms.total(c)));
  }
  // The proposal missed the top of the spectrum altogether: bisect with factorisations.
  for (int step = 0; step < 40 && b.upper > b.lower * (1 + 1e-5) && b.lower > theta; ++step) {
    const double shift = b.lower + (b.upper - b.lower) / 2;
    const InertiaCount c = count_above(g, n, shift, work, parallel);
    if (!c.valid) break;
    const double error = terms.total(c);
    const double lower = c.positive > 0 ? round_down(shift - error) : b.lower;
    const double upper = c.positive > 0 ? b.upper : round_up(shift + error);
    if (lower <= b.lower && upper >= b.upper) break;  // at the factorisation's resolution
    b.lower = std::max(b.lower, lower);
    b.upper = std::min(b.upper, upper);
  }
  return b;
}

}  // namespace bsgap
