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

#include "core/counts.h"
#include "core/probe.h"
#include "core/summary.h"

namespace {

using bsgap::CertifiedGram;
using bsgap::Content;
using bsgap::GramPrecision;
using bsgap::MatrixView;
using bsgap::ParallelFor;
using bsgap::Threshold;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

bsgap::DType dtype_of(const Tensor& a) {
  switch (a.scalar_type()) {
    case ScalarType::Double:
      return bsgap::DType::kFloat64;
    case ScalarType::BFloat16:
      return bsgap::DType::kBFloat16;
    case ScalarType::Half:
      return bsgap::DType::kFloat16;
    default:
      STD_TORCH_CHECK(a.scalar_type() == ScalarType::Float,
                      "bsgap: A must be float64, float32, bfloat16 or float16");
      return bsgap::DType::kFloat32;
  }
}

// A batch of matrices read in place, whatever the strides.
class Batch {
 public:
  explicit Batch(const Tensor& a) : tensor_(a), dtype_(dtype_of(a)), dims_(a.dim()) {
    STD_TORCH_CHECK(dims_ >= 2, "bsgap: A must have at least 2 dimensions");
    for (int64_t d = 0; d + 2 < dims_; ++d) size_ *= a.size(d);
  }

  int64_t size() const { return size_; }
  int64_t rows() const { return tensor_.size(dims_ - 2); }
  int64_t cols() const { return tensor_.size(dims_ - 1); }
  int64_t side() const { return std::min(rows(), cols()); }

  MatrixView operator[](int64_t index) const {
    int64_t offset = 0;
    for (int64_t d = dims_ - 3; d >= 0; --d) {
      offset += index % tensor_.size(d) * tensor_.stride(d);
      index /= tensor_.size(d);
    }
    static constexpr std::array<int64_t, 4> kBytes = {8, 4, 2, 2};
    const char* base = static_cast<const char*>(tensor_.const_data_ptr());
    return {base + offset * kBytes[static_cast<size_t>(dtype_)],
            dtype_,
            rows(),
            cols(),
            tensor_.stride(dims_ - 2),
            tensor_.stride(dims_ - 1)};
  }

 private:
  Tensor tensor_;
  bsgap::DType dtype_;
  int64_t dims_;
  int64_t size_ = 1;
};

void torch_parallel(int64_t count, const std::function<void(int64_t)>& body) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

// Runs one item per matrix: matrices in parallel where there are several, else the work inside one.
template <class F>
void for_each_matrix(const Batch& batch, const F& f) {
  if (batch.size() > 1) {
    // Small matrices in groups, so that a range costs more than starting it.
    const int64_t cells = std::max<int64_t>(1, batch.rows() * batch.cols());
    const int64_t grain = std::clamp<int64_t>(8192 / cells, 1, 64);
    torch::stable::parallel_for(0, batch.size(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i, ParallelFor(bsgap::serial_for));
    });
  } else {
    for (int64_t i = 0; i < batch.size(); ++i) f(i, ParallelFor(torch_parallel));
  }
}

// (atol, rtol) pairs per matrix: a float64 tensor (B or 1, t, 2), or one pair for all.
class Thresholds {
 public:
  Thresholds(const std::optional<Tensor>& pairs, double atol, double rtol, int64_t batch)
      : pairs_(pairs), one_{atol, rtol} {
    if (!pairs_) return;
    STD_TORCH_CHECK(pairs_->dim() == 3 && pairs_->size(2) == 2 && pairs_->is_contiguous() &&
                        pairs_->scalar_type() == ScalarType::Double,
                    "bsgap: thresholds must be a contiguous float64 tensor (B, t, 2)");
    STD_TORCH_CHECK(pairs_->size(0) == 1 || pairs_->size(0) == batch,
                    "bsgap: thresholds do not match the batch");
    count_ = pairs_->size(1);
    shared_ = pairs_->size(0) == 1;
  }

  int64_t count() const { return count_; }
  // Thresholds of matrix i for A * 2^exponent.
  std::vector<Threshold> at(int64_t i, int exponent) const {
    std::vector<Threshold> result(count_, one_);
    if (pairs_) {
      const double* p = static_cast<const double*>(pairs_->const_data_ptr()) + (shared_ ? 0 : i * count_ * 2);
      for (int64_t j = 0; j < count_; ++j) result[j] = {p[2 * j], p[2 * j + 1]};
    }
    for (Threshold& t : result) t = bsgap::scaled(t, exponent);
    return result;
  }

 private:
  std::optional<Tensor> pairs_;
  Threshold one_;
  int64_t count_ = 1;
  bool shared_ = false;
};

Tensor empty(std::vector<int64_t> sizes, ScalarType dtype) { return torch::stable::empty(sizes, dtype); }

