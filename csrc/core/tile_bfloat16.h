// Products of bfloat16 numbers by the instruction that takes two at a time (AVX512-BF16), at twice the rate
// of float32. Products are exact and sums are float32, in two levels as where bfloat16 is widened first;
// subnormals count as zero.
#pragma once

#include <algorithm>
#include <cstdint>

#include "isa.h"
#include "tile_product.h"

#if BSGAP_X86_DISPATCH
#include <immintrin.h>
#endif

namespace bsgap {

// Rows 2 p and 2 p + 1 of a column, the first in the lower half.
struct BFloat16Pair {
  uint32_t bits;
};

template <>
struct PackedNumber<BFloat16Pair> {
  using Sum = float;
  static constexpr int64_t kRows = 2;
};

inline bool has_bfloat16_products() {
#if BSGAP_X86_DISPATCH
  static const bool has = instruction_set() == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16");
  return has;
#else
  return false;
#endif
}

#if BSGAP_X86_DISPATCH
namespace detail {

template <int kPanels>
__attribute__((target("avx512f,avx512dq,avx512bf16,fma" BSGAP_WIDE))) inline void tile_bfloat16(
    const TileOperands<BFloat16Pair>& t) {
  constexpr int kWidth = kPanelCols<BFloat16Pair>;
  constexpr int64_t kChain = kChainRows / PackedNumber<BFloat16Pair>::kRows;
  alignas(kPanelBytes) float sums[kTileRows][kPanels * kWidth];
  float* kept = &sums[0][0];
  asm("" : "+r"(kept));  // in memory: the registers are for the products
  for (int64_t first = 0; first < t.depth; first += kChain) {
    const int64_t last = std::min(t.depth, first + kChain);
    if (t.ahead)
      for (int64_t p = first; p < last; ++p) __builtin_prefetch(t.ahead + p * kPanelBytes);
    __m512 sum[kTileRows][kPanels];
    for (int i = 0; i < kTileRows; ++i)
      for (int v = 0; v < kPanels; ++v) sum[i][v] = _mm512_setzero_ps();
    for (int64_t p = first * kWidth; p < last * kWidth; p += kWidth) {
      __m512i b[kPanels];
      for (int v = 0; v < kPanels; ++v) b[v] = _mm512_loadu_si512(t.b + v * t.b_stride + p);
      for (int i = 0; i < kTileRows; ++i) {
        const __m512i a = _mm512_set1_epi32(static_cast<int>(t.a[p + i].bits));
        for (int v = 0; v < kPanels; ++v)
          sum[i][v] = _mm512_dpbf16_ps(sum[i][v], (__m512bh)a, (__m512bh)b[v]);
      }
    }
    for (int i = 0; i < kTileRows; ++i)
      for (int v = 0; v < kPanels; ++v) {
        float* out = kept + (i * kPanels + v) * kWidth;
        _mm512_store_ps(out, first > 0 ? _mm512_add_ps(_mm512_load_ps(out), sum[i][v]) : sum[i][v]);
      }
  }
  asm("" : "+m"(sums) : "r"(kept));
  add_sums<false>(sums, t.c, t.ld, t.rows, t.cols);
}

}  // namespace detail
#endif

// Without kernels where has_bfloat16_products() is false.
template <>
template <>
inline TileProduct<BFloat16Pair> TileProduct<BFloat16Pair>::select<false>() {
#if BSGAP_X86_DISPATCH
  return TileProduct({detail::tile_bfloat16<1>, detail::tile_bfloat16<2>, detail::tile_bfloat16<3>});
#else
  return TileProduct({nullptr});
#endif
}

}  // namespace bsgap
