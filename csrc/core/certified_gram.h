// The Gram matrix of an activation matrix, together with everything its certificate needs.
#pragma once

#include <cmath>
#include <vector>

#include "gram.h"

namespace bsgap {

enum class Content { kFinite, kZero, kNonFinite };

// Between which traces float32 sums stand, here and on a GPU (triton/gram_kernel.py).
// No sum of any entry exceeds the trace (Cauchy-Schwarz): below 2^126 none has overflowed, nor has the trace
// by its own rounding.
inline constexpr double kFloat32LargestTrace = 0x1p126;
// Where subnormals are flushed, as by AVX512-BF16 and, it is assumed, on a GPU, a product loses up to 2^-126:
// in k x p cells the norm of the Gram matrix k p 2^-126, and its largest eigenvalue is at least the k-th part
// of the trace. Above this much for each cell the loss is then below k 2^-40 of the largest eigenvalue. Where
// subnormals are kept, a product loses 2^-150.
inline constexpr double kFlushedSmallestSquare = 0x1p-86;
inline constexpr double kKeptSmallestSquare = 0x1p-110;

struct CertifiedGram {
  int64_t side = 0;
  Buffer<double> g;  // side x side, lower triangle, of (A - mean) * 2^exponent
  int exponent = 0;
  Content content = Content::kFinite;
  double frobenius_sq = 0;    // upper bound of ||X||_F^2 (float64 path), estimate otherwise
  double rounding_error = 0;  // ||g - X^T X||_2, X as read (centred values rounded): float64 path only
  double centring_error = 0;  // ||X^T X - exact centred Gram||_2
  std::vector<double> mean;   // subtracted feature means, scaled; empty when not centred
  std::vector<double> rest;   // what the means are off by: subtracted next

