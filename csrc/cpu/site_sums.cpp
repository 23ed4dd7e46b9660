// What a tracker's hooks add up by site, and the counts of it: private ops of bsgap_kernels/schema.py, whose
// callers are in bsgap_kernels/tracking. Bounds: docs/certificates.md, section 8.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <optional>
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

// Count, lower and upper bound (-1 unless certified) and rows, float64 (N, 4), of Gram matrices that were
// summed up.
Tensor gram_counts(const std::vector<Tensor> grams, const std::vector<Tensor> totals, double atol,
                   double rtol, bool certify) {
  const int64_t size = static_cast<int64_t>(grams.size());
  STD_TORCH_CHECK(totals.size() == grams.size(), "bsgap: totals need one entry per Gram matrix");
  Tensor result = empty({size, 4}, ScalarType::Double);
  std::vector<int64_t> count(size);
  const Threshold threshold{atol, rtol};
  std::vector<bsgap::CountJob> jobs(size);
  for (int64_t i = 0; i < size; ++i) {
    const Tensor& g = grams[i];
    STD_TORCH_CHECK(
        g.dim() == 2 && g.size(0) == g.size(1) && g.is_contiguous() && g.scalar_type() == ScalarType::Double,
        "bsgap: a Gram matrix must be a contiguous square float64 tensor");
    jobs[i].a = {nullptr, bsgap::DType::kFloat64, g.size(0), g.size(0), g.size(0), 1};
    jobs[i].gram = static_cast<const double*>(g.const_data_ptr());
    jobs[i].thresholds = &threshold;
    jobs[i].count = 1;
    jobs[i].counts = &count[i];
  }
  bsgap::count_many(jobs, false, torch_parallel);
  double* out = data<double>(result);
  for (int64_t i = 0; i < size; ++i) {
    const double* total = static_cast<const double*>(totals[i].const_data_ptr());
    out[4 * i] = static_cast<double>(count[i]);
    out[4 * i + 1] = out[4 * i + 2] = certify ? out[4 * i] : -1.0;
    out[4 * i + 3] = total[kRows];
  }
  if (!certify) return result;
  const auto bound = [&](int64_t i, const ParallelFor& parallel) {
    const bsgap::ScopedIeee ieee;
    if (count[i] < 0) return;
    const double* total = static_cast<const double*>(totals[i].const_data_ptr());
    const CertifiedGram r = bsgap::given_gram(jobs[i].gram, jobs[i].a.cols);
    if (r.content != Content::kFinite) {
      // A sum of 0 says that the matrix is 0 only where nothing can have underflowed: then the error is 0.
      if (total[kError] > 0) out[4 * i + 2] = static_cast<double>(jobs[i].a.cols);
      return;
    }
    // Each addition rounds an entry by at most u of the sum so far, which never exceeds the trace.
    const double additions = bsgap::gamma(total[kAdditions] + 1);
    const double side = static_cast<double>(r.side), scale = std::ldexp(1.0, r.exponent);
    const double added = 2 * additions * r.frobenius_sq * (1 + 2 * bsgap::gamma(side)) + bsgap::kTiny;
    const double error = bsgap::round_up(bsgap::round_up(total[kError] * scale * scale) + added);
    const Threshold t = bsgap::scaled(threshold, r.exponent);
    bsgap::CountInterval interval{0, r.side};
    if (error < bsgap::kInfinity)
      bsgap::certified_counts(bsgap::entries_of(r, jobs[i].gram), r.side, error, &t, 1, &interval, parallel);
    out[4 * i + 1] = static_cast<double>(interval.lower);
    out[4 * i + 2] = static_cast<double>(interval.upper);
    out[4 * i] = static_cast<double>(std::clamp(count[i], interval.lower, interval.upper));
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
  m.impl("_gram_counts", TORCH_BOX(&bsgap::cpu::gram_counts));
}
