// Register-tiled product of packed panels: C[i][j] += sum_p a[p][i] * b[p][j], or -=.
// The Gram matrix and every update of the LDL^T factorisation stand on it.
//
// A panel holds kPanelCols columns, one cache line a row: element (p, c) at p * kPanelCols + c. A tile is
// kTileRows rows, taken from one panel, times up to kTilePanels panels whose columns stand in vector
// registers. Register blocks leave the accumulators in registers: AVX-512 has 32 (8 x 3 accumulators + 3 +
// broadcast), AVX2 has 16 (4 x 3 + 3 + 1).
// Sums are formed in T from zero and then added to C in double, so one call costs an entry of C at most
// depth + 1 roundings.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "isa.h"
#include "simd.h"

namespace bsgap {

// One tile size for all instruction sets keeps the packed layout and the summation order, hence the
// results, the same up to the use of fused multiply-add.
inline constexpr int kTileRows = 8;
inline constexpr int kTilePanels = 3;
inline constexpr int kPanelBytes = 64;
template <class T>
inline constexpr int kPanelCols = static_cast<int>(kPanelBytes / sizeof(T));
template <class T>
inline constexpr int kTileCols = kTilePanels * kPanelCols<T>;

template <class T>
struct TileOperands {
  int64_t depth;
  const T* a;                   // rows i of the tile: a[p * kPanelCols + i]
  const T* b;                   // panels side by side: b[v * b_stride + p * kPanelCols + c]
  int64_t b_stride;             // between panels
  double* c;                    // corner of the tile
  int64_t ld;                   // leading dimension of c
  int64_t rows;                 // of the tile that belong to C: all of them if there are more
  int64_t cols;                 // likewise
  const char* ahead = nullptr;  // depth cache lines that will be read later, asked for meanwhile; or none
};

namespace detail {

// Rows of one float32 sum in registers, and of the outer loop of every tile.
//
// One chain of c additions can lose c - 1 of its terms. Sums of 128 rows are therefore formed in two levels,
// eight chains of 16 added up in float32: a term goes through at most 16 + 7 roundings.
inline constexpr int64_t kChainRows = 16;
template <class T>
inline constexpr bool kTwoLevels = sizeof(T) == 4;

// C += sums or -= in double, for the rows and columns of a block that belong to C.
template <bool kSubtract, class Sum, int kRows, int kCols>
[[gnu::always_inline]] inline void add_sums(const Sum (&sums)[kRows][kCols], double* c, int64_t ld,
                                            int64_t rows_of_c, int64_t cols_of_c) {
  const int64_t rows = std::min<int64_t>(kRows, rows_of_c);
  const auto add = [&](int64_t cols) __attribute__((always_inline)) {
    for (int64_t i = 0; i < rows; ++i) {
      double* out = c + i * ld;
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j) {
        const double sum = static_cast<double>(sums[i][j]);
        out[j] = kSubtract ? out[j] - sum : out[j] + sum;
      }
    }
  };
  // A number of columns that the compiler knows takes no loop for what is left over.
  if (cols_of_c >= kCols) {
    add(kCols);
  } else {
    add(cols_of_c);
  }
}

// Adds (or subtracts) the sums of kRows rows x kVectors vectors to C. row, col: of the block within the tile.
template <class T, int kVectorBytes, int kRows, int kVectors, bool kSubtract>
[[gnu::always_inline]] inline void tile_block(const TileOperands<T>& t, int row, int col) {
  using V = Simd<T, kVectorBytes>;
  using Vector = typename V::Vector;
  constexpr int kLanes = V::kLanes, kWidth = kPanelCols<T>, kCols = kVectors * kLanes;
  const T* b[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const int first = col + v * kLanes;
    b[v] = t.b + first / kWidth * t.b_stride + first % kWidth;
  }
  const T* a = t.a + row;
  const int rows = static_cast<int>(std::min<int64_t>(kRows, t.rows - row));
  // C comes from memory while the products are formed; without this the end of a tile waits for it.
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < kCols; j += kPanelCols<double>)
      __builtin_prefetch(t.c + (row + i) * t.ld + col + j, 1);
  const char* ahead = row == 0 && col == 0 ? t.ahead : nullptr;
  alignas(kVectorBytes) T sums[kRows][kCols];
  T* kept = &sums[0][0];
  asm("" : "+r"(kept));  // in memory: the registers are for the products
  Vector sum[kRows][kVectors] = {};
  for (int64_t first = 0; first < t.depth; first += kChainRows) {
    const int64_t last = std::min(t.depth, first + kChainRows);
    if (ahead)
      for (int64_t p = first; p < last; ++p) __builtin_prefetch(ahead + p * kPanelBytes);
    for (int64_t p = first * kWidth; p < last * kWidth; p += kWidth) {
      Vector bv[kVectors];
      for (int v = 0; v < kVectors; ++v) bv[v] = V::load(b[v] + p);
      for (int i = 0; i < kRows; ++i) {
        const T ai = a[p + i];
        for (int v = 0; v < kVectors; ++v) sum[i][v] += ai * bv[v];
      }
    }
    if (kTwoLevels<T> || last == t.depth)
      for (int i = 0; i < kRows; ++i)
        for (int v = 0; v < kVectors; ++v) {
          T* out = kept + i * kCols + v * kLanes;
          V::store(out, kTwoLevels<T> && first > 0 ? V::load(out) + sum[i][v] : sum[i][v]);
          if (kTwoLevels<T>) sum[i][v] = Vector{};
        }
  }
  asm("" : "+m"(sums) : "r"(kept));
  add_sums<kSubtract>(sums, t.c + row * t.ld + col, t.ld, t.rows - row, t.cols - col);
}

