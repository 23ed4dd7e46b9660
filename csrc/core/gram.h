// Gram matrices with an error bound: G = X^T X, X one side of the activation matrix.
//
// X is packed as numbers T (double, or float or pairs of bfloat16 for the cheap path). Products are summed
// over kSumRows<T> rows, float in two levels (tile_product.h); these sums are added in float64, in an order
// that depends on the shape only: results do not change with the number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "buffer.h"
#include "matrix_view.h"
#include "pack.h"
#include "panel_sums.h"
#include "parallel.h"
#include "planes.h"
#include "rounding.h"
#include "tile_product.h"

namespace bsgap {

enum class GramPrecision { kFloat64, kFloat32 };

namespace detail {

inline constexpr int64_t kChunk = 256;  // rows of X packed at a time, and summed in column sums
// Rows packed of one panel after the other, whose pages stay in the translation buffer meanwhile.
inline constexpr int64_t kRowsAtOnce = 64;
// Rows of X that are summed before float64 takes over. Shorter float sums round less; adding them up in
// double costs the time of about 8 more rows.
template <class T>
inline constexpr int64_t kSumRows = sizeof(T) == 4 ? 128 : kChunk;

// Numbers of a panel for so many rows.
template <class T>
int64_t panel_numbers(int64_t rows) {
  constexpr int64_t kRows = PackedNumber<T>::kRows;
  return (rows + kRows - 1) / kRows * kPanelCols<T>;
}

// X packed: panel j holds columns [j kPanelCols, ...) of `rows` rows.
template <class T>
struct PackedRows {
  const T* panels;
  int64_t rows;
  int64_t panel_size;  // numbers from one panel to the next

