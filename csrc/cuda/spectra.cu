// CUDA kernels of the private ops, registered through LibTorch's stable ABI: memory from torch's allocator,
// launches on the current stream of the tensors' device, no synchronisation. Schemas:
// bsgap_kernels/schema.py; who calls them: bsgap_kernels/ops/_cuda.py.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <numeric>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/count_launch.cuh"
#include "cuda/summary.cuh"
#include "cuda/table_fill.cuh"

namespace {

using bsgap::cuda::CountProblem;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The device and stream that a tensor's kernels go to.
class Place {
 public:
  explicit Place(const Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

Tensor empty_on(const Tensor& on, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(on, sizes, dtype);
}

template <class T>
T* data(Tensor& t) {
  return t.numel() > 0 ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

template <class T>
const T* const_data(const std::optional<Tensor>& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

void require(const Tensor& t, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(t.is_cuda() && t.is_contiguous() && t.scalar_type() == dtype, "bsgap: ", name,
                  " must be a contiguous CUDA tensor of the right dtype");
}

int64_t matrices(const std::vector<int64_t>& batches) {
  return std::accumulate(batches.begin(), batches.end(), int64_t{0});
}

void require_one_each(const Tensor& t, const std::vector<int64_t>& batches, const char* name) {
  STD_TORCH_CHECK(t.numel() == matrices(batches), "bsgap: ", name, " must have one element a matrix, ",
                  matrices(batches), " in all, got ", t.numel());
}

// The part of a problem that counts and summaries share.
CountProblem problem_of(const Tensor& table, const std::vector<int64_t>& sides,
                        const std::vector<int64_t>& batches, const std::optional<Tensor>& exponent) {
  require(table, ScalarType::Long, "table");
  STD_TORCH_CHECK(sides.size() == batches.size() &&
                      table.numel() == static_cast<int64_t>(sides.size()) * bsgap::cuda::kTableColumns,
                  "bsgap: the table and its host copy differ in length");
  if (exponent) {
    require(*exponent, ScalarType::Int, "exponent");
    require_one_each(*exponent, batches, "exponent");
  }
  CountProblem p;
  p.table = static_cast<const int64_t*>(table.const_data_ptr());
  p.rows = static_cast<int64_t>(sides.size());
  p.sides = sides.data();
  p.batches = batches.data();
  p.exponent = const_data<int32_t>(exponent);
  return p;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> counts(const Tensor grams, const Tensor table,
                                                          const std::vector<int64_t> sides,
                                                          const std::vector<int64_t> batches,
                                                          const std::optional<Tensor> thresholds, double atol,
                                                          double rtol, const std::optional<Tensor> exponent,
                                                          const std::optional<Tensor> gram_error,
                                                          bool certify, bool spectrum, bool moments) {
  const Place place(grams);
  require(grams, ScalarType::Double, "grams");
  CountProblem p = problem_of(table, sides, batches, exponent);
  const int64_t n = matrices(batches);
  p.grams = static_cast<const double*>(grams.const_data_ptr());
  p.atol = atol;
  p.rtol = rtol;
  if (thresholds) {
    require(*thresholds, ScalarType::Double, "thresholds");
    STD_TORCH_CHECK(thresholds->dim() == 3 && thresholds->size(2) == 2 &&
                        (thresholds->size(0) == 1 || thresholds->size(0) == n),
                    "bsgap: thresholds must have shape (1 or ", n, ", t, 2)");
    p.thresholds = static_cast<const double*>(thresholds->const_data_ptr());
    p.thresholds_shared = thresholds->size(0) == 1;
    p.threshold_count = thresholds->size(1);
  }
  if (gram_error) {
    require(*gram_error, ScalarType::Double, "gram_error");
    require_one_each(*gram_error, batches, "gram_error");
  }
  p.gram_error = const_data<double>(gram_error);
  p.certify = certify;
  p.spectrum = spectrum;

  int64_t eigenvalues = 0;
  for (size_t i = 0; i < sides.size(); ++i) eigenvalues += sides[i] * batches[i];
  // One empty tensor stands for all that was not asked for: an allocation costs the host a microsecond or
  // two.
  Tensor none = empty_on(grams, {0}, ScalarType::Double);
  const auto if_asked = [&](bool asked, std::vector<int64_t> sizes, ScalarType dtype) {
    return asked ? empty_on(grams, std::move(sizes), dtype) : none;
  };
  Tensor result = empty_on(grams, {n, p.threshold_count}, ScalarType::Long);
  Tensor lower = if_asked(certify, {n, p.threshold_count}, ScalarType::Long);
  Tensor upper = if_asked(certify, {n, p.threshold_count}, ScalarType::Long);
  Tensor lambda = if_asked(spectrum, {eigenvalues}, ScalarType::Double);
  Tensor traces = if_asked(moments, {n, bsgap::cuda::kMoments}, ScalarType::Double);
  p.moments = data<double>(traces);
  p.counts = data<int64_t>(result);
  p.lower = data<int64_t>(lower);
  p.upper = data<int64_t>(upper);
  p.eigenvalues = data<double>(lambda);
  const int64_t bytes = bsgap::cuda::count_workspace_bytes(p);
  Tensor workspace = if_asked(bytes > 0, {bytes}, ScalarType::Byte);
  bsgap::cuda::count_grams(p, data<unsigned char>(workspace), place.stream());
  return {result, lower, upper, lambda, traces};
}

Tensor summaries(const Tensor eigenvalues, const Tensor table, const std::vector<int64_t> sides,
                 const std::vector<int64_t> batches, const std::optional<Tensor> exponent) {
  const Place place(eigenvalues);
  require(eigenvalues, ScalarType::Double, "eigenvalues");
  const CountProblem p = problem_of(table, sides, batches, exponent);
  Tensor summary = empty_on(eigenvalues, {matrices(batches), bsgap::kSummaryColumns}, ScalarType::Double);
  bsgap::cuda::summarize_grams(p, static_cast<const double*>(eigenvalues.const_data_ptr()),
                               data<double>(summary), place.stream());
  return summary;
}

// Writes host values to a tensor on the device, with no copy from host memory.
void fill(Tensor out, const std::vector<int64_t> values) {
  const Place place(out);
  require(out, ScalarType::Long, "out");
  const int64_t n = static_cast<int64_t>(values.size());
  STD_TORCH_CHECK(out.numel() == n, "bsgap: out has ", out.numel(), " elements, expected ", n);
  bsgap::cuda::fill_table(data<int64_t>(out), values.data(), n, place.stream());
}

// Sets how the calling thread's calls interact with captures, and returns how they did before.
int64_t exchange_capture_mode(int64_t mode) {
  cudaStreamCaptureMode value = static_cast<cudaStreamCaptureMode>(mode);
  const cudaError_t error = cudaThreadExchangeStreamCaptureMode(&value);
  STD_TORCH_CHECK(error == cudaSuccess, "bsgap: ", cudaGetErrorString(error));
  return static_cast<int64_t>(value);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bsgap, CompositeExplicitAutograd, m) {
  m.impl("_cuda_exchange_capture_mode", TORCH_BOX(&exchange_capture_mode));
}

STABLE_TORCH_LIBRARY_IMPL(bsgap, CUDA, m) {
  m.impl("_cuda_fill", TORCH_BOX(&fill));
  m.impl("_cuda_counts", TORCH_BOX(&counts));
  m.impl("_cuda_summaries", TORCH_BOX(&summaries));
}
