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

// A tensor (*, n) as one matrix, leading dimensions observations, read in place where their strides have at
// most two levels (contiguous, channels_last, NCHW with the channels moved last); else the tensor has to be
// copied first.
MatrixView rows_view(const Tensor& a) {
  const int64_t dims = a.dim(), n = a.size(dims - 1);
  MatrixView view{a.const_data_ptr(), dtype_of(a), 1, n, 0, a.stride(dims - 1)};
  int levels = 0;
  for (int64_t d = dims - 2; d >= 0; --d) {
    const int64_t size = a.size(d), stride = a.stride(d);
    if (size == 1) continue;
    if (levels == 0) {
      view.rows = size;
      view.row_stride = stride;
      levels = 1;
    } else if (levels == 1 && stride == view.rows * view.row_stride) {
      view.rows *= size;
    } else if (levels == 1) {
      view.group = view.rows;
      view.group_stride = stride;
      view.rows *= size;
      levels = 2;
    } else {
      STD_TORCH_CHECK(stride == view.rows / view.group * view.group_stride,
                      "bsgap: the leading dimensions of A have more than two levels of strides");
      view.rows *= size;
    }
  }
  STD_TORCH_CHECK(levels < 2 || view.rows >= n, "bsgap: fewer rows than features need one level of strides");
  return view;
}

// Matrices (*, m, n) read in place, whatever the strides.
class Batch {
 public:
  explicit Batch(const Tensor& a) : tensor_(a) {
    STD_TORCH_CHECK(a.dim() >= 2, "bsgap: A must have at least 2 dimensions");
    const int64_t dims = a.dim();
    first_ = MatrixView{a.const_data_ptr(), dtype_of(a),        a.size(dims - 2),
                        a.size(dims - 1),   a.stride(dims - 2), a.stride(dims - 1)};
    for (int64_t d = 0; d + 2 < dims; ++d) size_ *= a.size(d);
  }

  int64_t size() const { return size_; }
  int64_t cols() const { return first_.cols; }
  int64_t side() const { return std::min(first_.rows, first_.cols); }
  int64_t cells() const { return first_.rows * first_.cols; }

  MatrixView operator[](int64_t index) const {
    int64_t offset = 0;
    for (int64_t d = size_ > 1 ? tensor_.dim() - 3 : -1; d >= 0; --d) {
      offset += index % tensor_.size(d) * tensor_.stride(d);
      index /= tensor_.size(d);
    }
    static constexpr std::array<int64_t, 4> kBytes = {8, 4, 2, 2};
    MatrixView view = first_;
    view.data = static_cast<const char*>(first_.data) + offset * kBytes[static_cast<size_t>(first_.dtype)];
    return view;
  }

 private:
  Tensor tensor_;
  MatrixView first_;
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
    const int64_t cells = std::max<int64_t>(1, batch.cells());
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
      : values_{{atol, rtol}} {
    if (!pairs) return;
    STD_TORCH_CHECK(pairs->dim() == 3 && pairs->size(2) == 2 && pairs->is_contiguous() &&
                        pairs->scalar_type() == ScalarType::Double,
                    "bsgap: thresholds must be a contiguous float64 tensor (B, t, 2)");
    STD_TORCH_CHECK(pairs->size(0) == 1 || pairs->size(0) == batch,
                    "bsgap: thresholds do not match the batch");
    count_ = pairs->size(1);
    shared_ = pairs->size(0) == 1;
    values_.resize(pairs->size(0) * count_);
    const double* p = static_cast<const double*>(pairs->const_data_ptr());
    for (size_t j = 0; j < values_.size(); ++j) values_[j] = {p[2 * j], p[2 * j + 1]};
  }

  int64_t count() const { return count_; }
  // Those of matrix i.
  const Threshold* of(int64_t i) const { return values_.data() + (shared_ ? 0 : i * count_); }
  // The same for A * 2^exponent.
  std::vector<Threshold> at(int64_t i, int exponent) const {
    std::vector<Threshold> result(of(i), of(i) + count_);
    for (Threshold& t : result) t = bsgap::scaled(t, exponent);
    return result;
  }

 private:
  std::vector<Threshold> values_;
  int64_t count_ = 1;
  bool shared_ = true;
};

Tensor empty(std::vector<int64_t> sizes, ScalarType dtype) { return torch::stable::empty(sizes, dtype); }

std::vector<int64_t> batch_shape(const Tensor& a) { return {a.sizes().begin(), a.sizes().end() - 2}; }

