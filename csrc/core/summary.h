// Metrics of a spectrum from the eigenvalues of the smaller Gram matrix. Definitions and sources:
// bsgap_kernels/reference.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "host_device.h"

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

// How the sums of a summary are shared out. A CPU takes a matrix alone; on a GPU the lanes of a warp share it
// and define the same members.
struct OneLane {
  static constexpr int kSize = 1;
  BSGAP_HD int rank() const { return 0; }
  BSGAP_HD double sum(double x) const { return x; }             // over all lanes
  BSGAP_HD double from_lane(double x, int) const { return x; }  // the value of one lane, in all lanes
};

// lambda_i / lambda_1 of the Gram matrix, in descending order, so that nothing leaves the range.
class RelativeSpectrum {
 public:
  BSGAP_HD RelativeSpectrum(const double* ascending, int64_t k)
      : ascending_(ascending), k_(k), top_(largest(ascending, k)) {}
  BSGAP_HD static double largest(const double* ascending, int64_t k) {
    return ascending[k - 1] > 0 ? ascending[k - 1] : 0.0;
  }
  BSGAP_HD int64_t size() const { return k_; }
  BSGAP_HD double top() const { return top_; }
  BSGAP_HD double lambda(int64_t i) const {
    const double x = ascending_[k_ - 1 - i];
    return (x > 0 ? x : 0.0) / top_;
  }
  BSGAP_HD double sigma(int64_t i) const { return std::sqrt(lambda(i)); }

 private:
  const double* ascending_;
  int64_t k_;
  double top_;
};

namespace detail {

BSGAP_HD inline double entropy_term(double p) { return p > 0 ? -p * std::log(p) : 0; }

// First i with the sum of the i largest lambda (or sigma) >= share * total.
template <class Lanes>
BSGAP_HD double first_reaching(const RelativeSpectrum& s, bool of_lambda, double share, double total,
                               const Lanes& lanes) {
  double partial = 0;
  for (int64_t first = 0; first < s.size(); first += Lanes::kSize) {
    const int64_t mine = first + lanes.rank();
    const double w = mine < s.size() ? (of_lambda ? s.lambda(mine) : s.sigma(mine)) : 0.0;
    const double next = partial + lanes.sum(w);
    if (next >= share * total) {
      double sum = partial;
      for (int lane = 0; lane < Lanes::kSize; ++lane) {
        sum += lanes.from_lane(w, lane);
        if (sum >= share * total) return static_cast<double>(first + lane + 1);
      }
    }
    partial = next;
  }
  return static_cast<double>(s.size());
}

// Minus the least-squares slope of log lambda_i on log i over 10 <= i < 100 (i from 1), of lambda above
// the rounding of a Gram matrix.
template <class Lanes>
BSGAP_HD double decay_exponent(const RelativeSpectrum& s, double floor, const Lanes& lanes) {
  const int64_t last = s.size() < 99 ? s.size() : 99;
  double count = 0, sx = 0, sy = 0, sxx = 0, sxy = 0;
  for (int64_t i = 10 + lanes.rank(); i <= last; i += Lanes::kSize) {
    if (!(s.lambda(i - 1) > floor)) continue;
    count += 1;
    sx += std::log(static_cast<double>(i));
    sy += std::log(s.lambda(i - 1));
  }
  count = lanes.sum(count);
  if (count < 3) return std::numeric_limits<double>::quiet_NaN();
  const double mean_x = lanes.sum(sx) / count, mean_y = lanes.sum(sy) / count;
  for (int64_t i = 10 + lanes.rank(); i <= last; i += Lanes::kSize) {
    if (!(s.lambda(i - 1) > floor)) continue;
    const double x = std::log(static_cast<double>(i)), y = std::log(s.lambda(i - 1));
    sxx += (x - mean_x) * (x - mean_x);
    sxy += (x - mean_x) * (y - mean_y);
  }
  sxy = lanes.sum(sxy);
  return -sxy / lanes.sum(sxx);
}

}  // namespace detail

// eigenvalues: k of the Gram matrix of A * 2^exponent, ascending, A of m rows and n columns, k = min(m, n).
// out: kSummaryColumns numbers, written by the lane of rank 0. All lanes call.
template <class Lanes = OneLane>
BSGAP_HD void summarize(const double* eigenvalues, int64_t m, int64_t n, int exponent, double* out,
                        const Lanes& lanes = {}) {
  const int64_t k = m < n ? m : n;
  const bool writes = lanes.rank() == 0;
  if (writes) {
    for (int c = 0; c < kSummaryColumns; ++c) out[c] = 0.0;
    out[kAlphaReq] = std::numeric_limits<double>::quiet_NaN();
  }
  const RelativeSpectrum s(eigenvalues, k);
  if (s.top() == 0) return;
  double energy = 0, fourth = 0, total = 0;
  for (int64_t i = lanes.rank(); i < k; i += Lanes::kSize) {
    const double lambda = s.lambda(i);
    energy += lambda;
    fourth += lambda * lambda;
    total += std::sqrt(lambda);
  }
  energy = lanes.sum(energy);
  fourth = lanes.sum(fourth);
  total = lanes.sum(total);
  const double sigma_max = std::ldexp(std::sqrt(s.top()), -exponent);
  const double feature_scale = sigma_max / std::sqrt(static_cast<double>(m));
  double entropy = 0, smoothed = 0, features = 0;
  for (int64_t i = lanes.rank(); i < k; i += Lanes::kSize) {
    const double sigma = s.sigma(i), p = sigma / total;
    entropy += detail::entropy_term(p);
    smoothed += detail::entropy_term(p + 1e-7);
    features += sigma * feature_scale > 0.01;
  }
  entropy = lanes.sum(entropy);
  smoothed = lanes.sum(smoothed);
  features = lanes.sum(features);
  const double srank = detail::first_reaching(s, false, 1 - 0.01, total, lanes);
  const double pca_rank = detail::first_reaching(s, true, 0.99, energy, lanes);
  const double floor = static_cast<double>(m < n ? n : m) * std::numeric_limits<double>::epsilon();
  const double alpha = detail::decay_exponent(s, floor, lanes);
  if (!writes) return;
  out[kSigmaMax] = sigma_max;
  out[kFrobeniusNorm] = sigma_max * std::sqrt(energy);
  out[kStableRank] = energy;
  out[kParticipationRatio] = energy * energy / fourth;
  out[kEffectiveRank] = std::exp(entropy);
  out[kRankMe] = std::exp(smoothed);
  out[kSrank] = srank;
  out[kPcaRank] = pca_rank;
  out[kFeatureRank] = features;
  out[kAlphaReq] = alpha;
}

}  // namespace bsgap
