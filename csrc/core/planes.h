// Gram products of a matrix whose columns are contiguous in groups of rows, as the channels of NCHW images
// are: scalar products of planes. Copied as they stand, planes need no transposition, and of few columns no
// product is wasted.
//
// A vector lane sums every kLanes-th product, so lanes take sums as short as those of tile_product.h; they
// are added in double. Entries round no more often than gram_roundings (gram.h) says: lanes are at most 16
// more additions, and sums of the same length come kLanes times less often.
#pragma once

#include <algorithm>
#include <cstdint>

#include "buffer.h"
#include "isa.h"
#include "matrix_view.h"
#include "panel_sums.h"
#include "simd.h"
#include "tile_product.h"

namespace bsgap {

namespace detail {

inline constexpr int kPlaneBlock = 4;  // planes that are multiplied with as many others in registers
template <class T>
inline constexpr int64_t kPlaneLanes = 64 / static_cast<int64_t>(sizeof(T));

// Row sums of a block of planes against kCols others from column `col` on; kTriangle: with themselves, lower
// triangle only. Two vectors of 32 bytes do what one of 64 does, in the same order; a lane sums float32 in
// chains as tile_product.h does.
template <class T, int kVectorBytes, int kRows, int kCols, bool kTriangle>
[[gnu::always_inline]] inline void plane_block(const T* a, const T* b, int64_t stride, int64_t depth, int col,
                                               double* sums, int ld) {
  using V = Simd<T, kVectorBytes>;
  using Vector = typename V::Vector;
  constexpr int kLanes = V::kLanes;
  constexpr int64_t kStep = kPlaneLanes<T>, kChain = kTwoLevels<T> ? kChainRows * kStep : INT64_MAX / 2;
  double total[kRows][kCols] = {};
  alignas(kVectorBytes) T lanes[kRows * kCols * kLanes];
  T* kept = lanes;
  asm("" : "+r"(kept));  // in memory: the registers are for the products
  for (int64_t part = 0; part < kStep; part += kLanes) {
    for (int64_t first = part; first < depth; first += kChain) {
      Vector sum[kRows][kCols] = {};
      for (int64_t p = first; p < std::min(depth, first + kChain); p += kStep) {
        Vector bv[kCols];
        for (int j = 0; j < kCols; ++j) bv[j] = V::load(b + (col + j) * stride + p);
        for (int i = 0; i < kRows; ++i) {
          const Vector av = kTriangle ? bv[i < kCols ? i : 0] : V::load(a + i * stride + p);
          for (int j = 0; j < kCols; ++j)
            if (!kTriangle || j <= i) sum[i][j] += av * bv[j];
        }
      }
      for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kCols; ++j)
          if (!kTriangle || j <= i) {
            T* out = kept + (i * kCols + j) * kLanes;
            V::store(out, first > part ? V::load(out) + sum[i][j] : sum[i][j]);
          }
    }
    asm("" : "+m"(lanes) : "r"(kept));
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kCols; ++j)
        if (!kTriangle || j <= i) {
          double sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int l = 0; l < kLanes; ++l) sum += static_cast<double>(lanes[(i * kCols + j) * kLanes + l]);
          total[i][j] += sum;
        }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kCols; ++j)
      if (!kTriangle || j <= i) sums[i * ld + col + j] = total[i][j];
}

// Planes [i0, i0 + 4) with [j0, j0 + 4): all products, or the lower triangle where i0 == j0.
template <class T, int kVectorBytes, bool kTriangle>
[[gnu::always_inline]] inline void plane_tile_body(const T* a, const T* b, int64_t stride, int64_t depth,
                                                   double* sums) {
  constexpr int kCols = kTriangle || kVectorBytes == 64 ? kPlaneBlock : 2;
  for (int col = 0; col < kPlaneBlock; col += kCols)
    plane_block<T, kVectorBytes, kPlaneBlock, kCols, kTriangle>(a, b, stride, depth, col, sums, kPlaneBlock);
}

// All products of six planes, as LeNet's first layer has: 21 sums fit the registers of AVX-512, elsewhere
// they are formed in three parts.
inline constexpr int kFewPlanes = 6;
template <class T, int kVectorBytes>
[[gnu::always_inline]] inline void few_planes_body(const T* a, int64_t stride, int64_t depth, double* sums) {
  if constexpr (kVectorBytes == 64) {
    plane_block<T, kVectorBytes, kFewPlanes, kFewPlanes, true>(a, a, stride, depth, 0, sums, kFewPlanes);
  } else {
    constexpr int kHalf = kFewPlanes / 2;
    const T* second = a + kHalf * stride;
    double* below = sums + kHalf * kFewPlanes;
    plane_block<T, kVectorBytes, kHalf, kHalf, true>(a, a, stride, depth, 0, sums, kFewPlanes);
    plane_block<T, kVectorBytes, kHalf, kHalf, false>(second, a, stride, depth, 0, below, kFewPlanes);
    plane_block<T, kVectorBytes, kHalf, kHalf, true>(second, second, stride, depth, 0, below + kHalf,
                                                     kFewPlanes);
  }
}

template <class T>
struct PlaneProduct {
  void (*square)(const T*, const T*, int64_t, int64_t, double*);
  void (*triangle)(const T*, const T*, int64_t, int64_t, double*);
  void (*few)(const T*, int64_t, int64_t, double*);
};