  const T* at(int64_t row, int64_t column) const {
    constexpr int64_t kWidth = kPanelCols<T>;
    return panels + column / kWidth * panel_size + row / PackedNumber<T>::kRows * kWidth + column % kWidth;
  }
};

// Adds the products of packed rows to entries [i0, i1) x [j0, j1) of the lower triangle of g (side x side).
// A strip of kTileCols columns of g stays in the second-level cache while the rows go by.
template <class T>
void add_block(const PackedRows<T>& x, const TileProduct<T>& product, double* g, int64_t side, int64_t i0,
               int64_t i1, int64_t j0, int64_t j1, Upcoming upcoming = {}) {
  constexpr int64_t kCols = kTileCols<T>;
  for (int64_t j = j0; j < j1; j += kCols)
    for (int64_t p = 0; p < x.rows; p += kSumRows<T>)
      for (int64_t i = std::max(i0, j); i < i1; i += kTileRows) {
        const int64_t depth = panel_numbers<T>(std::min(kSumRows<T>, x.rows - p)) / kPanelCols<T>;
        product.lower_triangle(depth, x.at(p, i), x.at(p, j), x.panel_size, g, side, i, j, i1, side,
                               upcoming.take(depth));
      }
}

// Up to this side every slab of rows has a Gram matrix of its own (2 MiB), past it blocks of one are shared.
inline constexpr int64_t kSlabSide = 512;
inline constexpr int64_t kMaxSlabs = 16;

// How many slabs the rows are cut into, each summed by one thread; 1: the work is shared by blocks of G.
inline int64_t slab_count(int64_t depth, int64_t side) {
  if (side > kSlabSide) return 1;
  const int64_t slabs = std::clamp<int64_t>(depth / std::max<int64_t>(1024, 8 * side), 1, kMaxSlabs);
  return slabs < 4 && side > 128 ? 1 : slabs;
}

// Channels of NCHW images are multiplied plane by plane up to this side. Other matrices of contiguous columns
// are not, so that a matrix has the same bits whatever its strides.
inline constexpr int64_t kPlaneSide = 128;

// Adds rows [begin, end) of X to the lower triangle of g, and to sums, of columns, if given; on one thread.
template <class T>
void add_slab(const GramSource& s, int64_t begin, int64_t end, double* g, double* sums) {
  ScopedIeee ieee;
  const int64_t side = s.x.cols, panels = (side + kPanelCols<T> - 1) / kPanelCols<T>;
  if constexpr (PackedNumber<T>::kRows == 1) {
    if (s.plain() && s.x.rows > s.x.group && s.x.row_stride == 1 && side <= kPlaneSide)
      return add_planes<T>(s.x, begin, end, kSumRows<T>, g, sums);
  }
  const int64_t capacity = std::min(kChunk, end - begin), panel_size = panel_numbers<T>(capacity);
  Buffer<T> packed(panels * panel_size);
  const auto product = TileProduct<T>::template select<false>();
  for (int64_t p = begin; p < end; p += capacity) {
    const int64_t rows = std::min(capacity, end - p);
    for (int64_t q = 0; q < rows; q += kRowsAtOnce)
      for (int64_t panel = 0; panel < panels; ++panel) {
        T* out = packed.data() + panel * panel_size + panel_numbers<T>(q);
        const int64_t j = panel * kPanelCols<T>, count = std::min(kRowsAtOnce, rows - q);
        pack(s, p + q, count, j, out);
        if (sums) add_panel_sums(out, count, side - j, sums + j);
      }
    const int64_t next = p + rows;
    add_block<T>({packed.data(), rows, panel_size}, product, g, side, 0, side, 0, side,
                 next < end ? s.x.upcoming(next, std::min(capacity, end - next)) : s.next);
  }
}

// Packed rows of X stay below this many bytes, so that they are read from cache by every block.
inline constexpr int64_t kPackedBytes = int64_t{16} << 20;

// Adds all of X^T X to the lower triangle of g, and column sums to sums if given. Rows are packed once, then
// the blocks of g are worked on.
template <class T>
void add_blocks(const GramSource& s, double* g, double* sums, const ParallelFor& parallel) {
  constexpr int64_t kWidth = kPanelCols<T>;
  const int64_t side = s.x.cols, depth = s.x.rows, panels = (side + kWidth - 1) / kWidth;
  const int64_t fitting = kPackedBytes / (panels * kWidth * static_cast<int64_t>(sizeof(T)));
  const int64_t capacity = std::min(std::max(fitting / kChunk, int64_t{1}) * kChunk, depth);
  // A multiple of every tile; small enough that there is work for all threads.
  const int64_t block = side < 2048 ? 96 : 192;
  const int64_t blocks = (side + block - 1) / block, pairs = blocks * (blocks + 1) / 2;
  const auto product = TileProduct<T>::template select<false>();
  const int64_t panel_size = panel_numbers<T>(capacity);
  Buffer<T> packed(panels * panel_size);
  for (int64_t p = 0; p < depth; p += capacity) {
    const int64_t rows = std::min(capacity, depth - p);
    balanced_for(panels, parallel, [&](int64_t panel) {
      ScopedIeee ieee;
      T* out = packed.data() + panel * panel_size;
      const int64_t j = panel * kWidth;
      pack(s, p, rows, j, out);
      if (sums)
        for (int64_t q = 0; q < rows; q += kChunk)
          add_panel_sums(out + panel_numbers<T>(q), std::min(kChunk, rows - q), side - j, sums + j);
    });
    balanced_for(pairs, parallel, [&](int64_t pair) {
      ScopedIeee ieee;
      int64_t i = 0;
      while (pair > i) pair -= ++i;
      add_block<T>({packed.data(), rows, panel_size}, product, g, side, i * block,
                   std::min(side, (i + 1) * block), pair * block, std::min(side, (pair + 1) * block));
    });
  }
}

}  // namespace detail

// Roundings to float32 that a product goes through in float32 sums: its chain's, and one for each further
// chain.
inline constexpr int64_t kFloat32SumRoundings =
    detail::kChainRows + detail::kSumRows<float> / detail::kChainRows - 1;

// Roundings that an entry of the float64 Gram matrix goes through (docs/certificates.md, "Gram").
inline double gram_roundings(int64_t depth, int64_t side) {
  const int64_t slabs = detail::slab_count(depth, side), slab_rows = (depth + slabs - 1) / slabs;
  const int64_t chunks = (slab_rows + detail::kChunk - 1) / detail::kChunk;
  return static_cast<double>(std::min(detail::kChunk, depth) + chunks + slabs + 2);
}

// Roundings that an entry goes through in the column sums of gram_product: at most kChunk numbers in a row,
// in up to 32 lanes (panel_sums.h), which are added up every kRowsAtOnce rows, then the slabs' sums.
inline double gram_sum_roundings(int64_t depth, int64_t side) {
  constexpr double kAddingLanes = 11;
  const int64_t slabs = detail::slab_count(depth, side), slab_rows = (depth + slabs - 1) / slabs;
  const int64_t chunks = (slab_rows + detail::kRowsAtOnce - 1) / detail::kRowsAtOnce;
  return static_cast<double>(std::min(detail::kChunk, depth) + chunks + slabs) + kAddingLanes;
}

// g: side x side, lower triangle overwritten; nothing is said of what stands above the diagonal. sums: of the
// columns of X, overwritten; may be null.
template <class T>
void gram_product(const GramSource& s, double* g, const ParallelFor& parallel, double* sums = nullptr) {
  const int64_t side = s.x.cols, depth = s.x.rows, slabs = detail::slab_count(depth, side);
  if (sums) std::fill(sums, sums + side, 0.0);
  if (slabs == 1) {
    constexpr int64_t kRows = 64,
                      kBeyond = kTileCols<T> + kTileRows;  // what tiles touch beyond the diagonal
    balanced_for((side + kRows - 1) / kRows, parallel, [&](int64_t block) {
      for (int64_t i = block * kRows; i < std::min(side, (block + 1) * kRows); ++i)
        std::fill(g + i * side, g + i * side + std::min(side, i + kBeyond), 0.0);
    });
    if (side <= 128) {
      detail::add_slab<T>(s, 0, depth, g, sums);
    } else {
      detail::add_blocks<T>(s, g, sums, parallel);
    }
    return;
  }
  const int64_t slab_rows = (depth + slabs - 1) / slabs;
  Buffer<double> partial(slabs * side * side), partial_sums(sums ? slabs * side : 0);
  balanced_for(slabs, parallel, [&](int64_t slab) {
    double *out = partial.data() + slab * side * side,
           *own = sums ? partial_sums.data() + slab * side : nullptr;
    std::fill(out, out + side * side, 0.0);
    if (own) std::fill(own, own + side, 0.0);
    detail::add_slab<T>(s, slab * slab_rows, std::min(depth, (slab + 1) * slab_rows), out, own);
  });
  if (sums)
    for (int64_t i = 0; i < slabs * side; ++i) sums[i % side] += partial_sums[i];
  balanced_for((side + 31) / 32, parallel, [&](int64_t block) {
    ScopedIeee ieee;
    for (int64_t i = block * 32; i < std::min(side, (block + 1) * 32); ++i) {
      double* row = g + i * side;
      std::copy(partial.data() + i * side, partial.data() + i * side + i + 1, row);
      for (int64_t t = 1; t < slabs; ++t) {
        const double* other = partial.data() + (t * side + i) * side;
        for (int64_t j = 0; j <= i; ++j) row[j] += other[j];
      }
    }
  });
}

// Writes the upper triangle of a symmetric matrix from the lower one.
inline void mirror(double* g, int64_t n, const ParallelFor& parallel) {
  constexpr int64_t kBlock = 32;
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  balanced_for(blocks, parallel, [&](int64_t block) {
    const int64_t i0 = block * kBlock, i1 = std::min(n, i0 + kBlock);
    for (int64_t j0 = 0; j0 <= i0; j0 += kBlock)
      for (int64_t j = j0; j < std::min(i1, j0 + kBlock); ++j)
        for (int64_t i = std::max(i0, j + 1); i < i1; ++i) g[j * n + i] = g[i * n + j];
  });
}

// Roundings that an entry goes through in column_sums.
inline double column_sum_roundings(int64_t rows) {
  return static_cast<double>(std::min(detail::kChunk, rows) + (rows + detail::kChunk - 1) / detail::kChunk +
                             2);
}

// sums[j] = sum over rows of (a_ij * scale - mean_j) - rest_j, chunks of kChunk rows added in float64; mean
// and rest may be null.
inline void column_sums(const MatrixView& a, double scale, const double* mean, const double* rest,
                        double* sums) {
  ScopedIeee ieee;
  std::vector<double> chunk(a.cols);
  std::fill(sums, sums + a.cols, 0.0);
  with_pointer(a, [&](auto* base) {
    for (int64_t i0 = 0; i0 < a.rows; i0 += detail::kChunk) {
      std::fill(chunk.begin(), chunk.end(), 0.0);
      for (int64_t i = i0; i < std::min(a.rows, i0 + detail::kChunk); ++i)
        for (int64_t j = 0; j < a.cols; ++j)
          chunk[j] += (load(base + a.row_offset(i) + j * a.col_stride) * scale - (mean ? mean[j] : 0.0)) -
                      (rest ? rest[j] : 0.0);
      for (int64_t j = 0; j < a.cols; ++j) sums[j] += chunk[j];
    }
  });
}

// Largest |(a_ij * scale - mean_j) - rest_j|; finite is false if any entry is not; equal_rows is true if all
// rows are the same.
struct Magnitude {
  double largest = 0;
  bool finite = true;
  bool equal_rows = true;
};
inline Magnitude magnitude(const MatrixView& a, double scale = 1.0, const double* mean = nullptr,
                           const double* rest = nullptr) {
  Magnitude result;
  with_pointer(a, [&](auto* base) {
    for (int64_t i = 0; i < a.rows; ++i)
      for (int64_t j = 0; j < a.cols; ++j) {
        const double v = load(base + a.row_offset(i) + j * a.col_stride);
        if (!(std::abs(v) <= std::numeric_limits<double>::max())) result.finite = false;
        if (v != load(base + a.row_offset(0) + j * a.col_stride)) result.equal_rows = false;
        result.largest =
            std::max(result.largest, std::abs((v * scale - (mean ? mean[j] : 0.0)) - (rest ? rest[j] : 0.0)));
      }
  });
  return result;
}

}  // namespace bsgap
