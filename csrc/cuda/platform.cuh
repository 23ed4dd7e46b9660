// What the kernels of this folder need of a GPU, in one place. Every kernel is written against this file
// only, so that the same source also runs on a CPU: `tests/cuda_host/platform_host.h` defines the same names
// with one thread for each CUDA thread, and the tests look there for races, missing barriers and bad
// addresses.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bsgap::cuda {

// Most dynamic shared memory of a launch: what a block may have on the smallest of the GPUs served.
inline constexpr size_t kMaxShared = 99 * 1024;

}  // namespace bsgap::cuda

#ifndef __CUDACC__
#include "platform_host.h"
#else

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace bsgap::cuda {

inline constexpr int kWarp = 32;

// The block's dynamic shared memory, 16-byte aligned. Kernels use no other shared memory.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char bsgap_dynamic_shared[];
  return reinterpret_cast<T*>(bsgap_dynamic_shared);
}

// Barriers order shared and global memory among the threads that wait. All threads of the block (warp) call.
__device__ __forceinline__ void block_sync() { __syncthreads(); }
__device__ __forceinline__ void warp_sync() { __syncwarp(); }

// Exchanges among the 32 lanes of a warp; every lane calls, with the same arguments but the value.
template <class T>
__device__ __forceinline__ T warp_shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
template <class T>
__device__ __forceinline__ T warp_shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
__device__ __forceinline__ unsigned warp_ballot(bool predicate) {
  return __ballot_sync(0xffffffffu, predicate);
}

// C += A B on the float64 tensor core (sm_80 and later), IEEE rounding. Lane l holds A[l / 4][l % 4],
// B[l % 4][l / 4] and C[l / 4][2 (l % 4) + {0, 1}] of an 8x4, a 4x8 and an 8x8 matrix. All lanes call.
__device__ __forceinline__ void dmma_8x8x4(double (&c)[2], double a, double b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};\n"
               : "+d"(c[0]), "+d"(c[1])
               : "d"(a), "d"(b));
}

// True in every thread of the block that arrives last of `total` blocks; what the others wrote to global
// memory before they arrived is then visible. `flag`: one unsigned of the block's shared memory.
__device__ __forceinline__ bool last_to_arrive(unsigned* counter, unsigned total, unsigned* flag) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    *flag = atomicAdd(counter, 1u) == total - 1;
    __threadfence();
  }
  __syncthreads();
  return *flag != 0;
}

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("bsgap: ") + what + ": " + cudaGetErrorString(status));
}

// Launches a kernel on a stream. Above 48 KB of shared memory a kernel has to be told so first: always the
// same number, since what is set is the kernel's and another thread may set it between here and the launch.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared,
            cudaStream_t stream, Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared > 48 * 1024)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kMaxShared)),
          name);
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

}  // namespace bsgap::cuda

#endif

// BSGAP_LAUNCH((kernel<parameters>), grid, threads, shared_bytes, stream, arguments...)
#define BSGAP_LAUNCH(kernel, ...) ::bsgap::cuda::launch(#kernel, kernel, __VA_ARGS__)