  // ||g - exact Gram||_2. A function with its own ScopedIeee: callers add nothing up outside one.
  double error() const {
    ScopedIeee ieee;
    return round_up(rounding_error + centring_error);
  }
};

namespace detail {

// A side of m or n features, whichever the caller chose; observations are always the rows of a.
inline GramSource gram_source(const MatrixView& a, bool features_side, const CertifiedGram& r,
                              Upcoming next = {}) {
  GramSource s;
  s.next = next;
  s.x = features_side ? a : a.transposed();
  s.scale = std::ldexp(1.0, r.exponent);
  if (!r.mean.empty()) (features_side ? s.mean_by_side : s.mean_by_depth) = r.mean.data();
  s.rest = r.rest.data();
  return s;
}

// Two sweeps: the mean to working accuracy, then the mean of what is left, which is kept apart: added to a
// large mean it would be rounded to that one's last place. Where the first row's entry is the mean but for
// the rounding of the sum it is taken instead, so that equal entries leave exactly 0.
inline void set_mean(const MatrixView& a, CertifiedGram& r) {
  const double scale = std::ldexp(1.0, r.exponent), m = static_cast<double>(a.rows);
  const double rounding = gamma(column_sum_roundings(a.rows) + 2);
  r.mean.resize(a.cols);
  r.rest.resize(a.cols);
  column_sums(a, scale, nullptr, nullptr, r.mean.data());
  with_pointer(a, [&](auto* base) {
    for (int64_t j = 0; j < a.cols; ++j) {
      const double first = load(base + j * a.col_stride) * scale;
      r.mean[j] /= m;
      if (std::abs(r.mean[j] - first) <= rounding * std::abs(first)) r.mean[j] = first;
    }
  });
  column_sums(a, scale, r.mean.data(), nullptr, r.rest.data());
  for (double& x : r.rest) x /= m;
}

// ||X - exact centred A||_F <= rho + u (2 ||X||_F + sqrt(m) ||rest||), rho from the column sums that X still
// has. lost: Frobenius norm of what scaling to 2^exponent pushed below the smallest subnormal.
inline double centring_error(const MatrixView& a, const CertifiedGram& r, double lost) {
  const double m = static_cast<double>(a.rows);
  std::vector<double> sums(a.cols);
  column_sums(a, std::ldexp(1.0, r.exponent), r.mean.data(), r.rest.data(), sums.data());
  double squares = 0, rest = 0;
  for (const double s : sums) squares += s * s;
  for (const double x : r.rest) rest += x * x;
  const double norm = std::sqrt(r.frobenius_sq);
  const double n = static_cast<double>(a.cols);
  const double rho = std::sqrt(squares / m) * (1 + gamma(n + 8)) +
                     gamma(column_sum_roundings(a.rows)) * norm + std::sqrt(n * kTiny);
  const double e = rho + 3 * kUnitRoundoff * norm + 2 * kUnitRoundoff * std::sqrt(m * rest) + lost;
  return round_up((2 * norm + e) * e);
}

inline double trace(const CertifiedGram& r) {
  double sum = 0;
  for (int64_t i = 0; i < r.side; ++i) sum += r.g[i * r.side + i];
  return sum;
}

}  // namespace detail

// features_side: G = A^T A (cols x cols), else A A^T (rows x rows); centred over the rows of a if asked.
// next: memory that is read after this call. sums: of the columns of X as read, if not null.
// kFloat32 falls back to kFloat64 by itself where float32 products would under- or overflow.
inline CertifiedGram certified_gram(const MatrixView& a, bool features_side, bool center,
                                    GramPrecision precision, const ParallelFor& parallel, Upcoming next = {},
                                    double* sums = nullptr) {
  ScopedIeee ieee;
  CertifiedGram r;
  r.side = features_side ? a.cols : a.rows;
  const int64_t depth = features_side ? a.rows : a.cols;
  r.g = Buffer<double>(r.side * r.side);
  const double side = static_cast<double>(r.side), cells = side * static_cast<double>(depth);
  if (precision == GramPrecision::kFloat32 && a.dtype != DType::kFloat64) {
    if (center) detail::set_mean(a, r);
    const GramSource source = detail::gram_source(a, features_side, r, next);
    const bool pairs = a.dtype == DType::kBFloat16 && source.plain() && source.x.rows <= source.x.group &&
                       has_bfloat16_products();
    if (pairs) {
      gram_product<BFloat16Pair>(source, r.g.data(), parallel, sums);
    } else {
      gram_product<float>(source, r.g.data(), parallel, sums);
    }
    r.frobenius_sq = detail::trace(r);
    const double smallest = cells * (pairs ? kFlushedSmallestSquare : kKeptSmallestSquare);
    if (r.frobenius_sq < kFloat32LargestTrace && r.frobenius_sq > smallest) {
      r.rounding_error = kInfinity;  // unknown: the probes of `probed` bound it, nothing else does
      return r;
    }
  }
  const int last = center ? 2 : 1;
  for (int attempt = 0; attempt <= last; ++attempt) {
    if (center) detail::set_mean(a, r);
    gram_product<double>(detail::gram_source(a, features_side, r, next), r.g.data(), parallel, sums);
    const double trace = detail::trace(r);
    // Squares of entries of g must neither overflow nor lose digits to underflow in what follows.
    if (attempt == last || (trace > 0x1p-400 && trace < 0x1p400)) {
      const double c = gram_roundings(depth, r.side);
      r.frobenius_sq = round_up(trace * (1 + 2 * gamma(c + side)) + cells * kTiny);
      r.rounding_error = round_up(gamma(c) * r.frobenius_sq + cells * kTiny);
      // Scaling down may underflow: each entry then moves by at most kTiny / 2.
      const double lost = r.exponent < 0 ? std::sqrt(cells) * kTiny : 0;
      if (center) {
        r.centring_error = detail::centring_error(a, r, lost);
      } else {
        r.rounding_error = round_up(r.rounding_error + (2 * std::sqrt(r.frobenius_sq) + lost) * lost);
      }
      break;
    }
    // Extreme or non-finite: look at the entries, scale the largest to [1, 2) and start again.
    const Magnitude size = magnitude(a);
    if (!size.finite || size.largest == 0 || (center && size.equal_rows)) {
      r.content = size.finite ? Content::kZero : Content::kNonFinite;
      std::fill(r.g.data(), r.g.data() + r.g.size(), 0.0);
      return r;
    }
    // 2^+-1000 keeps the factor itself finite and leaves the trace far inside the exponent range.
    const int exponent = std::clamp(-std::ilogb(size.largest), -1000, 1000);
    if (attempt == 0) {
      r.exponent = exponent;
      continue;
    }
    // What centring left of the scaled entries is far smaller than they: by its size then, A below 2^1000.
    const double left = magnitude(a, std::ldexp(1.0, r.exponent), r.mean.data(), r.rest.data()).largest;
    if (left > 0)
      r.exponent = std::clamp(r.exponent - std::ilogb(left), -1000, std::min(exponent + 900, 1000));
  }
  return r;
}

}  // namespace bsgap