template <class T>
T* data(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

GramPrecision precision_of(bool float32_gram) {
  return float32_gram ? GramPrecision::kFloat32 : GramPrecision::kFloat64;
}

// Point counts and, per matrix, a lower bound of the smallest tau / sigma_max: below what the Gram matrix
// resolves the caller has to take singular values instead.
std::tuple<Tensor, Tensor> counts(const Tensor a, const std::optional<Tensor> pairs, double atol, double rtol,
                                  bool center, bool float32_gram) {
  const Batch batch(a);
  const Thresholds thresholds(pairs, atol, rtol, batch.size());
  const int64_t t = thresholds.count();
  Tensor result = empty({batch.size(), t}, ScalarType::Long);
  Tensor relative = empty({batch.size()}, ScalarType::Double);
  std::vector<bsgap::CountJob> jobs(batch.size());
  for (int64_t i = 0; i < batch.size(); ++i)
    jobs[i] = {batch[i], precision_of(float32_gram),    thresholds.of(i),
               t,        data<int64_t>(result) + i * t, data<double>(relative) + i};
  bsgap::count_many(jobs, center, torch_parallel);
  return {result, relative};
}

// Near-rank (*) of a batch at one rtol which the Gram matrix is known to resolve.
Tensor near_rank(const Tensor a, double rtol, bool center, bool float32_gram) {
  const Batch batch(a);
  Tensor result = empty(batch_shape(a), ScalarType::Long);
  const Threshold threshold{0.0, rtol};
  std::vector<bsgap::CountJob> jobs(batch.size());
  for (int64_t i = 0; i < batch.size(); ++i)
    jobs[i] = {batch[i], precision_of(float32_gram), &threshold, 1, data<int64_t>(result) + i, nullptr};
  bsgap::count_many(jobs, center, torch_parallel);
  return result;
}

// One count for each matrix (*, n) of a list, whose leading dimensions are all rows; rtol and float32_gram
// have an entry for each.
std::tuple<Tensor, Tensor> grouped_counts(const std::vector<Tensor> as, double atol,
                                          const std::vector<double> rtol, bool center,
                                          const std::vector<bool> float32_gram) {
  const int64_t size = static_cast<int64_t>(as.size());
  STD_TORCH_CHECK(rtol.size() == as.size() && float32_gram.size() == as.size(),
                  "bsgap: rtol and float32_gram need one entry per matrix");
  Tensor result = empty({size}, ScalarType::Long), relative = empty({size}, ScalarType::Double);
  std::vector<Threshold> thresholds(size);
  std::vector<bsgap::CountJob> jobs(size);
  for (int64_t i = 0; i < size; ++i) {
    thresholds[i] = {atol, rtol[i]};
    jobs[i] = {rows_view(as[i]),          precision_of(float32_gram[i]), &thresholds[i], 1,
               data<int64_t>(result) + i, data<double>(relative) + i};
  }
  bsgap::count_many(jobs, center, torch_parallel);
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
      const int64_t n = bsgap::trivial_count(c.gram.content, t[j], c.gram.side);
      c.intervals[j] = {n, n};
    }
    return c;
  }
  if (!(c.gram.rounding_error < bsgap::kInfinity)) bsgap::probe(view, features_side, seed, c.gram, parallel);
  bsgap::certified_counts(c.gram.g.data(), c.gram.side, c.gram.error(), t.data(), thresholds.count(),
                          c.intervals.data(), parallel);
  return c;
}

