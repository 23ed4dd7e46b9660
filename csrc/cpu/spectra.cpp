// CPU kernels of the private ops that every public op stands on, registered through LibTorch's stable
// ABI. Schemas live in bsgap_kernels/schema.py; checks of what users pass live in bsgap_kernels/ops.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "core/count_many.h"
#include "core/probe.h"
#include "core/summary.h"
#include "tensors.h"

namespace bsgap::cpu {
namespace {

// Point counts and, per matrix, a lower bound of the smallest tau / sigma_max: below what the Gram matrix
// resolves the caller has to take singular values instead.
std::tuple<Tensor, Tensor> counts(const Tensor a, const std::optional<Tensor> pairs, double atol, double rtol,
                                  bool center, bool float32_sums) {
  const Batch batch(a);
  const Thresholds thresholds(pairs, atol, rtol, batch.size());
  const int64_t t = thresholds.count();
  Tensor result = empty({batch.size(), t}, ScalarType::Long);
  Tensor relative = empty({batch.size()}, ScalarType::Double);
  std::vector<bsgap::CountJob> jobs(batch.size());
  for (int64_t i = 0; i < batch.size(); ++i)
    jobs[i] = {batch[i], precision_of(float32_sums),    thresholds.of(i),
               t,        data<int64_t>(result) + i * t, data<double>(relative) + i};
  bsgap::count_many(jobs, center, torch_parallel);
  return {result, relative};
}

// Near-rank (*) of a batch at one rtol which the Gram matrix is known to resolve.
Tensor near_rank(const Tensor a, double rtol, bool center, bool float32_sums) {
  const Batch batch(a);
  Tensor result = empty(batch_shape(a), ScalarType::Long);
  const Threshold threshold{0.0, rtol};
  std::vector<bsgap::CountJob> jobs(batch.size());
  for (int64_t i = 0; i < batch.size(); ++i)
    jobs[i] = {batch[i], precision_of(float32_sums), &threshold, 1, data<int64_t>(result) + i, nullptr};
  bsgap::count_many(jobs, center, torch_parallel);
  return result;
}

// One count for each matrix (*, n) of a list, whose leading dimensions are all rows; rtol and float32_sums
// have an entry for each.
std::tuple<Tensor, Tensor> grouped_counts(const std::vector<Tensor> as, double atol,
                                          const std::vector<double> rtol, bool center,
                                          const std::vector<bool> float32_sums) {
  const int64_t size = static_cast<int64_t>(as.size());
  STD_TORCH_CHECK(rtol.size() == as.size() && float32_sums.size() == as.size(),
                  "bsgap: rtol and float32_sums need one entry per matrix");
  Tensor result = empty({size}, ScalarType::Long), relative = empty({size}, ScalarType::Double);
  std::vector<Threshold> thresholds(size);
  std::vector<bsgap::CountJob> jobs(size);
  std::vector<Unfolded> unfolded;
  unfolded.reserve(size);
  for (int64_t i = 0; i < size; ++i) {
    thresholds[i] = {atol, rtol[i]};
    unfolded.emplace_back(as[i], as[i].dim() - 1, as[i].dim());
    jobs[i] = {unfolded[i].view(),        precision_of(float32_sums[i]), &thresholds[i], 1,
               data<int64_t>(result) + i, data<double>(relative) + i};
  }
  bsgap::count_many(jobs, center, torch_parallel);
  return {result, relative};
}

bsgap::CountInterval certified_interval(const MatrixView& view, const Threshold& threshold, bool center,
                                        bool probed, uint64_t seed, const ParallelFor& parallel) {
  const bool features_side = view.cols <= view.rows;
  CertifiedGram gram = bsgap::certified_gram(
      view, features_side, center, probed ? GramPrecision::kFloat32 : GramPrecision::kFloat64, parallel);
  const Threshold t = bsgap::scaled(threshold, gram.exponent);
  if (gram.content != Content::kFinite) {
    const int64_t n = bsgap::trivial_count(gram.content, t, gram.side);
    return {n, n};
  }
  if (!(gram.rounding_error < bsgap::kInfinity)) bsgap::probe(view, features_side, seed, gram, parallel);
  bsgap::CountInterval interval;
  bsgap::certified_counts(gram.g.data(), gram.side, gram.error(), &t, 1, &interval, parallel);
  return interval;
}

std::tuple<Tensor, Tensor> intervals(const Tensor a, double atol, double rtol, bool center, bool probed,
                                     int64_t seed) {
  const Batch batch(a);
  Tensor lower = empty(batch_shape(a), ScalarType::Long), upper = empty(batch_shape(a), ScalarType::Long);
  int64_t *low = data<int64_t>(lower), *high = data<int64_t>(upper);
  for_each_matrix(batch, [&](int64_t i, const ParallelFor& parallel) {
    const bsgap::CountInterval interval =
        certified_interval(batch[i], {atol, rtol}, center, probed,
                           static_cast<uint64_t>(seed) + static_cast<uint64_t>(i), parallel);
    low[i] = interval.lower;
    high[i] = interval.upper;
  });
  return {lower, upper};
}

// Exponent that marks a matrix with non-finite entries; its Gram matrix is returned as zero, because an
// eigenvalue solver would refuse the whole batch for a NaN.
constexpr int32_t kNonFiniteMark = std::numeric_limits<int32_t>::min();

// The smaller Gram matrix of A * 2^exponent, and its exponent.
std::tuple<Tensor, Tensor> small_gram(const Tensor a, bool center) {
  const Batch batch(a);
  const int64_t side = batch.side();
  Tensor gram = empty({batch.size(), side, side}, ScalarType::Double);
  Tensor exponent = empty({batch.size()}, ScalarType::Int);
  double* g = data<double>(gram);
  int32_t* exponents = data<int32_t>(exponent);
  for_each_matrix(batch, [&](int64_t i, const ParallelFor& parallel) {
    const MatrixView view = batch[i];
    CertifiedGram r =
        bsgap::certified_gram(view, view.cols <= view.rows, center, GramPrecision::kFloat64, parallel);
    exponents[i] = r.content == Content::kNonFinite ? kNonFiniteMark : r.exponent;
    bsgap::mirror(r.g.data(), side, parallel);
    std::copy(r.g.data(), r.g.data() + side * side, g + i * side * side);
  });
  return {gram, exponent};
}

// The summary columns from the eigenvalues (ascending) and, of scaled matrices, the exponents of small_gram.
Tensor summarize(const Tensor eigenvalues, const std::optional<Tensor> exponent, int64_t m, int64_t n) {
  const int64_t batch = eigenvalues.size(0), k = eigenvalues.size(1);
  STD_TORCH_CHECK(
      k == std::min(m, n) && eigenvalues.is_contiguous() && (!exponent || exponent->is_contiguous()),
      "bsgap: eigenvalues must be contiguous, one for each of min(m, n)");
  Tensor summary = empty({batch, bsgap::kSummaryColumns}, ScalarType::Double);
  const double* lambda = static_cast<const double*>(eigenvalues.const_data_ptr());
  const int32_t* exponents = exponent ? static_cast<const int32_t*>(exponent->const_data_ptr()) : nullptr;
  for (int64_t i = 0; i < batch; ++i) {
    double* row = data<double>(summary) + i * bsgap::kSummaryColumns;
    const int32_t e = exponents ? exponents[i] : 0;
    if (e == kNonFiniteMark) {
      std::fill(row, row + bsgap::kSummaryColumns, std::numeric_limits<double>::quiet_NaN());
    } else {
      bsgap::summarize(lambda + i * k, m, n, e, row);
    }
  }
  return summary;
}

// A^T A, about the column means if centred. Values beyond float64's range become infinite.
Tensor feature_gram(const Tensor a, bool center, bool float32_sums) {
  const Batch batch(a);
  const int64_t n = batch.cols();
  Tensor gram = empty({batch.size(), n, n}, ScalarType::Double);
  double* g = data<double>(gram);
  for_each_matrix(batch, [&](int64_t i, const ParallelFor& parallel) {
    CertifiedGram r = bsgap::certified_gram(batch[i], true, center, precision_of(float32_sums), parallel);
    bsgap::mirror(r.g.data(), n, parallel);
    double* out = g + i * n * n;
    if (r.content == Content::kNonFinite) {
      std::fill(out, out + n * n, std::numeric_limits<double>::quiet_NaN());
    } else {
      const double back = std::ldexp(1.0, -r.exponent);  // twice: its square may not be representable
      for (int64_t k = 0; k < n * n; ++k) out[k] = r.g[k] * back * back;
    }
  });
  return gram;
}

// Column sums and Gram matrix of A - shift (one shift for the whole batch of one matrix).
std::tuple<Tensor, Tensor> shifted_gram(const Tensor a, const Tensor shift) {
  const Batch batch(a);
  STD_TORCH_CHECK(batch.size() == 1 && shift.numel() == batch.cols() && shift.is_contiguous() &&
                      shift.scalar_type() == ScalarType::Double,
                  "bsgap: shift must be a contiguous float64 vector with one entry per column of A");
  const int64_t n = batch.cols();
  const MatrixView view = batch[0];
  Tensor sums = empty({n}, ScalarType::Double), gram = empty({n, n}, ScalarType::Double);
  const double* c = static_cast<const double*>(shift.const_data_ptr());
  bsgap::column_sums(view, 1.0, c, nullptr, data<double>(sums));
  const std::vector<double> none(n, 0.0);
  bsgap::GramSource source;
  source.x = view;
  source.mean_by_side = c;
  source.rest = none.data();
  bsgap::gram_product<double>(source, data<double>(gram), torch_parallel);
  bsgap::mirror(data<double>(gram), n, torch_parallel);
  return {sums, gram};
}

}  // namespace
}  // namespace bsgap::cpu

STABLE_TORCH_LIBRARY_IMPL(bsgap, CPU, m) {
  m.impl("_counts", TORCH_BOX(&bsgap::cpu::counts));
  m.impl("_near_rank", TORCH_BOX(&bsgap::cpu::near_rank));
  m.impl("_grouped_counts", TORCH_BOX(&bsgap::cpu::grouped_counts));
  m.impl("_intervals", TORCH_BOX(&bsgap::cpu::intervals));
  m.impl("_small_gram", TORCH_BOX(&bsgap::cpu::small_gram));
  m.impl("_summarize", TORCH_BOX(&bsgap::cpu::summarize));
  m.impl("_feature_gram", TORCH_BOX(&bsgap::cpu::feature_gram));
  m.impl("_shifted_gram", TORCH_BOX(&bsgap::cpu::shifted_gram));
}
