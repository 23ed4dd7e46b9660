// The CUDA kernels and their launches as a library for the CPU, with a C interface
// (tests/cuda_host/__init__.py).
#include <cfenv>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda/count_launch.cuh"
#include "cuda/summary.cuh"
#include "cuda/table_fill.cuh"

namespace {

using bsgap::cuda::CountProblem;

char last_error[512] = "";
bool invalid_operations = false;

// 0, or 1 with a message: no C++ exception may reach Python.
template <class F>
int guarded(const F& f) {
  try {
    f();
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(last_error, sizeof(last_error), "%s", e.what());
    return 1;
  }
}

// What a certificate makes of a proposal for the largest eigenvalue, which the count kernel never gets wrong.
__global__ void bounds_kernel(const double* g, int n, double proposal, double* out) {
  using namespace bsgap::cuda;
  const MatrixMemory m = MatrixMemory::at<SmallBlock>(dynamic_shared<double>(), n);
  SmallBlock group(m.scratch);
  CertifiedMatrix c{g, n, 0, 0, g[0]};
  for (int i = 0; i < n * n; ++i) c.frobenius += g[i] * g[i];
  c.frobenius = bsgap::round_up(std::sqrt(c.frobenius) * (1 + 1e-10));
  const bsgap::Bounds b = largest_eigenvalue(group, m, c, proposal);
  if (threadIdx.x == 0) out[0] = b.lower, out[1] = b.upper;
}

// The factorisation of a matrix of at most kSmallSide rows less a shift: its error bound.
__global__ void inertia_kernel(const double* g, int n, double shift, double* out) {
  using namespace bsgap::cuda;
  const MatrixMemory m = MatrixMemory::at<SmallBlock>(dynamic_shared<double>(), n);
  SmallBlock group(m.scratch);
  const Inertia i = count_above(group, m, g, n, shift);
  if (threadIdx.x == 0) out[0] = i.positive, out[1] = i.valid, out[2] = i.error;
}

// Factorisations of the last count of matrices of more rows, as it left them.
std::vector<bsgap::cuda::Factorisation> factorisations;

void keep_factorisations(const CountProblem& p, const unsigned char* workspace) {
  using namespace bsgap::cuda;
  const LargeShapes shapes(p);
  factorisations.clear();
  if (shapes.matrices() == 0) return;
  const auto places = detail::large_workspace(shapes, detail::large_chunks(p, shapes));
  const auto* first = reinterpret_cast<const Factorisation*>(workspace + places.factorisations);
  factorisations.assign(first, first + shapes.matrices() * kShiftsPerMatrix);
}

}  // namespace

extern "C" {

const char* bsgap_last_error() { return last_error; }
// Whether the last count computed with a NaN of memory that nobody wrote, or made one.
int bsgap_invalid_operations() { return invalid_operations; }

int bsgap_count_grams(const double* grams, const int64_t* table, int64_t rows, const int64_t* sides,
                      const int64_t* batches, const double* thresholds, int thresholds_shared,
                      int64_t threshold_count, double atol, double rtol, const int32_t* exponent,
                      const double* gram_error, int certify, int spectrum, int64_t* counts, int64_t* lower,
                      int64_t* upper, double* eigenvalues, double* moments) {
  return guarded([&] {
    CountProblem p{grams, table, rows, sides, batches, thresholds, thresholds_shared != 0};
    p.threshold_count = threshold_count;
    p.atol = atol, p.rtol = rtol, p.exponent = exponent, p.gram_error = gram_error;
    p.certify = certify != 0, p.spectrum = spectrum != 0;
    p.counts = counts, p.lower = lower, p.upper = upper, p.eigenvalues = eigenvalues;
    p.moments = moments;
    // Of the exact size, and poisoned.
    const size_t bytes = static_cast<size_t>(bsgap::cuda::count_workspace_bytes(p));
    const std::unique_ptr<void, decltype(&std::free)> workspace(std::aligned_alloc(256, bytes), &std::free);
    bsgap::cuda::host::poison(workspace.get(), bytes);
    std::feclearexcept(FE_INVALID);
    bsgap::cuda::count_grams(p, workspace.get(), nullptr);
    keep_factorisations(p, static_cast<const unsigned char*>(workspace.get()));
    invalid_operations = std::fetestexcept(FE_INVALID) != 0;
  });
}

int bsgap_summaries(const double* eigenvalues, const int64_t* table, int64_t rows, const int64_t* batches,
                    const int32_t* exponent, double* summary) {
  return guarded([&] {
    CountProblem p;
    p.table = table, p.rows = rows, p.batches = batches, p.exponent = exponent;
    bsgap::cuda::summarize_grams(p, eigenvalues, summary, nullptr);
  });
}

int bsgap_largest_eigenvalue(const double* g, int n, double proposal, double* out) {
  return guarded([&] {
    BSGAP_LAUNCH(bounds_kernel, dim3(1), bsgap::cuda::kSmallThreads, bsgap::cuda::small_shared_bytes(n, 0),
                 nullptr, g, n, proposal, out);
  });
}

int bsgap_inertia(const double* g, int n, double shift, double* out) {
  return guarded([&] {
    BSGAP_LAUNCH(inertia_kernel, dim3(1), bsgap::cuda::kSmallThreads, bsgap::cuda::small_shared_bytes(n, 0),
                 nullptr, g, n, shift, out);
  });
}

// Shift, factorisation, shift and underflow error, positive pivots, and whether one was replaced, of
// factorisation `index` of the first matrix.
int bsgap_factorisation(int64_t index, double* out) {
  return guarded([&] {
    const bsgap::cuda::Factorisation& f = factorisations.at(index);
    out[0] = f.shift, out[1] = f.factor_error, out[2] = f.shift_error, out[3] = f.underflow_error;
    out[4] = static_cast<double>(f.positive), out[5] = f.replaced;
  });
}

// The bound of a Gram matrix's error from its trace, for a table row of these numbers.
int bsgap_gram_error(double trace, int64_t side, int64_t depth, int64_t roundings, int exponent,
                     double* out) {
  return guarded([&] {
    int64_t row[bsgap::cuda::kTableColumns] = {};
    row[bsgap::cuda::kCount] = 1, row[bsgap::cuda::kSide] = side, row[bsgap::cuda::kOuter] = depth;
    row[bsgap::cuda::kInner] = 1, row[bsgap::cuda::kRoundings] = roundings;
    const int32_t scaled = exponent;
    CountProblem p;
    p.table = row, p.rows = 1, p.exponent = &scaled;
    *out = gram_error_of(p, bsgap::cuda::find_matrix(p, 0), trace);
  });
}

int bsgap_fill_table(int64_t* out, const int64_t* values, int64_t n) {
  return guarded([&] { bsgap::cuda::fill_table(out, values, n, nullptr); });
}

void bsgap_launch_log_clear() { bsgap::cuda::host::launches().clear(); }
int64_t bsgap_launch_log_size() { return static_cast<int64_t>(bsgap::cuda::host::launches().size()); }
// numbers: grid x, y, z, threads, bytes of shared memory.
void bsgap_launch_log_entry(int64_t index, char* name, int64_t name_size, int64_t* numbers) {
  const bsgap::cuda::host::Launch& launch = bsgap::cuda::host::launches()[index];
  std::snprintf(name, name_size, "%s", launch.name.c_str());
  numbers[0] = launch.grid.x, numbers[1] = launch.grid.y, numbers[2] = launch.grid.z;
  numbers[3] = launch.threads, numbers[4] = static_cast<int64_t>(launch.shared);
}

}  // extern "C"