std::tuple<Tensor, Tensor> intervals(const Tensor a, double atol, double rtol, bool center, bool probed,
                                     int64_t seed) {
  const Batch batch(a);
  const Thresholds thresholds(std::nullopt, atol, rtol, batch.size());
  Tensor lower = empty(batch_shape(a), ScalarType::Long), upper = empty(batch_shape(a), ScalarType::Long);
  int64_t *low = data<int64_t>(lower), *high = data<int64_t>(upper);
  for_each_matrix(batch, [&](int64_t i, const ParallelFor& parallel) {
    const Certified c = certify(batch[i], thresholds, i, center, probed,
                                static_cast<uint64_t>(seed) + static_cast<uint64_t>(i), parallel);
    low[i] = c.intervals[0].lower;
    high[i] = c.intervals[0].upper;
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

// A^T A, about the column means if centred. Values beyond float64's range become infinite.
Tensor feature_gram(const Tensor a, bool center, bool float32_gram) {
  const Batch batch(a);
  const int64_t n = batch.cols();
  Tensor gram = empty({batch.size(), n, n}, ScalarType::Double);
  double* g = data<double>(gram);
  for_each_matrix(batch, [&](int64_t i, const ParallelFor& parallel) {
    CertifiedGram r = bsgap::certified_gram(batch[i], true, center, precision_of(float32_gram), parallel);
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
  const double back = std::ldexp(1.0, -r.exponent), rows = static_cast<double>(a.rows);
  double error = r.error();
  if (with_sums) {
    const double chunk = static_cast<double>(bsgap::detail::kChunk);
    error =
        std::max(error, bsgap::gamma(std::min(chunk, rows) + std::ceil(rows / chunk) + 2) * r.frobenius_sq);
  }
  return bsgap::round_up(bsgap::round_up(error * back) * back) + static_cast<double>(r.side) * kUnderflow;
}

// Adds A^T A (or, a matrix with fewer rows than features, A A^T), the lower triangle, to gram; rows, a bound
// of the error and one addition to totals; column sums to sums.
void accumulate_gram(Tensor gram, Tensor totals, std::optional<Tensor> sums, const Tensor a,
                     bool features_side, bool center, bool float32_gram) {
  const MatrixView view = rows_view(a);
  const int64_t side = features_side ? view.cols : view.rows;
  STD_TORCH_CHECK(gram.dim() == 2 && gram.size(0) == side && gram.size(1) == side && gram.is_contiguous() &&
                      gram.scalar_type() == ScalarType::Double,
                  "bsgap: gram must be a contiguous float64 matrix of side ", side);
  double* g = data<double>(gram);
  double* total = totals_of(totals);
  const bsgap::ScopedIeee ieee;
  // Below this many products (tens of microseconds) starting threads costs more than they save.
  constexpr int64_t kSerialProducts = int64_t{1} << 21;
  const bool alone = view.rows * view.cols * side <= kSerialProducts;
  const ParallelFor parallel = alone ? ParallelFor(bsgap::serial_for) : ParallelFor(torch_parallel);
  const CertifiedGram r =
      bsgap::certified_gram(view, features_side, center, precision_of(float32_gram), parallel);
  total[kRows] += static_cast<double>(view.rows);
  total[kAdditions] += 1;
  if (r.content == Content::kNonFinite) {
    for (int64_t i = 0; i < side; ++i) g[i * side + i] = std::numeric_limits<double>::quiet_NaN();
  } else if (r.content == Content::kFinite) {          // zeros were looked at: they add no error
    const double back = std::ldexp(1.0, -r.exponent);  // twice: its square may not be representable
    total[kError] = bsgap::round_up(total[kError] + added_error(r, view, sums.has_value()));
    constexpr int64_t kRowsAtOnce = 64;
    bsgap::balanced_for((side + kRowsAtOnce - 1) / kRowsAtOnce,
                        side > 512 ? ParallelFor(torch_parallel) : ParallelFor(bsgap::serial_for),
                        [&](int64_t block) {
                          const int64_t end = std::min(side, (block + 1) * kRowsAtOnce);
                          for (int64_t i = block * kRowsAtOnce; i < end; ++i)
                            for (int64_t j = 0; j <= i; ++j)
                              g[i * side + j] += r.g[i * side + j] * back * back;
                        });
  }
  if (!sums) return;
  STD_TORCH_CHECK(
      sums->numel() == view.cols && sums->is_contiguous() && sums->scalar_type() == ScalarType::Double,
      "bsgap: sums must be a contiguous float64 vector with one entry per feature");
  std::vector<double> own(view.cols);
  bsgap::column_sums(view, 1.0, nullptr, own.data());
  double* s = data<double>(*sums);
  for (int64_t j = 0; j < view.cols; ++j) s[j] += own[j];
}

// Count, lower and upper bound (-1 unless certified), int64 (N, 3), of Gram matrices that were summed up.
Tensor gram_counts(const std::vector<Tensor> grams, const std::vector<Tensor> totals, double atol,
                   double rtol, bool certify) {
  const int64_t size = static_cast<int64_t>(grams.size());
  STD_TORCH_CHECK(totals.size() == grams.size(), "bsgap: totals need one entry per Gram matrix");
  Tensor counts = empty({size}, ScalarType::Long), result = empty({size, 3}, ScalarType::Long);
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
    jobs[i].counts = data<int64_t>(counts) + i;
  }
  bsgap::count_many(jobs, false, torch_parallel);
  const int64_t* count = data<int64_t>(counts);
  int64_t* out = data<int64_t>(result);
  const auto bound = [&](int64_t i, const ParallelFor& parallel) {
    const bsgap::ScopedIeee ieee;
    out[3 * i] = out[3 * i + 1] = out[3 * i + 2] = count[i];
    if (!certify) out[3 * i + 1] = out[3 * i + 2] = -1;
    if (!certify || count[i] < 0) return;
    const double* total = static_cast<const double*>(totals[i].const_data_ptr());
    const CertifiedGram r = bsgap::given_gram(jobs[i].gram, jobs[i].a.cols);
    if (r.content != Content::kFinite) {
      // A sum of 0 says that the matrix is 0 only where nothing can have underflowed: then the error is 0.
      if (total[kError] > 0) out[3 * i + 2] = jobs[i].a.cols;
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
      bsgap::certified_counts(r.g.data(), r.side, error, &t, 1, &interval, parallel);
    out[3 * i + 1] = interval.lower;
    out[3 * i + 2] = interval.upper;
    out[3 * i] = std::clamp(count[i], interval.lower, interval.upper);
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

STABLE_TORCH_LIBRARY_IMPL(bsgap, CPU, m) {
  m.impl("_counts", TORCH_BOX(&counts));
  m.impl("_near_rank", TORCH_BOX(&near_rank));
  m.impl("_grouped_counts", TORCH_BOX(&grouped_counts));
  m.impl("_intervals", TORCH_BOX(&intervals));
  m.impl("_small_gram", TORCH_BOX(&small_gram));
  m.impl("_summarize", TORCH_BOX(&summarize));
  m.impl("_feature_gram", TORCH_BOX(&feature_gram));
  m.impl("_shifted_gram", TORCH_BOX(&shifted_gram));
  m.impl("_accumulate_gram_", TORCH_BOX(&accumulate_gram));
  m.impl("_gram_counts", TORCH_BOX(&gram_counts));
}
