// Column sums of packed panels and of planes, taken where the Gram product has them in cache.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "isa.h"
#include "simd.h"
#include "tile_bfloat16.h"
#include "tile_product.h"

namespace bsgap {
namespace detail {

// Adds the sums of `rows` rows of a panel, at most kChunk (gram.h), to those of its first `cols` columns.
template <class T>
[[gnu::always_inline]] inline void add_panel_sums_body(const T* panel, int64_t rows, int64_t cols,
                                                       double* sums) {
  constexpr int64_t kWidth = kPanelCols<T>, kRows = PackedNumber<T>::kRows;
  double sum[kWidth] = {};
  for (int64_t p = 0; p < (rows + kRows - 1) / kRows; ++p) {
#pragma omp simd
    for (int64_t c = 0; c < kWidth; ++c) {
      if constexpr (kRows == 2) {
        const uint32_t bits = panel[p * kWidth + c].bits;
        sum[c] += static_cast<double>(std::bit_cast<float>(bits << 16));
        sum[c] += static_cast<double>(std::bit_cast<float>(bits & 0xffff0000U));
      } else {
        sum[c] += static_cast<double>(panel[p * kWidth + c]);
      }
    }
  }
  for (int64_t c = 0; c < std::min(cols, kWidth); ++c) sums[c] += sum[c];
}
BSGAP_PER_ISA_TEMPLATE((class T), void, add_panel_sums,
                       (const T* panel, int64_t rows, int64_t cols, double* sums), (panel, rows, cols, sums))

// The sum of a plane of `depth` numbers, a multiple of 8, in 32 lanes: enough to hide the latency of
// additions.
template <class T, int kVectorBytes>
[[gnu::always_inline]] inline double plane_sum_body(const T* plane, int64_t depth) {
  constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(double)), kVectors = 4;
  using In = Simd<T, kLanes* static_cast<int>(sizeof(T))>;
  using Vector = typename Simd<double, kVectorBytes>::Vector;
  Vector sums[kVectors] = {};
  int64_t p = 0;
  for (; p + kVectors * kLanes <= depth; p += kVectors * kLanes)
    for (int v = 0; v < kVectors; ++v)
      sums[v] += __builtin_convertvector(In::load(plane + p + v * kLanes), Vector);
  for (; p < depth; p += kLanes) sums[0] += __builtin_convertvector(In::load(plane + p), Vector);
  const Vector all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double sum = 0;
  for (int l = 0; l < kLanes; ++l) sum += all[l];
  return sum;
}
#if BSGAP_X86_DISPATCH
template <class T>
BSGAP_AVX512 inline double plane_sum_avx512(const T* plane, int64_t depth) {
  return plane_sum_body<T, 64>(plane, depth);
}
template <class T>
BSGAP_AVX2 inline double plane_sum_avx2(const T* plane, int64_t depth) {
  return plane_sum_body<T, 32>(plane, depth);
}
#endif
template <class T>
double plane_sum(const T* plane, int64_t depth) {
#if BSGAP_X86_DISPATCH
  if (instruction_set() == Isa::kAvx512) return plane_sum_avx512(plane, depth);
  if (instruction_set() == Isa::kAvx2) return plane_sum_avx2(plane, depth);
#endif
  return plane_sum_body<T, 16>(plane, depth);
}

}  // namespace detail
}  // namespace bsgap
