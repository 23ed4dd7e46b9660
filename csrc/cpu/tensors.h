// Tensors of LibTorch's stable ABI as matrices of csrc/core, for the files of this folder.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <functional>
#include <optional>
#include <vector>

#include "core/certified_gram.h"
#include "core/parallel.h"
#include "core/threshold.h"

namespace bsgap::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bsgap::DType dtype_of(const Tensor& a) {
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

// A tensor as one matrix: dimensions [first, last) are its features, all others, in order, its observations.
// Read in place where one stride leads from feature to feature and strides of at most two levels from
// observation to observation (contiguous, channels_last, and the channels of NCHW); from a copy elsewhere,
// and where two levels have fewer rows than features, because the rows are then a side.
class Unfolded {
 public:
  Unfolded(const Tensor& a, int64_t first, int64_t last) : held_(a) {
    const int64_t dims = a.dim();
    STD_TORCH_CHECK(0 <= first && first < last && last <= dims, "bsgap: features [", first, ", ", last,
                    ") are no dimensions of an activation of ", dims);
    if (in_place(a, first, last)) return;
    for (int64_t moved = first; moved < last; ++moved)  // features last
      for (int64_t d = first; d + 1 < dims; ++d) held_ = torch::stable::transpose(held_, d, d + 1);
    const int64_t leading = dims - (last - first);
    held_ = torch::stable::flatten(torch::stable::flatten(held_, leading, dims - 1), 0, leading - 1);
    STD_TORCH_CHECK(in_place(held_, 1, 2), "bsgap: an activation cannot be read as one matrix");
  }
  const MatrixView& view() const { return view_; }

 private:
  bool in_place(const Tensor& a, int64_t first, int64_t last) {
    MatrixView& view = view_ = {a.const_data_ptr(), dtype_of(a), 1, 1, 0, a.stride(last - 1)};
    for (int64_t d = last - 1; d >= first; --d) {
      if (a.size(d) == 1) continue;
      if (view.cols == 1) view.col_stride = a.stride(d);
      if (a.stride(d) != view.cols * view.col_stride) return false;
      view.cols *= a.size(d);
    }
    int levels = 0;
    for (int64_t d = a.dim() - 1; d >= 0; --d) {
      const int64_t size = a.size(d), stride = a.stride(d);
      if (size == 1 || (first <= d && d < last)) continue;
      if (size == 0) {  // no rows: strides say nothing, and a group of none cannot be divided by
        view.rows = 0;
        return true;
      }
      if (levels == 0) {
        view.row_stride = stride;
        levels = 1;
      } else if (levels == 1 && stride != view.rows * view.row_stride) {
        view.group = view.rows;
        view.group_stride = stride;
        levels = 2;
      } else if (levels == 2 && stride != view.rows / view.group * view.group_stride) {
        return false;
      }
      view.rows *= size;
    }
    return levels < 2 || view.rows >= view.cols;
  }

  Tensor held_;
  MatrixView view_;
};

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

inline void torch_parallel(int64_t count, const std::function<void(int64_t)>& body) {
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

 private:
  std::vector<Threshold> values_;
  int64_t count_ = 1;
  bool shared_ = true;
};

// torch::stable::empty looks the operator up by its name at every call, which takes longer than the count of
// a small matrix.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                               aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline std::vector<int64_t> batch_shape(const Tensor& a) { return {a.sizes().begin(), a.sizes().end() - 2}; }

template <class T>
T* data(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline GramPrecision precision_of(bool float32_sums) {
  return float32_sums ? GramPrecision::kFloat32 : GramPrecision::kFloat64;
}

}  // namespace bsgap::cpu
