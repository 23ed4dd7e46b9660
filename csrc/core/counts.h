// Counts of singular values above thresholds, from a Gram matrix: point counts and certified intervals.
// Definitions, theorem and constants: docs/certificates.md.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "certified_gram.h"
#include "ldlt.h"
#include "spectral_norm.h"
#include "threshold.h"
#include "tridiagonal.h"

namespace bsgap {

struct CountInterval {
  int64_t lower = 0;
  int64_t upper = 0;
};

// The eigenvalue bounds and threshold intervals that a certificate went through, for tests and `bsgap info`.
struct CertificateTrace {
  Bounds largest_eigenvalue;
  Bounds tau_squared;
  double error_at_lower = 0;
  double error_at_upper = 0;
};

namespace detail {

inline constexpr int kShiftGuesses = 4;

// Only a guess of where to look. A term that is switched off stays out of it too, or the distance kept
// from the threshold would stand in for the term.
inline double a_priori_error(const double* g, int64_t n, double shift, double gram_error,
                             const ErrorTerms& terms) {
  double trace = 0;
  for (int64_t i = 0; i < n; ++i) trace += std::abs(g[i * n + i] - shift);
  return gram_error + (terms.ldlt ? 2 * gamma(static_cast<double>(n) + 4) * trace : 0) +
         (terms.shift ? kUnitRoundoff * trace : 0);
}

// #{lambda(M) > t} is at least the count at a shift s with s - error(s) >= t.
inline int64_t certified_lower(const double* g, int64_t n, double t, double gram_error, double* work,
                               const ParallelFor& parallel, const ErrorTerms& terms, double* error_used) {
  double shift = t + 1.25 * a_priori_error(g, n, t, gram_error, terms);
  for (int guess = 0; guess < kShiftGuesses; ++guess) {
    shift += outward_rounding(shift);
    if (!(shift < kInfinity)) break;
    const InertiaCount c = count_above(g, n, shift, work, parallel);
    const double error = round_up(gram_error + terms.total(c));
    if (c.valid) {
      *error_used = error;
      if (c.positive == 0) return 0;  // nothing to certify: the bound is 0 whatever the error
      if (round_down(shift - error) >= t) return c.positive;
      shift = t + 1.5 * error;
    } else {
      shift += 0.25 * std::max(shift - t, kTiny);
    }
  }
  return 0;
}

// #{lambda(M) > t} is at most the count at a shift s with s + error(s) <= t.
inline int64_t certified_upper(const double* g, int64_t n, double t, double gram_error, double* work,
                               const ParallelFor& parallel, const ErrorTerms& terms, double* error_used) {
  double shift = t - 1.25 * a_priori_error(g, n, t, gram_error, terms);
  for (int guess = 0; guess < kShiftGuesses; ++guess) {
    shift -= outward_rounding(shift);
    const InertiaCount c = count_above(g, n, shift, work, parallel);
    const double error = round_up(gram_error + terms.total(c));
    if (c.valid) {
      *error_used = error;
      if (c.positive == n) return n;
      if (round_up(shift + error) <= t) return c.positive;
      shift = t - 1.5 * error;
    } else {
      shift -= 0.25 * std::max(t - shift, kTiny);
    }
  }
  return n;
}

}  // namespace detail

// g: computed Gram matrix, n x n, ||g - M||_2 <= gram_error with M the exact one. The result holds the
// number of eigenvalues of M above tau^2, for any rounding. out: one interval per threshold.
inline void certified_counts(const double* g, int64_t n, double gram_error, const Threshold* thresholds,
                             int64_t count, CountInterval* out, const ParallelFor& parallel,
                             const ErrorTerms& terms = {}, const std::vector<double>* start = nullptr,
                             CertificateTrace* trace = nullptr) {
  ScopedIeee ieee;
  if (!terms.gram) gram_error = 0;
  Buffer<double> work(n * factor_stride(n));
  Bounds top = largest_eigenvalue(g, n, work.data(), parallel, terms, start);
  top.lower = round_down(top.lower - gram_error);
  top.upper = round_up(top.upper + gram_error);
  for (int64_t i = 0; i < count; ++i) {
    const double atol = thresholds[i].absolute, rtol = thresholds[i].relative;
    if (std::isnan(atol) || std::isnan(rtol)) {
      out[i] = {-1, -1};
      continue;
    }
    if (std::max(atol, rtol) < 0) {  // tau < 0 <= sigma
      out[i] = {n, n};
      continue;
    }
    if (rtol >= 1) {  // tau >= sigma_max
      out[i] = {0, 0};
      if (trace) *trace = {top, {top.lower, kInfinity}, 0, 0};
      continue;
    }
    // r * (r * lambda), not (r * r) * lambda: r * r may underflow where the product does not.
    const double a = std::max(atol, 0.0), r = std::max(rtol, 0.0);
    const Bounds t = {std::max(round_down(a * a), round_down(r * (r * top.lower))),
                      std::max(round_up(a * a), round_up(r * (r * top.upper)))};
    CertificateTrace here{top, t, 0, 0};
    if (t.lower >= top.upper) {
      out[i] = {0, 0};
    } else {
      out[i].upper = detail::certified_upper(g, n, t.lower, gram_error, work.data(), parallel, terms,
                                             &here.error_at_upper);
      out[i].lower = out[i].upper == 0 ? 0
                                       : detail::certified_lower(g, n, t.upper, gram_error, work.data(),
                                                                 parallel, terms, &here.error_at_lower);
      // The two ends come from two factorisations; if they contradict each other a bound was false (the
      // probes' 1e-9, or broken arithmetic) and nothing is known.
      if (out[i].lower > out[i].upper) out[i] = {0, n};
    }
    if (trace) *trace = here;
  }
}

// Sides up to this are tridiagonalised in vector lanes (lanes.h), which take as long for one matrix as for
// eight: where one alone loses about what each of eight gains. Above it every threshold costs one LDL^T and
// sigma_max a Lanczos run checked by another.
inline constexpr int64_t kLaneSide = 64;
// Counts for content that needs no arithmetic: -1 for non-finite values; a zero matrix has only
// singular values 0, above a negative threshold and no other.
inline int64_t trivial_count(Content content, const Threshold& t, int64_t side) {
  if (content == Content::kNonFinite || std::isnan(t.absolute) || std::isnan(t.relative)) return -1;
  return std::max(t.absolute, t.relative) < 0 ? side : 0;
}

// Where eigenvalues have to be counted for a threshold, or the count if that needs no looking.
struct CountAt {
  bool known = false;
  int64_t count = 0;
  double tau_squared = 0;
};

// largest: the largest eigenvalue.
inline CountAt count_at(const Threshold& t, int64_t side, double largest) {
  if (std::isnan(t.absolute) || std::isnan(t.relative)) return {true, -1, 0};
  if (std::max(t.absolute, t.relative) < 0) return {true, side, 0};
  if (t.relative >= 1) return {true, 0, 0};  // tau >= sigma_max
  const double absolute = std::max(t.absolute, 0.0), relative = std::max(t.relative, 0.0);
  const double tau_squared = std::max(absolute * absolute, relative * (relative * largest));
  if (!(tau_squared < kInfinity)) return {true, 0, 0};
  return {false, 0, tau_squared};
}

// Point counts without a certificate: right outside the band that rounding moves (docs/certificates.md).
// largest: if not null, where the largest eigenvalue goes, to about 1e-6.
inline void point_counts(const double* g, int64_t n, const Threshold* thresholds, int64_t count, int64_t* out,
                         const ParallelFor& parallel, double* largest = nullptr) {
  ScopedIeee ieee;
  Buffer<double> work(n * factor_stride(n));
  double top = -1;  // found when something first asks for it
  if (largest) *largest = top = std::max(largest_eigenvalue(g, n, work.data(), parallel).lower, 0.0);
  for (int64_t i = 0; i < count; ++i) {
    if (thresholds[i].relative > 0 && top < 0)
      top = std::max(largest_eigenvalue(g, n, work.data(), parallel).lower, 0.0);
    const CountAt at = count_at(thresholds[i], n, std::max(top, 0.0));
    if (at.known) {
      out[i] = at.count;
      continue;
    }
    double shift = at.tau_squared;
    InertiaCount c = count_above(g, n, shift, work.data(), parallel);
    for (int nudge = 1; !c.valid && nudge <= 8; ++nudge) {  // a pivot was exactly zero
      // Twice the unit roundoff is what moves any number; upwards, where a tie is not above the threshold.
      shift += std::ldexp(kUnitRoundoff, nudge) * std::max(shift, top) + kTiny;
      c = count_above(g, n, shift, work.data(), parallel);
    }
    out[i] = c.valid ? c.positive : -1;
  }
}

}  // namespace bsgap
