// Register-tiled product of packed panels: acc[i][j] = sum_p a[p][i] * b[p][j].
// The Gram matrix and the trailing update of the LDL^T factorisation both stand on it.
//
// A tile is kTileRows x kTileCols with columns in vector registers. The sizes leave the accumulators
// in registers: AVX-512 has 32 (8 x 3 accumulators + 3 + broadcast), AVX2 has 16 (4 x 3 + 3 + 1).
#pragma once

#include <cstdint>
#include <cstring>

namespace bsgap {

#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
#define BSGAP_X86_DISPATCH 1
#else
#define BSGAP_X86_DISPATCH 0
#endif

// One tile size for all instruction sets keeps the packed layout and the summation order, hence the
// results of the float64 path, the same up to the use of fused multiply-add.
inline constexpr int kTileRows = 8;
template <class T>
inline constexpr int kTileCols = static_cast<int>(192 / sizeof(T));  // three 64-byte vectors

namespace detail {

template <class T, int kVectorBytes, int kRows, int kVectors>
[[gnu::always_inline]] inline void tile_block(int64_t depth, const T* a, const T* b, T* acc) {
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
  constexpr int kCols = kTileCols<T>;
  Vector sum[kRows][kVectors] = {};
  for (int64_t p = 0; p < depth; ++p) {
    Vector bv[kVectors];
    for (int v = 0; v < kVectors; ++v) std::memcpy(&bv[v], b + p * kCols + v * kLanes, kVectorBytes);
    for (int i = 0; i < kRows; ++i) {
      const T ai = a[p * kTileRows + i];
      for (int v = 0; v < kVectors; ++v) sum[i][v] += ai * bv[v];
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < kVectors; ++v) std::memcpy(acc + i * kCols + v * kLanes, &sum[i][v], kVectorBytes);
}

// The whole tile, cut into register blocks of kRows x kVectors.
template <class T, int kVectorBytes, int kRows, int kVectors>
[[gnu::always_inline]] inline void tile_all(int64_t depth, const T* a, const T* b, T* acc) {
  constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
  constexpr int kCols = kTileCols<T>;
  for (int j = 0; j < kCols; j += kVectors * kLanes)
    for (int i = 0; i < kTileRows; i += kRows)
      tile_block<T, kVectorBytes, kRows, kVectors>(depth, a + i, b + j, acc + i * kCols + j);
}

#if BSGAP_X86_DISPATCH
template <class T>
__attribute__((target("avx512f,fma"))) inline void tile_avx512(int64_t depth, const T* a, const T* b,
                                                               T* acc) {
  tile_all<T, 64, 8, 3>(depth, a, b, acc);
}
template <class T>
__attribute__((target("avx2,fma"))) inline void tile_avx2(int64_t depth, const T* a, const T* b, T* acc) {
  tile_all<T, 32, 4, 3>(depth, a, b, acc);
}
#endif
template <class T>
inline void tile_generic(int64_t depth, const T* a, const T* b, T* acc) {
  tile_all<T, 16, 4, 3>(depth, a, b, acc);
}

}  // namespace detail

// a: depth x kTileRows, b: depth x kTileCols<T>, acc: kTileRows x kTileCols<T>, all row-major.
template <class T>
using TileProduct = void (*)(int64_t depth, const T* a, const T* b, T* acc);

template <class T>
inline TileProduct<T> tile_product() {
#if BSGAP_X86_DISPATCH
  if (__builtin_cpu_supports("avx512f")) return detail::tile_avx512<T>;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return detail::tile_avx2<T>;
#endif
  return detail::tile_generic<T>;
}

inline const char* instruction_set() {
#if BSGAP_X86_DISPATCH
  if (__builtin_cpu_supports("avx512f")) return "avx512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
  return "generic";
}

}  // namespace bsgap
