// A table of host values in device memory, without a copy from host memory: values travel as parameters of
// the kernel, which a CUDA graph captures by value. A parameter list holds 4 KB on every GPU served.
#pragma once

#include "platform.cuh"

namespace bsgap::cuda {

inline constexpr int64_t kFillValues = 500;
inline constexpr int kFillThreads = 128;

struct FillChunk {
  int64_t* out;
  int64_t count;
  int64_t values[kFillValues];
};
static_assert(sizeof(FillChunk) <= 4096);

__global__ void __launch_bounds__(kFillThreads) fill_table_kernel(const __grid_constant__ FillChunk chunk) {
  for (int64_t i = threadIdx.x; i < chunk.count; i += kFillThreads) chunk.out[i] = chunk.values[i];
}

// out: n values of device memory; host_values is read before this returns.
inline void fill_table(int64_t* out, const int64_t* host_values, int64_t n, cudaStream_t stream) {
  for (int64_t first = 0; first < n; first += kFillValues) {
    FillChunk chunk;
    chunk.out = out + first;
    chunk.count = n - first < kFillValues ? n - first : kFillValues;
    for (int64_t i = 0; i < kFillValues; ++i) chunk.values[i] = i < chunk.count ? host_values[first + i] : 0;
    BSGAP_LAUNCH(fill_table_kernel, dim3(1), kFillThreads, size_t{0}, stream, chunk);
  }
}

}  // namespace bsgap::cuda
