// Register-tiled product of packed panels: C[i][j] += sum_p a[p][i] * b[p][j], or -=.
// The Gram matrix and the trailing update of the LDL^T factorisation both stand on it.
//
// A tile is kTileRows x kTileCols with columns in vector registers. The sizes leave the accumulators
// in registers: AVX-512 has 32 (8 x 3 accumulators + 3 + broadcast), AVX2 has 16 (4 x 3 + 3 + 1).
// Sums are formed in T from zero and then added to C in double, so one call costs an entry of C at most
// depth + 1 roundings.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>

#include "isa.h"

namespace bsgap {

// Storage for packed panels on cache-line boundaries: a tile's eight rows are then one line a step, and no
// vector load straddles two.
template <class T>
class PackedBuffer {
 public:
  explicit PackedBuffer(int64_t size)
      : data_(size > 0 ? static_cast<T*>(::operator new(static_cast<size_t>(size) * sizeof(T), kLine))
                       : nullptr) {}
  ~PackedBuffer() { ::operator delete(data_, kLine); }
  PackedBuffer(const PackedBuffer&) = delete;
  PackedBuffer& operator=(const PackedBuffer&) = delete;
  T* data() { return data_; }

 private:
  static constexpr std::align_val_t kLine{64};
  T* data_;
};

// One tile size for all instruction sets keeps the packed layout and the summation order, hence the
// results, the same up to the use of fused multiply-add.
inline constexpr int kTileRows = 8;
template <class T>
inline constexpr int kTileCols = static_cast<int>(192 / sizeof(T));  // three 64-byte vectors

namespace detail {

// Adds (or subtracts) the sums of kRows rows starting at a tile row to C, whole vectors at a time where
// all of the tile belongs to C.
template <class T, int kVectorBytes, int kRows, int kVectors, bool kSubtract>
[[gnu::always_inline]] inline void tile_block(int64_t depth, const T* a, int64_t a_stride, const T* b,
                                              double* c, int64_t ld, int64_t rows, const int64_t* cols) {
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
  constexpr int kCols = kTileCols<T>;
  typedef double Wide __attribute__((vector_size(kLanes * sizeof(double))));
  Vector sum[kRows][kVectors] = {};
  for (int64_t p = 0; p < depth; ++p) {
    Vector bv[kVectors];
    for (int v = 0; v < kVectors; ++v) std::memcpy(&bv[v], b + p * kCols + v * kLanes, kVectorBytes);
    for (int i = 0; i < kRows; ++i) {
      const T ai = a[p * a_stride + i];
      for (int v = 0; v < kVectors; ++v) sum[i][v] += ai * bv[v];
    }
  }
  for (int i = 0; i < kRows && i < rows; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      double* out = c + i * ld + v * kLanes;
      if (cols[i] >= (v + 1) * kLanes) {
        Wide old;
        std::memcpy(&old, out, sizeof old);
        const Wide wide = __builtin_convertvector(sum[i][v], Wide);
        old = kSubtract ? old - wide : old + wide;
        std::memcpy(out, &old, sizeof old);
      } else {
        for (int l = 0; l < kLanes && v * kLanes + l < cols[i]; ++l)
          out[l] = kSubtract ? out[l] - static_cast<double>(sum[i][v][l])
                             : out[l] + static_cast<double>(sum[i][v][l]);
      }
    }
  }
}

// The whole tile, cut into register blocks of kRows x kVectors.
template <class T, int kVectorBytes, int kRows, int kVectors, bool kSubtract>
[[gnu::always_inline]] inline void tile_all(int64_t depth, const T* a, int64_t a_stride, const T* b,
                                            double* c, int64_t ld, int64_t rows, const int64_t* cols) {
  constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
  for (int j = 0; j < kTileCols<T>; j += kVectors * kLanes)
    for (int i = 0; i < kTileRows; i += kRows) {
      int64_t left[kRows];
      for (int r = 0; r < kRows; ++r) left[r] = cols[i + r] - j;
      tile_block<T, kVectorBytes, kRows, kVectors, kSubtract>(depth, a + i, a_stride, b + j, c + i * ld + j,
                                                              ld, rows - i, left);
    }
}

#define BSGAP_TILE_ARGUMENTS                                                                    \
  int64_t depth, const T *a, int64_t a_stride, const T *b, double *c, int64_t ld, int64_t rows, \
      const int64_t *cols
#if BSGAP_X86_DISPATCH
template <class T, bool kSubtract>
BSGAP_AVX512 inline void tile_avx512(BSGAP_TILE_ARGUMENTS) {
  tile_all<T, 64, 8, 3, kSubtract>(depth, a, a_stride, b, c, ld, rows, cols);
}
template <class T, bool kSubtract>
BSGAP_AVX2 inline void tile_avx2(BSGAP_TILE_ARGUMENTS) {
  tile_all<T, 32, 4, 3, kSubtract>(depth, a, a_stride, b, c, ld, rows, cols);
}
#endif
template <class T, bool kSubtract>
inline void tile_generic(BSGAP_TILE_ARGUMENTS) {
  tile_all<T, 16, 4, 3, kSubtract>(depth, a, a_stride, b, c, ld, rows, cols);
}

}  // namespace detail

// a: element (p, i) at a[p * a_stride + i], kTileRows columns; b: depth x kTileCols<T>, row-major.
// c: the tile's corner, leading dimension ld. rows: rows of the tile inside C; cols[i]: columns of row i
// inside C, at most kTileCols (may be negative: none).
template <class T>
using TileProduct = void (*)(BSGAP_TILE_ARGUMENTS);
#undef BSGAP_TILE_ARGUMENTS

template <class T, bool kSubtract>
inline TileProduct<T> tile_product() {
#if BSGAP_X86_DISPATCH
  const Isa isa = instruction_set();
  if (isa == Isa::kAvx512) return detail::tile_avx512<T, kSubtract>;
  if (isa == Isa::kAvx2) return detail::tile_avx2<T, kSubtract>;
#endif
  return detail::tile_generic<T, kSubtract>;
}

// One tile of the lower triangle: row i0 + i keeps columns up to its diagonal. Positions are within a
// matrix whose corner is c.
template <class T>
inline void lower_triangle_tile(TileProduct<T> product, int64_t depth, const T* a, int64_t a_stride,
                                const T* b, double* c, int64_t ld, int64_t i0, int64_t j0, int64_t rows) {
  int64_t cols[kTileRows];
  for (int64_t i = 0; i < kTileRows; ++i) cols[i] = std::min<int64_t>(kTileCols<T>, i0 + i + 1 - j0);
  product(depth, a, a_stride, b, c + i0 * ld + j0, ld, rows, cols);
}

}  // namespace bsgap
