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
template <class T>
[[gnu::always_inline]] inline void add_plane_sum_body(const T* plane, int64_t depth, double* sum) {
  constexpr int64_t kLanes = 32;
  double sums[kLanes] = {};
  int64_t p = 0;
  for (; p + kLanes <= depth; p += kLanes) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) sums[l] += static_cast<double>(plane[p + l]);
  }
  for (; p < depth; p += 8) {
#pragma omp simd
    for (int64_t l = 0; l < 8; ++l) sums[l] += static_cast<double>(plane[p + l]);
  }
  double all = 0;
#pragma omp simd reduction(+ : all)
  for (int64_t l = 0; l < kLanes; ++l) all += sums[l];
  *sum += all;
}
BSGAP_PER_ISA_TEMPLATE((class T), void, add_plane_sum, (const T* plane, int64_t depth, double* sum),
                       (plane, depth, sum))

}  // namespace detail
}  // namespace bsgap
