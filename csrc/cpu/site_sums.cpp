// What a tracker's hooks add up by site, and the counts of it: private ops of bsgap_kernels/schema.py, whose
// callers are in bsgap_kernels/tracking. Bounds: docs/certificates.md, section 8.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "core/count_many.h"
#include "tensors.h"

namespace bsgap::cpu {
namespace {

// Where a site's sums stand: number of rows, bound of the Gram matrix's error, number of additions.
enum Total { kRows, kError, kAdditions, kTotals };

double* totals_of(Tensor& totals) {
  STD_TORCH_CHECK(
      totals.numel() == kTotals && totals.is_contiguous() && totals.scalar_type() == ScalarType::Double,
      "bsgap: totals must be a contiguous float64 tensor of 3 elements");
  return data<double>(totals);
}

// What scaling back, and later the products with a decay, may push below the smallest normal number: more
// than that for each entry. Far below every error of activations that a Gram matrix in float64 can hold.
constexpr double kUnderflow = 0x1p-1020;

// Bound of the error of a finite Gram matrix of `a` that was formed as `r`, and, if wanted, of what follows
// from its column sums: they go through more roundings than an entry, and are taken as a part of its error.
double added_error(const CertifiedGram& r, const MatrixView& a, bool with_sums) {
  const double back = std::ldexp(1.0, -r.exponent);
  double error = r.error();
  if (with_sums)
    error = std::max(error, bsgap::gamma(bsgap::gram_sum_roundings(a.rows, a.cols)) * r.frobenius_sq);
  return bsgap::round_up(bsgap::round_up(error * back) * back) + static_cast<double>(r.side) * kUnderflow;
}

// Adds A^T A (or, a matrix with fewer rows than features, A A^T), the lower triangle, to gram; rows, a bound
// of the error and one addition to totals; column sums to sums. Dimensions [first, last) of a are its
// features. fresh: what was there is forgotten, not added to.
void accumulate_gram(Tensor gram, Tensor totals, std::optional<Tensor> sums, const Tensor a, int64_t first,
                     int64_t last, bool features_side, bool center, bool float32_sums, bool fresh) {
  const Unfolded unfolded(a, first, last);
  const MatrixView& view = unfolded.view();
  const int64_t side = features_side ? view.cols : view.rows;
  STD_TORCH_CHECK(gram.dim() == 2 && gram.size(0) == side && gram.size(1) == side && gram.is_contiguous() &&
                      gram.scalar_type() == ScalarType::Double,
                  "bsgap: gram must be a contiguous float64 matrix of side ", side);
  STD_TORCH_CHECK(
      !sums || (features_side && sums->numel() == view.cols && sums->is_contiguous() &&
                sums->scalar_type() == ScalarType::Double),
      "bsgap: sums must be a contiguous float64 vector with one entry per feature, of A^T A only");
  double *g = data<double>(gram), *total = totals_of(totals), *s = sums ? data<double>(*sums) : nullptr;
  if (fresh) {
    std::fill(total, total + kTotals, 0.0);
    if (s) std::fill(s, s + view.cols, 0.0);
  }
  total[kRows] += static_cast<double>(view.rows);
  if (view.rows == 0 || view.cols == 0) {
    if (fresh) std::fill(g, g + side * side, 0.0);
    return;
  }
  const bsgap::ScopedIeee ieee;
  // Below this many products (tens of microseconds) starting threads costs more than they save.
  constexpr int64_t kSerialProducts = int64_t{1} << 21;
  const bool alone = view.rows * view.cols * side <= kSerialProducts;
  const ParallelFor parallel = alone ? ParallelFor(bsgap::serial_for) : ParallelFor(torch_parallel);
  std::vector<double> own(s ? view.cols : 0);
  const CertifiedGram r = bsgap::certified_gram(view, features_side, center, precision_of(float32_sums),
                                                parallel, {}, s ? own.data() : nullptr);
  total[kAdditions] += 1;
  if (r.content == Content::kFinite) {                 // zeros were looked at: they add no error
    const double back = std::ldexp(1.0, -r.exponent);  // twice: its square may not be representable
    total[kError] = bsgap::round_up(total[kError] + added_error(r, view, sums.has_value()));
    constexpr int64_t kRowsAtOnce = 64;
    bsgap::balanced_for((side + kRowsAtOnce - 1) / kRowsAtOnce,
                        side > 512 ? ParallelFor(torch_parallel) : ParallelFor(bsgap::serial_for),
                        [&](int64_t block) {
                          const int64_t end = std::min(side, (block + 1) * kRowsAtOnce);
                          for (int64_t i = block * kRowsAtOnce; i < end; ++i) {
                            double* row = g + i * side;
                            const double* added = r.g.data() + i * side;
                            if (fresh) {
                              for (int64_t j = 0; j <= i; ++j) row[j] = added[j] * back * back;
                            } else {
                              for (int64_t j = 0; j <= i; ++j) row[j] += added[j] * back * back;
                            }
                          }
                        });
  } else {
    if (fresh) std::fill(g, g + side * side, 0.0);
    if (r.content == Content::kNonFinite)
      for (int64_t i = 0; i < side; ++i) g[i * side + i] = std::numeric_limits<double>::quiet_NaN();
  }
  if (s && r.content == Content::kFinite)
    for (int64_t j = 0; j < view.cols; ++j) s[j] += std::ldexp(own[j], -r.exponent);
}

// A site's Gram matrix about the column means, G - s s^T / m or, without column sums, H G H of A A^T; the
// lower triangle. Both err by less than 3 e + (4 gamma_{side+2} + 32 u) tr G, e the bound of G. What is no
// larger than that is rounding of equal rows, and becomes 0. Second: the totals that belong to it.
std::tuple<Tensor, Tensor> centred_gram(const Tensor gram, const Tensor totals,
                                        const std::optional<Tensor> sums) {
  const int64_t side = gram.size(0);
  const double* g = static_cast<const double*>(gram.const_data_ptr());
  const double* total = static_cast<const double*>(totals.const_data_ptr());
  Tensor result = empty({side, side}, ScalarType::Double), own = empty({kTotals}, ScalarType::Double);
  double *c = data<double>(result), *own_total = data<double>(own);
  const bsgap::ScopedIeee ieee;
  double trace = 0, centred_trace = 0;
  for (int64_t i = 0; i < side; ++i) trace += g[i * side + i];
  std::vector<double> mean(
      side);  // of rows; or, of column sums, s / sqrt(m) would underflow where s / m does not
  const double rows = std::max(total[kRows], 1.0);
  double all = 0;
  if (!sums) {
    for (int64_t i = 0; i < side; ++i) {
      for (int64_t j = 0; j < i; ++j) {
        mean[i] += g[i * side + j];
        mean[j] += g[i * side + j];
      }
      mean[i] += g[i * side + i];
    }
    for (double& x : mean) all += x /= static_cast<double>(side);
    all /= static_cast<double>(side);
  }
  const double* s = sums ? static_cast<const double*>(sums->const_data_ptr()) : nullptr;
  for (int64_t i = 0; i < side; ++i) {
    const double* from = g + i * side;
    double* to = c + i * side;
    if (s) {
      const double factor = s[i] / rows;
      for (int64_t j = 0; j <= i; ++j) to[j] = from[j] - factor * s[j];
    } else {
      for (int64_t j = 0; j <= i; ++j) to[j] = from[j] - mean[i] - mean[j] + all;
    }
    centred_trace += to[i];
  }
  const double u = bsgap::kUnitRoundoff, factor = 4 * bsgap::gamma(static_cast<double>(side) + 2) + 32 * u;
  // What later additions may have rounded is part of e; it is counted here, since C has a smaller trace.
  const double added = 2 * u * (total[kAdditions] + 2);
  const double error = (3 * (total[kError] + added * trace) + factor * trace) * (1 + 16 * u);
  const bool nothing = error < bsgap::kInfinity && centred_trace <= error;
  if (nothing) std::fill(c, c + side * side, 0.0);
  std::copy(total, total + kTotals, own_total);
  own_total[kError] = nothing ? 2 * error : error;  // the diagonal errs by no more than that in all
  return {result, own};
}

// Where a row of gram_counts begins: rows, trace, Frobenius norm and largest eigenvalue of the Gram matrix.
// Count, lower and upper bound of each threshold follow.
enum Fact { kFactRows, kFactTrace, kFactFrobenius, kFactLargest, kFacts };

// Facts, then counts and bounds (-1 unless certified) at max(atol, rtol sigma_max) of each rtol, float64
// (N, kFacts + 3 t), of Gram matrices that were summed up.
Tensor gram_counts(const std::vector<Tensor> grams, const std::vector<Tensor> totals, double atol,
                   const std::vector<double> rtol, bool certify) {
  const int64_t size = static_cast<int64_t>(grams.size()), t = static_cast<int64_t>(rtol.size());
  STD_TORCH_CHECK(totals.size() == grams.size(), "bsgap: totals need one entry per Gram matrix");
  STD_TORCH_CHECK(t > 0, "bsgap: rtol must have an entry");
  const int64_t width = kFacts + 3 * t;
  Tensor result = empty({size, width}, ScalarType::Double);
  std::vector<int64_t> count(size * t);
  std::vector<Threshold> thresholds;
  for (const double r : rtol) thresholds.push_back({atol, r});
  std::vector<bsgap::Moments> moments(size);
  std::vector<bsgap::CountJob> jobs(size);
  for (int64_t i = 0; i < size; ++i) {
    const Tensor& g = grams[i];
    STD_TORCH_CHECK(
        g.dim() == 2 && g.size(0) == g.size(1) && g.is_contiguous() && g.scalar_type() == ScalarType::Double,
        "bsgap: a Gram matrix must be a contiguous square float64 tensor");
    jobs[i].a = {nullptr, bsgap::DType::kFloat64, g.size(0), g.size(0), g.size(0), 1};
    jobs[i].gram = static_cast<const double*>(g.const_data_ptr());
    jobs[i].thresholds = thresholds.data();
    jobs[i].count = t;
    jobs[i].counts = &count[i * t];
    jobs[i].moments = &moments[i];
  }
  bsgap::count_many(jobs, false, torch_parallel);
  double* out = data<double>(result);
  for (int64_t i = 0; i < size; ++i) {
    const double* total = static_cast<const double*>(totals[i].const_data_ptr());
    double* row = out + i * width;
    row[kFactRows] = total[kRows];
    row[kFactTrace] = moments[i].trace;
    row[kFactFrobenius] = moments[i].frobenius;
    row[kFactLargest] = moments[i].largest;
    for (int64_t j = 0; j < t; ++j) {
      double* found = row + kFacts + 3 * j;
      found[0] = static_cast<double>(count[i * t + j]);
      found[1] = found[2] = certify ? found[0] : -1.0;
    }
  }
  if (!certify) return result;
  const auto bound = [&](int64_t i, const ParallelFor& parallel) {
    const bsgap::ScopedIeee ieee;
    double* found = out + i * width + kFacts;
    const double* total = static_cast<const double*>(totals[i].const_data_ptr());
    const CertifiedGram r = bsgap::given_gram(jobs[i].gram, jobs[i].a.cols);
    if (r.content == Content::kNonFinite) return;
    if (r.content == Content::kZero) {
      // A sum of 0 says that the matrix is 0 only where nothing can have underflowed: then the error is 0.
      if (total[kError] > 0)
        for (int64_t j = 0; j < t; ++j) found[3 * j + 2] = static_cast<double>(jobs[i].a.cols);
      return;
    }
    // Each addition rounds an entry by at most u of the sum so far, which never exceeds the trace.
    const double additions = bsgap::gamma(total[kAdditions] + 1);
    const double side = static_cast<double>(r.side), scale = std::ldexp(1.0, r.exponent);
    const double added = 2 * additions * r.frobenius_sq * (1 + 2 * bsgap::gamma(side)) + bsgap::kTiny;
    const double error = bsgap::round_up(bsgap::round_up(total[kError] * scale * scale) + added);
    const std::vector<Threshold> own = bsgap::detail::thresholds_of(jobs[i], r);
    std::vector<bsgap::CountInterval> intervals(t, {0, r.side});
    if (error < bsgap::kInfinity)
      bsgap::certified_counts(bsgap::entries_of(r, jobs[i].gram), r.side, error, own.data(), t,
                              intervals.data(), parallel);
    for (int64_t j = 0; j < t; ++j) {
      const auto [lower, upper] = intervals[j];
      found[3 * j] = static_cast<double>(std::clamp(count[i * t + j], lower, upper));
      found[3 * j + 1] = static_cast<double>(lower);
      found[3 * j + 2] = static_cast<double>(upper);
    }
  };
  std::vector<int64_t> small;
  for (int64_t i = 0; i < size; ++i) {
    if (size > 1 && bsgap::detail::work_of(jobs[i]) <= bsgap::detail::kSharedWork) {
      small.push_back(i);
    } else {
      bound(i, torch_parallel);
    }
  }
  bsgap::balanced_for(static_cast<int64_t>(small.size()), torch_parallel,
                      [&](int64_t i) { bound(small[i], bsgap::serial_for); });
  return result;
}

}  // namespace
}  // namespace bsgap::cpu

STABLE_TORCH_LIBRARY_IMPL(bsgap, CPU, m) {
  m.impl("_accumulate_gram_", TORCH_BOX(&bsgap::cpu::accumulate_gram));
  m.impl("_centred_gram", TORCH_BOX(&bsgap::cpu::centred_gram));
  m.impl("_gram_counts", TORCH_BOX(&bsgap::cpu::gram_counts));
}
