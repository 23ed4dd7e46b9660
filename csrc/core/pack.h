// Reading a matrix of any dtype and strides into the panels of tile_product.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "isa.h"
#include "matrix_view.h"
#include "simd.h"
#include "tile_bfloat16.h"
#include "tile_product.h"

namespace bsgap {

// X read as value * 2^exponent - mean of its feature, the mean in two parts (value * 2^exponent - mean) -
// rest; observations run along the rows of the matrix. features on the side: X = A (G is cols x cols); else X
// = A^T (G is rows x rows).
struct GramSource {
  MatrixView x;                           // depth x side
  const double* mean_by_side = nullptr;   // subtracted per column of x (features on the side), or
  const double* mean_by_depth = nullptr;  // subtracted per row of x (features along the depth)
  const double* rest = nullptr;           // of the mean, per feature likewise; not null where one of these is
  double scale = 1.0;                     // a power of two
  Upcoming next;                          // what the caller reads after this matrix

  // Whether values are taken as they are.
  bool plain() const { return scale == 1.0 && !mean_by_side && !mean_by_depth; }
};

namespace detail {

// 4 x 4 numbers of a panel, or 2 x 2 doubles, from columns that are contiguous, `cs` apart, transposed in
// registers of 16 bytes.
template <class Acc>
[[gnu::always_inline]] inline void transpose_block(const Acc* in, int64_t cs, Acc* out) {
  using V = Simd<Acc, 16>;
  using Vector = typename V::Vector;
  constexpr int64_t kWidth = kPanelCols<Acc>;
  const Vector a = V::load(in), b = V::load(in + cs);
  if constexpr (V::kLanes == 2) {
    V::store(out, Vector{a[0], b[0]});
    V::store(out + kWidth, Vector{a[1], b[1]});
  } else {
    const Vector c = V::load(in + 2 * cs), d = V::load(in + 3 * cs);
    const Vector ab0{a[0], b[0], a[1], b[1]}, ab1{a[2], b[2], a[3], b[3]};
    const Vector cd0{c[0], d[0], c[1], d[1]}, cd1{c[2], d[2], c[3], d[3]};
    V::store(out, Vector{ab0[0], ab0[1], cd0[0], cd0[1]});
    V::store(out + kWidth, Vector{ab0[2], ab0[3], cd0[2], cd0[3]});
    V::store(out + 2 * kWidth, Vector{ab1[0], ab1[1], cd1[0], cd1[1]});
    V::store(out + 3 * kWidth, Vector{ab1[2], ab1[3], cd1[2], cd1[3]});
  }
}

// One panel: `depth` rows with strides rs, `cols` <= kPanelCols columns with strides cs; the rest is zero.
template <class Acc, class In>
[[gnu::always_inline]] inline void pack_plain_body(const In* in, int64_t rs, int64_t cs, int64_t depth,
                                                   int64_t cols, Acc* out) {
  constexpr int64_t kWidth = kPanelCols<Acc>;
  if (cols == kWidth && cs == 1) {
    for (int64_t p = 0; p < depth; ++p)
#pragma omp simd
      for (int64_t c = 0; c < kWidth; ++c) out[p * kWidth + c] = static_cast<Acc>(load(in + p * rs + c));
    return;
  }
  // Columns are read along the depth, some lines of the panel at a time, so that these stay in cache.
  constexpr int64_t kRows = 32;
  int64_t first = 0;
  if constexpr (std::is_same_v<Acc, In>) {
    constexpr int64_t kLanes = Simd<Acc, 16>::kLanes;
    if (cols == kWidth && rs == 1)
      for (; first + kRows <= depth; first += kRows)
        for (int64_t c = 0; c < kWidth; c += kLanes)
          for (int64_t p = first; p < first + kRows; p += kLanes)
            transpose_block(in + p + c * cs, cs, out + p * kWidth + c);
  }
  for (; first < depth; first += kRows) {
    const int64_t last = std::min(depth, first + kRows);
    for (int64_t c = 0; c < cols; ++c)
      for (int64_t p = first; p < last; ++p)
        out[p * kWidth + c] = static_cast<Acc>(load(in + p * rs + c * cs));
    for (int64_t c = cols; c < kWidth; ++c)
      for (int64_t p = first; p < last; ++p) out[p * kWidth + c] = Acc(0);
  }
}
BSGAP_PER_ISA_TEMPLATE((class Acc, class In), void, pack_plain,
                       (const In* in, int64_t rs, int64_t cs, int64_t depth, int64_t cols, Acc* out),
                       (in, rs, cs, depth, cols, out))

// The same of (in * scale - mean) - rest, formed in double. mean, rest: one by column or by row of the panel,
// strides 0 or 1.
template <class Acc, class In>
[[gnu::always_inline]] inline void pack_shifted_body(const In* in, int64_t rs, int64_t cs, int64_t depth,
                                                     int64_t cols, double scale, const double* mean,
                                                     const double* rest, int64_t mean_rs, int64_t mean_cs,
                                                     Acc* out) {
  constexpr int64_t kWidth = kPanelCols<Acc>;
  for (int64_t p = 0; p < depth; ++p) {
    for (int64_t c = 0; c < cols; ++c) {
      const double scaled = load(in + p * rs + c * cs) * scale;
      const int64_t feature = p * mean_rs + c * mean_cs;
      out[p * kWidth + c] = static_cast<Acc>((scaled - mean[feature]) - rest[feature]);
    }
    for (int64_t c = cols; c < kWidth; ++c) out[p * kWidth + c] = Acc(0);
  }
}
BSGAP_PER_ISA_TEMPLATE((class Acc, class In), void, pack_shifted,
                       (const In* in, int64_t rs, int64_t cs, int64_t depth, int64_t cols, double scale,
                        const double* mean, const double* rest, int64_t mean_rs, int64_t mean_cs, Acc* out),
                       (in, rs, cs, depth, cols, scale, mean, rest, mean_rs, mean_cs, out))

// Rows [p0, p0 + depth) x columns [j0, j0 + kPanelCols) of the source as one panel.
template <class Acc>
void pack(const GramSource& s, int64_t p0, int64_t depth, int64_t j0, Acc* out) {
  static constexpr double kZero = 0.0;
  constexpr int64_t kWidth = kPanelCols<Acc>;
  const int64_t cols = std::min(kWidth, s.x.cols - j0), cs = s.x.col_stride;
  with_pointer(s.x, [&](auto* base) {
    for (int64_t p = p0; p < p0 + depth;) {  // one run of equal strides after the other
      const int64_t rows = std::min(p0 + depth - p, s.x.rows_to_next_group(p));
      auto* in = base + s.x.row_offset(p) + j0 * cs;
      Acc* to = out + (p - p0) * kWidth;
      if (s.plain()) {
        pack_plain(in, s.x.row_stride, cs, rows, cols, to);
      } else {
        const bool by_side = s.mean_by_side, by_depth = s.mean_by_depth;
        const int64_t feature = by_side ? j0 : p;
        const double* mean = by_side ? s.mean_by_side + j0 : by_depth ? s.mean_by_depth + p : &kZero;
        const double* rest = by_side || by_depth ? s.rest + feature : &kZero;
        pack_shifted(in, s.x.row_stride, cs, rows, cols, s.scale, mean, rest, by_depth, by_side, to);
      }
      p += rows;
    }
  });
}

// Pairs of rows of bfloat16 values, `depth` rows; an odd last one stands beside zeros.
[[gnu::always_inline]] inline void pack_pairs_body(const BFloat16Bits* in, int64_t rs, int64_t cs,
                                                   int64_t depth, int64_t cols, BFloat16Pair* out) {
  constexpr int64_t kWidth = kPanelCols<BFloat16Pair>;
  for (int64_t p = 0; p < depth; p += 2, out += kWidth) {
    const BFloat16Bits *first = in + p * rs, *second = first + rs;
    if (p + 1 < depth && cs == 1 && cols == kWidth) {
      for (int64_t c = 0; c < kWidth; ++c)
        out[c].bits = first[c].bits | static_cast<uint32_t>(second[c].bits) << 16;
      continue;
    }
    for (int64_t c = 0; c < kWidth; ++c) {
      out[c].bits = c < cols ? first[c * cs].bits : 0;
      if (c < cols && p + 1 < depth) out[c].bits |= static_cast<uint32_t>(second[c * cs].bits) << 16;
    }
  }
}
BSGAP_PER_ISA(void, pack_pairs,
              (const BFloat16Bits* in, int64_t rs, int64_t cs, int64_t depth, int64_t cols,
               BFloat16Pair* out),
              (in, rs, cs, depth, cols, out))

// Rows [p0, p0 + depth) of a plain source whose rows form one group; depth is even but at the end.
inline void pack(const GramSource& s, int64_t p0, int64_t depth, int64_t j0, BFloat16Pair* out) {
  const int64_t cols = std::min<int64_t>(kPanelCols<BFloat16Pair>, s.x.cols - j0), cs = s.x.col_stride;
  const auto* base = static_cast<const BFloat16Bits*>(s.x.data);
  pack_pairs(base + p0 * s.x.row_stride + j0 * cs, s.x.row_stride, cs, depth, cols, out);
}

// Rows [p0, p0 + depth) of the source in double, one after the other.
inline void read_rows(const GramSource& s, int64_t p0, int64_t depth, double* out) {
  constexpr int64_t kWidth = kPanelCols<double>;
  double panel[64 * kWidth];
  for (int64_t first = 0; first < depth; first += 64)
    for (int64_t j = 0; j < s.x.cols; j += kWidth) {
      const int64_t rows = std::min<int64_t>(64, depth - first), cols = std::min(kWidth, s.x.cols - j);
      pack(s, p0 + first, rows, j, panel);
      for (int64_t p = 0; p < rows; ++p)
        std::copy(panel + p * kWidth, panel + p * kWidth + cols, out + (first + p) * s.x.cols + j);
    }
}

}  // namespace detail
}  // namespace bsgap
