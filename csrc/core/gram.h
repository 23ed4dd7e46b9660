// Gram matrices with an error bound: G = X^T X, X one side of the activation matrix.
//
// Work is cut into chunks of kChunk rows of X. Inside a chunk products are summed in registers in
// Acc (double, or float for the cheap path); chunks are added in float64. Every entry therefore goes
// through at most kChunk + chunks + slabs roundings, in an order that depends on the shape only:
// results do not change with the number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "matrix_view.h"
#include "parallel.h"
#include "rounding.h"
#include "tile_product.h"

namespace bsgap {

enum class GramPrecision { kFloat64, kFloat32 };

// X read as (value - mean_of_its_feature) * 2^exponent; observations run along `rows`.
// features == true: X = A (G is cols x cols); false: X = A^T (G is rows x rows).
struct GramSource {
  MatrixView x;                           // depth x side
  const double* mean_by_side = nullptr;   // subtracted per column of x (features on the side), or
  const double* mean_by_depth = nullptr;  // subtracted per row of x (features along the depth)
  double scale = 1.0;                     // a power of two
};

namespace detail {

inline constexpr int64_t kChunk = 256;      // rows of X summed in one register accumulation
inline constexpr int64_t kBlock = 96;       // side of the block of G one work item owns (LCM of the tiles)
inline constexpr int64_t kSlabRows = 8192;  // a narrow G is summed in row slabs, for parallelism

// Packs rows [p0, p0 + depth) x columns [j0, j0 + count) of the source into panels of `width`
// columns, zero-padded: out[panel][p][c].
template <class Acc>
void pack(const GramSource& s, int64_t p0, int64_t depth, int64_t j0, int64_t count, int64_t width,
          Acc* out) {
  with_pointer(s.x, [&](auto* base) {
    const int64_t rs = s.x.row_stride, cs = s.x.col_stride;
    const bool plain = s.scale == 1.0 && !s.mean_by_side && !s.mean_by_depth;
    for (int64_t c0 = 0; c0 < count; c0 += width) {
      const int64_t cols = std::min(width, count - c0);
      if (cols < width) std::fill(out, out + depth * width, Acc(0));
      const auto value = [&](int64_t p, int64_t c) {
        double v = load(base + (p0 + p) * rs + (j0 + c0 + c) * cs);
        v *= s.scale;
        if (s.mean_by_side) v -= s.mean_by_side[j0 + c0 + c];
        if (s.mean_by_depth) v -= s.mean_by_depth[p0 + p];
        return static_cast<Acc>(v);
      };
      if (plain && cs == 1) {
        for (int64_t p = 0; p < depth; ++p) {
          auto* in = base + (p0 + p) * rs + j0 + c0;
          for (int64_t c = 0; c < cols; ++c) out[p * width + c] = static_cast<Acc>(load(in + c));
        }
      } else if (plain) {
        for (int64_t c = 0; c < cols; ++c) {
          auto* in = base + p0 * rs + (j0 + c0 + c) * cs;
          for (int64_t p = 0; p < depth; ++p) out[p * width + c] = static_cast<Acc>(load(in + p * rs));
        }
      } else {
        for (int64_t p = 0; p < depth; ++p)
          for (int64_t c = 0; c < cols; ++c) out[p * width + c] = value(p, c);
      }
      out += depth * width;
    }
  });
}

// Packed rows of X stay below this many bytes, so that they are read from cache by every block.
inline constexpr int64_t kPackedBytes = int64_t{8} << 20;

// Adds X^T X over rows [begin, end) to the lower triangle of g (side x side). Rows are packed once, in
// panels of kTileCols columns that serve as both factors, then the blocks of g are worked on.
template <class Acc>
void add_gram(const GramSource& s, int64_t begin, int64_t end, double* g, const ParallelFor& parallel) {
  constexpr int64_t kCols = kTileCols<Acc>;
  const int64_t side = s.x.cols, panels = (side + kCols - 1) / kCols;
  const int64_t fitting = kPackedBytes / (panels * kCols * static_cast<int64_t>(sizeof(Acc)));
  const int64_t packed_rows = std::min(std::max(fitting / kChunk, int64_t{1}) * kChunk, end - begin);
  const int64_t blocks = (side + kBlock - 1) / kBlock, pairs = blocks * (blocks + 1) / 2;
  const TileProduct<Acc> product = tile_product<Acc, false>();
  PackedBuffer<Acc> packed(panels * kCols * packed_rows);
  for (int64_t p0 = begin; p0 < end; p0 += packed_rows) {
    const int64_t rows = std::min(packed_rows, end - p0);
    const auto panel_at = [&](int64_t panel, int64_t row) {
      return packed.data() + (panel * packed_rows + row) * kCols;
    };
    parallel(panels, [&](int64_t panel) {
      ScopedIeee ieee;
      const int64_t j0 = panel * kCols;
      pack(s, p0, rows, j0, std::min(kCols, side - j0), kCols, panel_at(panel, 0));
    });
    parallel(pairs, [&](int64_t pair) {
      ScopedIeee ieee;
      int64_t block_row = 0;
      while (pair > block_row) pair -= ++block_row;
      const int64_t i_begin = block_row * kBlock, i_end = std::min(side, i_begin + kBlock);
      const int64_t j_begin = pair * kBlock, j_end = std::min(side, j_begin + kBlock);
      for (int64_t row = 0; row < rows; row += kChunk) {
        const int64_t depth = std::min(kChunk, rows - row);
        for (int64_t j = j_begin; j < j_end; j += kCols)
          for (int64_t i = i_begin; i < i_end; i += kTileRows) {
            if (std::min(i + kTileRows, side) <= j) continue;  // wholly above the diagonal
            lower_triangle_tile<Acc>(product, depth, panel_at(i / kCols, row) + i % kCols, kCols,
                                     panel_at(j / kCols, row), g, side, i, j,
                                     std::min<int64_t>(kTileRows, side - i));
          }
      }
    });
  }
}

inline int64_t slab_count(int64_t depth, int64_t side) {
  const int64_t blocks = (side + kBlock - 1) / kBlock, items = blocks * (blocks + 1) / 2;
  if (items >= 8) return 1;
  return std::clamp<int64_t>(depth / kSlabRows, 1, 16);
}

}  // namespace detail

// Roundings that an entry of the float64 Gram matrix goes through (docs/certificates.md, "Gram").
inline double gram_roundings(int64_t depth, int64_t side) {
  const int64_t chunks = (depth + detail::kChunk - 1) / detail::kChunk;
  return static_cast<double>(std::min(detail::kChunk, depth) + chunks + detail::slab_count(depth, side) + 2);
}

// g: side x side, overwritten, both triangles written.
template <class Acc>
void gram_product(const GramSource& s, double* g, const ParallelFor& parallel) {
  const int64_t side = s.x.cols, depth = s.x.rows;
  const int64_t slabs = detail::slab_count(depth, side);
  const int64_t slab_rows = (depth + slabs - 1) / slabs;
  std::vector<double> partial((slabs - 1) * side * side, 0.0);
  std::fill(g, g + side * side, 0.0);
  if (slabs == 1) {
    detail::add_gram<Acc>(s, 0, depth, g, parallel);
  } else {
    parallel(slabs, [&](int64_t slab) {
      double* out = slab == 0 ? g : partial.data() + (slab - 1) * side * side;
      detail::add_gram<Acc>(s, slab * slab_rows, std::min(depth, (slab + 1) * slab_rows), out, serial_for);
    });
  }
  for (int64_t t = 0; t + 1 < slabs; ++t)
    for (int64_t i = 0; i < side * side; ++i) g[i] += partial[t * side * side + i];
  for (int64_t i = 0; i < side; ++i)
    for (int64_t j = 0; j < i; ++j) g[j * side + i] = g[i * side + j];
}

// sums[j] = sum over rows of (a_ij * scale - mean_j), chunks of kChunk rows added in float64;
// sum_of_squares likewise over all entries. At most kChunk + chunks + 2 roundings an entry.
inline void column_sums(const MatrixView& a, double scale, const double* mean, double* sums) {
  ScopedIeee ieee;
  std::vector<double> chunk(a.cols);
  std::fill(sums, sums + a.cols, 0.0);
  with_pointer(a, [&](auto* base) {
    for (int64_t i0 = 0; i0 < a.rows; i0 += detail::kChunk) {
      std::fill(chunk.begin(), chunk.end(), 0.0);
      for (int64_t i = i0; i < std::min(a.rows, i0 + detail::kChunk); ++i)
        for (int64_t j = 0; j < a.cols; ++j)
          chunk[j] += load(base + i * a.row_stride + j * a.col_stride) * scale - (mean ? mean[j] : 0.0);
      for (int64_t j = 0; j < a.cols; ++j) sums[j] += chunk[j];
    }
  });
}

// Largest finite |a_ij|; finite is false if any entry is not.
struct Magnitude {
  double largest = 0;
  bool finite = true;
};
inline Magnitude magnitude(const MatrixView& a) {
  Magnitude result;
  with_pointer(a, [&](auto* base) {
    for (int64_t i = 0; i < a.rows; ++i)
      for (int64_t j = 0; j < a.cols; ++j) {
        const double v = std::abs(static_cast<double>(load(base + i * a.row_stride + j * a.col_stride)));
        if (!(v <= std::numeric_limits<double>::max())) result.finite = false;
        result.largest = std::max(result.largest, v);
      }
  });
  return result;
}

}  // namespace bsgap