#if BSGAP_X86_DISPATCH
template <class T, bool kTriangle>
BSGAP_AVX512 inline void plane_tile_avx512(const T* a, const T* b, int64_t stride, int64_t depth, double* s) {
  plane_tile_body<T, 64, kTriangle>(a, b, stride, depth, s);
}
template <class T, bool kTriangle>
BSGAP_AVX2 inline void plane_tile_avx2(const T* a, const T* b, int64_t stride, int64_t depth, double* s) {
  plane_tile_body<T, 32, kTriangle>(a, b, stride, depth, s);
}
template <class T>
BSGAP_AVX512 inline void few_planes_avx512(const T* a, int64_t stride, int64_t depth, double* s) {
  few_planes_body<T, 64>(a, stride, depth, s);
}
template <class T>
BSGAP_AVX2 inline void few_planes_avx2(const T* a, int64_t stride, int64_t depth, double* s) {
  few_planes_body<T, 32>(a, stride, depth, s);
}
#endif
template <class T, bool kTriangle>
inline void plane_tile_generic(const T* a, const T* b, int64_t stride, int64_t depth, double* s) {
  plane_tile_body<T, 16, kTriangle>(a, b, stride, depth, s);
}
template <class T>
inline void few_planes_generic(const T* a, int64_t stride, int64_t depth, double* s) {
  few_planes_body<T, 16>(a, stride, depth, s);
}

template <class T>
PlaneProduct<T> plane_product() {
#if BSGAP_X86_DISPATCH
  if (instruction_set() == Isa::kAvx512)
    return {plane_tile_avx512<T, false>, plane_tile_avx512<T, true>, few_planes_avx512<T>};
  if (instruction_set() == Isa::kAvx2)
    return {plane_tile_avx2<T, false>, plane_tile_avx2<T, true>, few_planes_avx2<T>};
#endif
  return {plane_tile_generic<T, false>, plane_tile_generic<T, true>, few_planes_generic<T>};
}

template <class T, class In>
[[gnu::always_inline]] inline void copy_plane_body(const In* in, int64_t count, T* out) {
#pragma omp simd
  for (int64_t p = 0; p < count; ++p) out[p] = static_cast<T>(load(in + p));
}
BSGAP_PER_ISA_TEMPLATE((class T, class In), void, copy_plane, (const In* in, int64_t count, T* out),
                       (in, count, out))

// Adds rows [begin, end) of X, whose columns are contiguous, to the lower triangle of g, and to column_sums
// if given. sum_rows: products that a lane may sum.
template <class T>
void add_planes(const MatrixView& x, int64_t begin, int64_t end, int64_t sum_rows, double* g,
                double* column_sums) {
  constexpr int64_t kStep = kPlaneLanes<T>;
  const int64_t side = x.cols;
  const bool few = side <= kFewPlanes;
  const int64_t block = few ? kFewPlanes : kPlaneBlock, planes = (side + block - 1) / block * block;
  // What is multiplied stays in the second-level cache.
  constexpr int64_t kCachedBytes = int64_t{256} << 10;
  const int64_t fitting = kCachedBytes / (planes * static_cast<int64_t>(sizeof(T))) / kStep * kStep;
  const int64_t rounded = (end - begin + kStep - 1) / kStep * kStep;
  const int64_t capacity = std::min(std::clamp(fitting, 16 * kStep, sum_rows * kStep), rounded);
  Buffer<T> copied(planes * capacity);
  std::fill(copied.data() + side * capacity, copied.data() + planes * capacity, T(0));
  const PlaneProduct<T> product = plane_product<T>();
  for (int64_t p = begin; p < end; p += capacity) {
    const int64_t rows = std::min(capacity, end - p), depth = (rows + kStep - 1) / kStep * kStep;
    with_pointer(x, [&](auto* base) {
      for (int64_t q = p; q < p + rows;) {
        const int64_t run = std::min(p + rows - q, x.rows_to_next_group(q));
        for (int64_t c = 0; c < side; ++c)
          copy_plane(base + x.row_offset(q) + c * x.col_stride, run, copied.data() + c * capacity + (q - p));
        q += run;
      }
    });
    for (int64_t c = 0; c < side; ++c)
      std::fill(copied.data() + c * capacity + rows, copied.data() + c * capacity + depth, T(0));
    if (column_sums)
      for (int64_t c = 0; c < side; ++c) add_plane_sum(copied.data() + c * capacity, depth, column_sums + c);
    double sums[kFewPlanes * kFewPlanes];
    const auto add = [&](int64_t i0, int64_t j0) {
      for (int64_t i = i0; i < std::min(side, i0 + block); ++i)
        for (int64_t j = j0; j < std::min(i + 1, j0 + block); ++j)
          g[i * side + j] += sums[(i - i0) * block + j - j0];
    };
    if (few) {
      product.few(copied.data(), capacity, depth, sums);
      add(0, 0);
      continue;
    }
    for (int64_t i = 0; i < planes; i += block)
      for (int64_t j = 0; j <= i; j += block) {
        const T *a = copied.data() + i * capacity, *b = copied.data() + j * capacity;
        (i == j ? product.triangle : product.square)(a, b, capacity, depth, sums);
        add(i, j);
      }
  }
}

}  // namespace detail
}  // namespace bsgap