template <class T>
T* data(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Counts for content that needs no arithmetic: -1 for non-finite values; a zero matrix has only
// singular values 0, above a negative threshold and no other.
int64_t trivial_count(Content content, const Threshold& t, int64_t side) {
  if (content == Content::kNonFinite || std::isnan(t.absolute) || std::isnan(t.relative)) return -1;
  return std::max(t.absolute, t.relative) < 0 ? side : 0;
}

// Point counts and, per matrix, the smallest tau^2 / ||A||_F^2: below what the Gram matrix resolves the
// caller has to take singular values instead.
std::tuple<Tensor, Tensor> counts(const Tensor a, const std::optional<Tensor> pairs, double atol, double rtol,
                                  bool center, bool float32_gram) {
  const Batch batch(a);
  const Thresholds thresholds(pairs, atol, rtol, batch.size());
  Tensor result = empty({batch.size(), thresholds.count()}, ScalarType::Long);
  Tensor relative = empty({batch.size()}, ScalarType::Double);
  int64_t* out = data<int64_t>(result);
  double* out_relative = data<double>(relative);
  for_each_matrix(batch, [&](int64_t i, const ParallelFor& parallel) {
    const MatrixView view = batch[i];
    const CertifiedGram r =
        bsgap::certified_gram(view, view.cols <= view.rows, center,
                              float32_gram ? GramPrecision::kFloat32 : GramPrecision::kFloat64, parallel);
    const std::vector<Threshold> t = thresholds.at(i, r.exponent);
    int64_t* row = out + i * thresholds.count();
    out_relative[i] = bsgap::kInfinity;
    if (r.content != Content::kFinite) {
      for (int64_t j = 0; j < thresholds.count(); ++j) row[j] = trivial_count(r.content, t[j], r.side);
      return;
    }
    bsgap::point_counts(r.g.data(), r.side, t.data(), thresholds.count(), row, parallel);
    for (const Threshold& x : t) {
      const double tau =
          std::max(x.absolute, x.relative * std::sqrt(r.frobenius_sq / static_cast<double>(r.side)));
      if (tau >= 0) out_relative[i] = std::min(out_relative[i], tau / std::sqrt(r.frobenius_sq));
    }
  });
  return {result, relative};
}

struct Certified {
  CertifiedGram gram;
  std::vector<bsgap::CountInterval> intervals;
};

Certified certify(const MatrixView& view, const Thresholds& thresholds, int64_t i, bool center, bool probed,
                  uint64_t seed, const ParallelFor& parallel) {
  const bool features_side = view.cols <= view.rows;
  Certified c;
  c.gram = bsgap::certified_gram(view, features_side, center,
                                 probed ? GramPrecision::kFloat32 : GramPrecision::kFloat64, parallel);
  const std::vector<Threshold> t = thresholds.at(i, c.gram.exponent);
  c.intervals.resize(thresholds.count());
  if (c.gram.content != Content::kFinite) {
    for (int64_t j = 0; j < thresholds.count(); ++j) {
      const int64_t n = trivial_count(c.gram.content, t[j], c.gram.side);
      c.intervals[j] = {n, n};
    }
    return c;
  }
  if (!(c.gram.rounding_error < bsgap::kInfinity)) bsgap::probe(view, features_side, seed, c.gram, parallel);
  bsgap::certified_counts(c.gram.g.data(), c.gram.side, c.gram.error(), t.data(), thresholds.count(),
                          c.intervals.data(), parallel);
  return c;
}

std::tuple<Tensor, Tensor> intervals(const Tensor a, const std::optional<Tensor> pairs, double atol,
                                     double rtol, bool center, bool probed, int64_t seed) {
  const Batch batch(a);
  const Thresholds thresholds(pairs, atol, rtol, batch.size());
  Tensor lower = empty({batch.size(), thresholds.count()}, ScalarType::Long);
  Tensor upper = empty({batch.size(), thresholds.count()}, ScalarType::Long);
  int64_t *low = data<int64_t>(lower), *high = data<int64_t>(upper);
  for_each_matrix(batch, [&](int64_t i, const ParallelFor& parallel) {
    const Certified c = certify(batch[i], thresholds, i, center, probed,
                                static_cast<uint64_t>(seed) + static_cast<uint64_t>(i), parallel);
    for (int64_t j = 0; j < thresholds.count(); ++j) {
      low[i * thresholds.count() + j] = c.intervals[j].lower;
      high[i * thresholds.count() + j] = c.intervals[j].upper;
    }
  });
  return {lower, upper};
}

// Exponent that marks a matrix with non-finite entries; its Gram matrix is returned as zero, because an
// eigenvalue solver would refuse the whole batch for a NaN.
constexpr int32_t kNonFiniteMark = std::numeric_limits<int32_t>::min();

// The smaller Gram matrix of A * 2^exponent, its exponent, and certified intervals from the same read.
std::tuple<Tensor, Tensor, Tensor, Tensor> small_gram(const Tensor a, double atol, double rtol, bool center,
                                                      bool certify_counts) {
  const Batch batch(a);
  const Thresholds thresholds(std::nullopt, atol, rtol, batch.size());
  const int64_t side = batch.side();
  Tensor gram = empty({batch.size(), side, side}, ScalarType::Double);
  Tensor exponent = empty({batch.size()}, ScalarType::Int);
  Tensor lower = empty({batch.size()}, ScalarType::Long);
  Tensor upper = empty({batch.size()}, ScalarType::Long);
  double* g = data<double>(gram);
  int32_t* exponents = data<int32_t>(exponent);
  int64_t *low = data<int64_t>(lower), *high = data<int64_t>(upper);
  for_each_matrix(batch, [&](int64_t i, const ParallelFor& parallel) {
    const MatrixView view = batch[i];
    Certified c;
    c.intervals = {{-1, -1}};
    if (certify_counts) {
      c = certify(view, thresholds, i, center, false, 0, parallel);
    } else {
      c.gram = bsgap::certified_gram(view, view.cols <= view.rows, center, GramPrecision::kFloat64, parallel);
    }
    low[i] = c.intervals[0].lower;
    high[i] = c.intervals[0].upper;
    exponents[i] = c.gram.content == Content::kNonFinite ? kNonFiniteMark : c.gram.exponent;
    bsgap::mirror(c.gram.g.data(), side, parallel);
    std::copy(c.gram.g.data(), c.gram.g.data() + side * side, g + i * side * side);
  });
  return {gram, exponent, lower, upper};
}

// Point counts and the summary columns from what small_gram returned and its eigenvalues (ascending).
std::tuple<Tensor, Tensor> summarize(const Tensor eigenvalues, const Tensor exponent, const Tensor lower,
                                     const Tensor upper, double atol, double rtol, int64_t m, int64_t n) {
  const int64_t batch = eigenvalues.size(0), k = eigenvalues.size(1);
  STD_TORCH_CHECK(k == std::min(m, n) && eigenvalues.is_contiguous() && exponent.is_contiguous(),
                  "bsgap: eigenvalues must be contiguous, one for each of min(m, n)");
  Tensor counts = empty({batch}, ScalarType::Long);
  Tensor summary = empty({batch, bsgap::kSummaryColumns}, ScalarType::Double);
  const double* lambda = static_cast<const double*>(eigenvalues.const_data_ptr());
  const int32_t* exponents = static_cast<const int32_t*>(exponent.const_data_ptr());
  const int64_t* low = static_cast<const int64_t*>(lower.const_data_ptr());
  const int64_t* high = static_cast<const int64_t*>(upper.const_data_ptr());
  for (int64_t i = 0; i < batch; ++i) {
    double* row = data<double>(summary) + i * bsgap::kSummaryColumns;
    int64_t& count = data<int64_t>(counts)[i];
    if (exponents[i] == kNonFiniteMark) {
      count = -1;
      std::fill(row, row + bsgap::kSummaryColumns, std::numeric_limits<double>::quiet_NaN());
      continue;
    }
    count = bsgap::count_of_eigenvalues(lambda + i * k, k, bsgap::scaled({atol, rtol}, exponents[i]));
    if (low[i] >= 0) count = std::clamp(count, low[i], high[i]);
    bsgap::summarize(lambda + i * k, m, n, exponents[i], row);
  }
  return {counts, summary};
}

// A^T A in float64, about the column means if centred. Values beyond float64's range become infinite.
Tensor feature_gram(const Tensor a, bool center) {
  const Batch batch(a);
  const int64_t n = batch.cols();
  Tensor gram = empty({batch.size(), n, n}, ScalarType::Double);
  double* g = data<double>(gram);
  for_each_matrix(batch, [&](int64_t i, const ParallelFor& parallel) {
    CertifiedGram r = bsgap::certified_gram(batch[i], true, center, GramPrecision::kFloat64, parallel);
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
  bsgap::column_sums(view, 1.0, c, data<double>(sums));
  bsgap::GramSource source;
  source.x = view;
  source.mean_by_side = c;
  bsgap::gram_product<double>(source, data<double>(gram), torch_parallel);
  bsgap::mirror(data<double>(gram), n, torch_parallel);
  return {sums, gram};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bsgap, CPU, m) {
  m.impl("_counts", TORCH_BOX(&counts));
  m.impl("_intervals", TORCH_BOX(&intervals));
  m.impl("_small_gram", TORCH_BOX(&small_gram));
  m.impl("_summarize", TORCH_BOX(&summarize));
  m.impl("_feature_gram", TORCH_BOX(&feature_gram));
  m.impl("_shifted_gram", TORCH_BOX(&shifted_gram));
}
