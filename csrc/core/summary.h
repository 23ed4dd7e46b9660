// Metrics of a spectrum from the eigenvalues of the smaller Gram matrix. Definitions and sources:
// bsgap_kernels/reference.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "counts.h"

namespace bsgap {

enum SummaryColumn {
  kSigmaMax,
  kFrobeniusNorm,
  kStableRank,
  kParticipationRatio,
  kEffectiveRank,
  kRankMe,
  kSrank,
  kPcaRank,
  kFeatureRank,
  kAlphaReq,
  kSummaryColumns
};

namespace detail {

inline double entropy_term(double p) { return p > 0 ? -p * std::log(p) : 0; }

// First k with sum of the k largest of w >= share * sum; w descending.
inline double first_reaching(const double* w, int64_t n, double share, double total) {
  double partial = 0;
  for (int64_t i = 0; i < n; ++i) {
    partial += w[i];
    if (partial >= share * total) return static_cast<double>(i + 1);
  }
  return static_cast<double>(n);
}

// Minus the least-squares slope of log lambda_i on log i over 10 <= i < 100 (i from 1), of lambda above
// the rounding of a Gram matrix.
inline double decay_exponent(const double* lambda, int64_t n, double floor) {
  double count = 0, sx = 0, sy = 0, sxx = 0, sxy = 0;
  for (int pass = 0; pass < 2; ++pass) {
    const double mean_x = count > 0 ? sx / count : 0, mean_y = count > 0 ? sy / count : 0;
    if (pass == 1 && count < 3) return std::numeric_limits<double>::quiet_NaN();
    for (int64_t i = 10; i <= std::min<int64_t>(n, 99); ++i) {
      if (!(lambda[i - 1] > floor)) continue;
      const double x = std::log(static_cast<double>(i)), y = std::log(lambda[i - 1]);
      if (pass == 0) {
        count += 1;
        sx += x;
        sy += y;
      } else {
        sxx += (x - mean_x) * (x - mean_x);
        sxy += (x - mean_x) * (y - mean_y);
      }
    }
  }
  return -sxy / sxx;
}

}  // namespace detail

// eigenvalues: k of the Gram matrix of A * 2^exponent, ascending, A of m rows and n columns, k = min(m, n).
// out: kSummaryColumns numbers.
inline void summarize(const double* eigenvalues, int64_t m, int64_t n, int exponent, double* out) {
  const int64_t k = std::min(m, n);
  std::fill(out, out + kSummaryColumns, 0.0);
  out[kAlphaReq] = std::numeric_limits<double>::quiet_NaN();
  const double top = std::max(eigenvalues[k - 1], 0.0);
  if (top == 0) return;
  // lambda_i / lambda_1 and sigma_i / sigma_1, descending, so that nothing leaves the range.
  std::vector<double> lambda(k), sigma(k);
  double energy = 0, fourth = 0, total = 0;
  for (int64_t i = 0; i < k; ++i) {
    lambda[i] = std::max(eigenvalues[k - 1 - i], 0.0) / top;
    sigma[i] = std::sqrt(lambda[i]);
    energy += lambda[i];
    fourth += lambda[i] * lambda[i];
    total += sigma[i];
  }
  const double sigma_max = std::ldexp(std::sqrt(top), -exponent);
  const double feature_scale = sigma_max / std::sqrt(static_cast<double>(m));
  double entropy = 0, smoothed = 0, features = 0;
  for (int64_t i = 0; i < k; ++i) {
    const double p = sigma[i] / total;
    entropy += detail::entropy_term(p);
    smoothed += detail::entropy_term(p + 1e-7);
    features += sigma[i] * feature_scale > 0.01;
  }
  out[kSigmaMax] = sigma_max;
  out[kFrobeniusNorm] = sigma_max * std::sqrt(energy);
  out[kStableRank] = energy;
  out[kParticipationRatio] = energy * energy / fourth;
  out[kEffectiveRank] = std::exp(entropy);
  out[kRankMe] = std::exp(smoothed);
  out[kSrank] = detail::first_reaching(sigma.data(), k, 1 - 0.01, total);
  out[kPcaRank] = detail::first_reaching(lambda.data(), k, 0.99, energy);
  out[kFeatureRank] = features;
  out[kAlphaReq] = detail::decay_exponent(
      lambda.data(), k, static_cast<double>(std::max(m, n)) * std::numeric_limits<double>::epsilon());
}

// Number of sigma_i above max(atol, rtol * sigma_1) for the same eigenvalues; t is for A * 2^exponent.
inline int64_t count_of_eigenvalues(const double* eigenvalues, int64_t k, const Threshold& t) {
  const double tau = std::max(t.absolute, t.relative * std::sqrt(std::max(eigenvalues[k - 1], 0.0)));
  int64_t count = 0;
  for (int64_t i = 0; i < k; ++i) count += std::sqrt(std::max(eigenvalues[i], 0.0)) > tau;
  return count;
}

}  // namespace bsgap