// kVectors columns of vectors from column `col` of the tile on, cut into blocks of kRows rows and up to three
// vectors; a single one takes all rows at once, or its products would wait for each other.
template <class T, int kVectorBytes, int kRows, int kVectors, bool kSubtract>
[[gnu::always_inline]] inline void tile_columns(const TileOperands<T>& t, int col = 0) {
  constexpr int kTaken = kVectors % 3 == 0 || kVectors == 5 ? 3 : kVectors % 2 == 0 ? 2 : 1;
  constexpr int kBlockRows = kTaken == 1 ? kTileRows : kRows;
  for (int row = 0; row < kTileRows; row += kBlockRows)
    tile_block<T, kVectorBytes, kBlockRows, kTaken, kSubtract>(t, row, col);
  if constexpr (kVectors > kTaken)
    tile_columns<T, kVectorBytes, kRows, kVectors - kTaken, kSubtract>(
        t, col + kTaken * Simd<T, kVectorBytes>::kLanes);
}

#if BSGAP_X86_DISPATCH
template <class T, int kVectors, bool kSubtract>
BSGAP_AVX512 inline void tile_avx512(const TileOperands<T>& t) {
  tile_columns<T, 64, 8, kVectors, kSubtract>(t);
}
template <class T, int kVectors, bool kSubtract>
BSGAP_AVX2 inline void tile_avx2(const TileOperands<T>& t) {
  tile_columns<T, 32, 4, kVectors, kSubtract>(t);
}
#endif
template <class T, int kVectors, bool kSubtract>
inline void tile_generic(const TileOperands<T>& t) {
  tile_columns<T, 16, 4, kVectors, kSubtract>(t);
}

}  // namespace detail

// What a packed number means: the type of its sums, and how many rows of X it holds.
template <class T>
struct PackedNumber {
  using Sum = T;
  static constexpr int64_t kRows = 1;
};

// The tile kernels of this processor, by the number of columns.
template <class T>
class TileProduct {
 public:
  template <bool kSubtract>
  static TileProduct select() {
    using namespace detail;
#if BSGAP_X86_DISPATCH
    static const Isa isa = instruction_set();
    if (isa == Isa::kAvx512)
      return TileProduct(
          {tile_avx512<T, 1, kSubtract>, tile_avx512<T, 2, kSubtract>, tile_avx512<T, 3, kSubtract>});
    if (isa == Isa::kAvx2)
      return TileProduct({tile_avx2<T, 1, kSubtract>, tile_avx2<T, 2, kSubtract>, tile_avx2<T, 3, kSubtract>,
                          tile_avx2<T, 4, kSubtract>, tile_avx2<T, 5, kSubtract>,
                          tile_avx2<T, 6, kSubtract>});
#endif
    return TileProduct(
        {tile_generic<T, 4, kSubtract>, tile_generic<T, 8, kSubtract>, tile_generic<T, 12, kSubtract>});
  }

  // One tile of the lower triangle of a matrix whose corner is c: rows from i0 to `end`, columns from j0 on.
  // Columns up to the last row's diagonal are worked on, and more below `width` to the next vector or panel:
  // what lands above the diagonal is nobody's.
  void lower_triangle(int64_t depth, const T* a, const T* b, int64_t b_stride, double* c, int64_t ld,
                      int64_t i0, int64_t j0, int64_t end, int64_t width, const char* ahead = nullptr) const {
    const int64_t rows = std::min<int64_t>(kTileRows, end - i0);
    kernel(i0 + rows - j0)({depth, a, b, b_stride, c + i0 * ld + j0, ld, rows, width - j0, ahead});
  }

  // One whole tile of one panel.
  void tile(int64_t depth, const T* a, const T* b, double* c, int64_t ld) const {
    kernel(kPanelCols<T>)({depth, a, b, 0, c, ld, kTileRows, kPanelCols<T>});
  }

 private:
  using Kernel = void (*)(const TileOperands<T>&);
  static constexpr int64_t kMostKernels = 6;

  // Kernels for columns up to each `kernels.size()`-th part of a tile's.
  explicit TileProduct(std::initializer_list<Kernel> kernels)
      : step_(kTileCols<T> / static_cast<int64_t>(kernels.size())) {
    std::copy(kernels.begin(), kernels.end(), kernels_);
  }
  Kernel kernel(int64_t cols) const {
    return kernels_[(std::min<int64_t>(cols, kTileCols<T>) + step_ - 1) / step_ - 1];
  }

  int64_t step_;
  Kernel kernels_[kMostKernels] = {};
};

}  // namespace bsgap
