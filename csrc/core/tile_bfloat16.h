// Products of bfloat16 numbers by the instruction that takes two at a time (AVX512-BF16), at twice the rate
// of float32. Products are exact and sums are float32, as where bfloat16 is widened first; subnormals count
// as zero.
#pragma once

#include <cstdint>
#include <cstring>

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
__attribute__((target("avx512f,avx512dq,avx512bf16,fma,prefer-vector-width=512"))) inline void tile_bfloat16(
    const TileOperands<BFloat16Pair>& t) {
  constexpr int kWidth = kPanelCols<BFloat16Pair>;
  __m512 sum[kTileRows][kPanels];
  for (int i = 0; i < kTileRows; ++i)
    for (int v = 0; v < kPanels; ++v) sum[i][v] = _mm512_setzero_ps();
  const char* ahead = t.ahead ? t.ahead : reinterpret_cast<const char*>(t.b);
  const int64_t ahead_step = t.ahead ? kPanelBytes : 0;
  for (int64_t p = 0; p < t.depth * kWidth; p += kWidth) {
    __builtin_prefetch(ahead);
    ahead += ahead_step;
    __m512i b[kPanels];
    for (int v = 0; v < kPanels; ++v) b[v] = _mm512_loadu_si512(t.b + v * t.b_stride + p);
    for (int i = 0; i < kTileRows; ++i) {
      const __m512i a = _mm512_set1_epi32(static_cast<int>(t.a[p + i].bits));
      for (int v = 0; v < kPanels; ++v) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], (__m512bh)a, (__m512bh)b[v]);
    }
  }
  float sums[kTileRows][kPanels * kWidth];
  std::memcpy(sums, sum, sizeof sums);
  add_sums<64, false>(sums, t.c, t.ld, t.rows, t.cols);
}

}  // namespace detail
#endif

// Without kernels where has_bfloat16_products() is false.
template <>
template <>
inline TileProduct<BFloat16Pair> TileProduct<BFloat16Pair>::select<false>() {
  TileProduct product;
#if BSGAP_X86_DISPATCH
  product.set(detail::tile_bfloat16<1>, detail::tile_bfloat16<2>, detail::tile_bfloat16<3>);
#endif
  return product;
}

}  // namespace bsgap
