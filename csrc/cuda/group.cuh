// Threads that work on one matrix together: a warp, or a whole block. Algorithms are templates on the group.
//
// Every reduction returns the same value in all threads, NaN too, whatever the order of arrival, so that a
// branch on its result is taken by all or by none; and it is a barrier as sync() is: what a thread wrote
// before is visible to the others after.
#pragma once

#include "platform.cuh"

namespace bsgap::cuda {

namespace detail {

// A butterfly: partners add the same two numbers, so all lanes end with the same bits.
__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += warp_shuffle_xor(x, mask);
  return x;
}

__device__ __forceinline__ double larger(double x, double y) { return x > y ? x : y; }

// Symmetric in NaN, as `larger` is not: lanes that exchange x and y must agree.
__device__ __forceinline__ double larger_or_nan(double x, double y) { return x > y || x != x ? x : y; }

__device__ __forceinline__ double warp_max(double x) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x = larger_or_nan(x, warp_shuffle_xor(x, mask));
  return x;
}

__device__ __forceinline__ int set_bits(unsigned x) {
  int count = 0;
  for (; x != 0; x &= x - 1) ++count;
  return count;
}

}  // namespace detail

class WarpGroup {
 public:
  static constexpr int kSize = kWarp;
  static constexpr int kScratch = 0;  // doubles of shared memory

  __device__ explicit WarpGroup(double*) {}
  __device__ int rank() const { return static_cast<int>(threadIdx.x % kWarp); }
  __device__ void sync() { warp_sync(); }
  __device__ double sum(double x) {
    x = detail::warp_sum(x);
    warp_sync();
    return x;
  }
  __device__ double max(double x) {
    x = detail::warp_max(x);
    warp_sync();
    return x;
  }
  __device__ int count(bool predicate) {
    const int result = detail::set_bits(warp_ballot(predicate));
    warp_sync();
    return result;
  }
};

// A reduction costs one barrier: its scratch alternates between two halves, and a thread can only come back
// to a half after the barrier of the reduction in between, which all threads reach after they read that half.
template <int kThreads>
class BlockGroup {
 public:
  static constexpr int kSize = kThreads;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kScratch = 2 * kWarps;

  __device__ explicit BlockGroup(double* scratch) : scratch_(scratch) {}
  __device__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ void sync() { block_sync(); }
  __device__ double sum(double x) {
    const double* parts = exchange(detail::warp_sum(x));
    x = parts[0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) x += parts[w];
    return x;
  }
  __device__ double max(double x) {
    const double* parts = exchange(detail::warp_max(x));
    x = parts[0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) x = detail::larger_or_nan(x, parts[w]);
    return x;
  }
  __device__ int count(bool predicate) {
    const double* parts = exchange(detail::set_bits(warp_ballot(predicate)));
    double x = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) x += parts[w];
    return static_cast<int>(x);
  }

 private:
  __device__ const double* exchange(double of_warp) {
    double* parts = scratch_ + half_ * kWarps;
    half_ ^= 1;
    if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = of_warp;
    block_sync();
    return parts;
  }

  double* scratch_;
  int half_ = 0;
};

}  // namespace bsgap::cuda
