// Unpivoted LDL^T of G - s I for many matrices and shifts at once, sides above kSmallSide: the positive
// pivots count the eigenvalues above s. Right-looking in panels of 64 columns: one launch factors a panel,
// one updates what lies behind it. Two panels share one update of the whole trailing matrix (after the first,
// only the next panel's columns are brought up to date), which halves the traffic that bounds it: reading and
// writing the lower triangle every 128 columns is n^3 / 24 bytes, 2.9 GB at n = 4096.
//
// The bound is that of csrc/core/ldlt.h (section 3 of docs/certificates.md), which holds for any order of
// the sums: every entry of W is c_ij less at most n - 1 products, one rounding each. One thing is added: a
// pivot that comes out as zero is replaced by -p, p = sqrt(u) max_j |c_jj|. That is the exact factorisation
// of a matrix whose diagonal moved by p, so p joins the error and no second factorisation is needed.
// Negative, because an eigenvalue equal to the shift does not count; sqrt(u), because the error of a column
// of size w grows by u w^2 / p: with p = u max|c| nothing would be left of the trailing matrix.
#pragma once

#include <cfloat>

#include "large_matrix.cuh"

namespace bsgap::cuda {

namespace detail {

// Strides of shared memory, in doubles. A lane of dmma reads [lane / 4][lane % 4]: without bank conflicts
// where the stride is 4 or 12 modulo 16, with two-way ones at 2 modulo 16, which thread-per-row reads prefer.
inline constexpr int kStrip = 8;     // columns factored in registers
inline constexpr int kWStride = 66;  // W of a panel: 64 rows of the diagonal block, 64 of the block's own
inline constexpr int kLStride = 12;  // L of a strip
inline constexpr int kDepth = 32;    // columns of L and W staged at a time by the trailing update
inline constexpr int kStageStride = 36;
inline constexpr int kUpdateThreads = 128;
inline constexpr int kPackStride = 2 * kPanelColumns;

inline constexpr size_t kPanelShared =
    sizeof(double) * (2 * kPanelColumns * kWStride + kPanelColumns * kLStride + kPanelColumns);
inline constexpr size_t kUpdateShared = sizeof(double) * 2 * kPanelColumns * kStageStride;

// What a zero pivot is replaced by: never zero itself.
BSGAP_HD inline double replacement(double largest_diagonal) {
  const double p = 0x1p-26 * largest_diagonal;
  return p > DBL_MIN ? p : DBL_MIN;
}

struct alignas(16) Pair {
  double x, y;
};

}  // namespace detail

// Lower triangle of G less the shift, and zeros behind its last column, which pairs of columns reach; what
// panels add to is zeroed. Grid: (tiles of 64 rows, problems).
__global__ void __launch_bounds__(kLargeThreads, 2) ldlt_begin_kernel(LargeBatch b) {
  const LargeProblem p = large_problem(b, blockIdx.y);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kPanelColumns;
  if (first >= p.side || !p.factorisation->active) return;
  const double* g = p.matrix->task.g;
  const double shift = p.factorisation->shift;
  const bool last = first + kPanelColumns >= p.side;
  const int64_t end = last ? p.side : first + kPanelColumns, stored = last ? p.ld : end;
  for (int64_t i = first + threadIdx.x / kWarp; i < end; i += kLargeThreads / kWarp) {
    for (int64_t j = threadIdx.x % kWarp; j < stored; j += kWarp) {
      const double x = j < p.side ? g[i * p.side + j] : 0.0;
      p.work[i * p.ld + j] = i == j ? x - shift : x;
    }
    if (threadIdx.x % kWarp == 0) p.growth[i] = 0;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    p.factorisation->positive = 0;
    p.factorisation->replaced = 0;
    p.factorisation->valid = 0;
  }
}

// Panel `panel`: every block factors the 64 x 64 diagonal block for itself (a launch less, and no waiting)
// and solves 64 rows below it; W goes to its place, L = W D^-1 to the pack. Block 0 also counts the pivots.
// Strips of 8 columns: each row is a thread's, which factors the strip's 8 x 8 block in registers; what the
// strip adds to the columns behind it is 8 x 8 tensor-core tiles. 16 barriers in all. Grid: (tiles of 64 rows
// below the panel, at least 1; problems).
__global__ void __launch_bounds__(kLargeThreads, 1) ldlt_panel_kernel(LargeBatch b, int64_t panel) {
  using detail::kLStride;
  using detail::kStrip;
  using detail::kWStride;
  const LargeProblem p = large_problem(b, blockIdx.y);
  const int64_t k0 = panel * kPanelColumns;
  if (k0 >= p.side || !p.factorisation->active) return;
  const int width = static_cast<int>(p.side - k0 < kPanelColumns ? p.side - k0 : kPanelColumns);
  const int64_t below = k0 + width + static_cast<int64_t>(blockIdx.x) * kPanelColumns;
  if (blockIdx.x > 0 && below >= p.side) return;
  const int rows = static_cast<int>(p.side - below < kPanelColumns ? p.side - below : kPanelColumns);

  double* w = dynamic_shared<double>();
  double* l = w + 2 * kPanelColumns * kWStride;
  double* d = l + kPanelColumns * kLStride;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  constexpr int kWarps = kLargeThreads / kWarp;

  // Behind the matrix's end the block is continued by the identity, which changes nothing.
  for (int i = warp; i < kPanelColumns; i += kWarps)
    for (int j = lane; j < kPanelColumns; j += kWarp) {
      w[i * kWStride + j] = i < width && j <= i ? p.work[(k0 + i) * p.ld + k0 + j] : i == j ? 1.0 : 0.0;
      w[(kPanelColumns + i) * kWStride + j] = i < rows ? p.work[(below + i) * p.ld + k0 + j] : 0.0;
    }
  block_sync();

  const double substitute = -detail::replacement(p.factorisation->largest_diagonal);
  bool replaced = false;
  // Growth of the rows of the diagonal block: what lies in a strip's 8 x 8 block is known to every thread and
  // kept by one, the rest by the thread of the row.
  double growth = 0, strip_growth = 0;
  for (int c0 = 0; c0 < kPanelColumns; c0 += kStrip) {
    if (thread >= c0 && thread < 2 * kPanelColumns) {
      double a[kStrip][kStrip], pivot[kStrip];  // a: the strip's diagonal block, overwritten by its L
#pragma unroll
      for (int i = 0; i < kStrip; ++i)
#pragma unroll
        for (int j = 0; j <= i; ++j) a[i][j] = w[(c0 + i) * kWStride + c0 + j];
#pragma unroll
      for (int k = 0; k < kStrip; ++k) {
        double dk = a[k][k];
        if (dk == 0) {
          dk = substitute;
          replaced = true;
        }
        pivot[k] = dk;
        if (c0 + k < width) strip_growth += std::abs(dk);
        double column[kStrip];
#pragma unroll
        for (int i = k + 1; i < kStrip; ++i) {
          column[i] = a[i][k];
          a[i][k] = column[i] / dk;
          strip_growth += std::abs(column[i] * a[i][k]);
        }
#pragma unroll
        for (int i = k + 1; i < kStrip; ++i)
#pragma unroll
          for (int j = k + 1; j <= i; ++j) a[i][j] -= column[i] * a[j][k];
      }
      if (thread >= c0 + kStrip) {
        double x[kStrip];
#pragma unroll
        for (int k = 0; k < kStrip; ++k) x[k] = w[thread * kWStride + c0 + k];
#pragma unroll
        for (int k = 0; k < kStrip; ++k)
#pragma unroll
          for (int j = k + 1; j < kStrip; ++j) x[j] -= x[k] * a[j][k];
#pragma unroll
        for (int k = 0; k < kStrip; ++k) {
          w[thread * kWStride + c0 + k] = x[k];
          if (thread < kPanelColumns) {
            const double lk = x[k] / pivot[k];
            l[thread * kLStride + k] = lk;
            growth += std::abs(x[k] * lk);
          }
        }
      }
      if (thread == kPanelColumns) {
#pragma unroll
        for (int k = 0; k < kStrip; ++k) d[c0 + k] = pivot[k];
      }
    }
    block_sync();
    // Behind the strip: rows tile by tile, two tiles of 8 to a warp; the diagonal block below its diagonal.
    const int strip = c0 / kStrip;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int tile = 2 * warp + half, row = tile * kStrip + lane / 4;
      if (tile <= strip) continue;
      const double a0 = -w[row * kWStride + c0 + lane % 4], a1 = -w[row * kWStride + c0 + 4 + lane % 4];
      const int last = tile < kPanelColumns / kStrip - 1 ? tile : kPanelColumns / kStrip - 1;
      for (int t = strip + 1; t <= last; ++t) {
        double* c = w + row * kWStride + t * kStrip + 2 * (lane % 4);
        const double* lt = l + (t * kStrip + lane / 4) * kLStride + lane % 4;
        double sum[2] = {c[0], c[1]};
        dmma_8x8x4(sum, a0, lt[0]);
        dmma_8x8x4(sum, a1, lt[4]);
        c[0] = sum[0], c[1] = sum[1];
      }
    }
    block_sync();
  }

  double* const pack = p.pack + panel % 2 * kPanelColumns;
  for (int i = warp; i < rows; i += kWarps) {
    double sum = 0;
#pragma unroll
    for (int j = lane; j < kPanelColumns; j += kWarp) {
      const double x = w[(kPanelColumns + i) * kWStride + j], lj = x / d[j];
      p.work[(below + i) * p.ld + k0 + j] = x;
      pack[(below + i) * detail::kPackStride + j] = lj;
      sum += std::abs(x * lj);
    }
    sum = detail::warp_sum(sum);
    if (lane == 0) p.growth[below + i] += sum;
  }
  if (blockIdx.x > 0) return;
  if (thread > 0 && thread < width) p.growth[k0 + thread] += growth;
  if (thread == kPanelColumns) {
    p.growth[k0] += strip_growth;
    int64_t positive = 0;
    for (int k = 0; k < width; ++k) positive += d[k] > 0;
    p.factorisation->positive += positive;
    p.factorisation->replaced |= replaced;
  }
}

// C -= L W^T behind panel `last`, for one 64 x 64 tile of the lower triangle. panels: 1 or 2, those up to
// `last` whose L is in the pack. narrow: only the columns of the next panel. Grid: (tiles, problems); four
// warps of 32 x 32.
__global__ void __launch_bounds__(detail::kUpdateThreads)
    ldlt_update_kernel(LargeBatch b, int64_t last, int32_t panels, bool narrow) {
  using detail::kDepth;
  using detail::kStageStride;
  const LargeProblem p = large_problem(b, blockIdx.y);
  const int64_t first = (last + 1) * kPanelColumns;
  if (first >= p.side || !p.factorisation->active) return;
  int64_t row_tile = blockIdx.x, column_tile = 0;
  if (!narrow) {
    row_tile = static_cast<int64_t>((std::sqrt(8.0 * blockIdx.x + 1) - 1) / 2);
    while (row_tile * (row_tile + 1) / 2 > blockIdx.x) --row_tile;
    while ((row_tile + 1) * (row_tile + 2) / 2 <= blockIdx.x) ++row_tile;
    column_tile = blockIdx.x - row_tile * (row_tile + 1) / 2;
  }
  const int64_t row0 = first + row_tile * kPanelColumns, column0 = first + column_tile * kPanelColumns;
  if (row0 >= p.side) return;

  double* l = dynamic_shared<double>();
  double* w = l + kPanelColumns * kStageStride;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int i0 = warp / 2 * 32, j0 = warp % 2 * 32;

  double sum[4][4][2];
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t row = row0 + i0 + 8 * i + lane / 4, column = column0 + j0 + 8 * j + 2 * (lane % 4);
      detail::Pair c{0, 0};
      if (row < p.side && column < p.ld)
        c = *reinterpret_cast<const detail::Pair*>(p.work + row * p.ld + column);
      sum[i][j][0] = c.x, sum[i][j][1] = c.y;
    }

  const int64_t w_first = (last + 1 - panels) * kPanelColumns;
  const int64_t l_first = (last + 1 - panels) % 2 * kPanelColumns;
  for (int k0 = 0; k0 < panels * kPanelColumns; k0 += kDepth) {
    block_sync();
#pragma unroll 4
    for (int i = warp; i < kPanelColumns; i += detail::kUpdateThreads / kWarp) {
      const int64_t row = row0 + i, column = column0 + i;
      l[i * kStageStride + lane] =
          row < p.side ? -p.pack[row * detail::kPackStride + l_first + k0 + lane] : 0.0;
      w[i * kStageStride + lane] = column < p.side ? p.work[column * p.ld + w_first + k0 + lane] : 0.0;
    }
    block_sync();
#pragma unroll
    for (int k = 0; k < kDepth; k += 4) {
      double a[4], x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = l[(i0 + 8 * i + lane / 4) * kStageStride + k + lane % 4];
        x[i] = w[(j0 + 8 * i + lane / 4) * kStageStride + k + lane % 4];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) dmma_8x8x4(sum[i][j], a[i], x[j]);
    }
  }

#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t row = row0 + i0 + 8 * i + lane / 4, column = column0 + j0 + 8 * j + 2 * (lane % 4);
      if (row < p.side && column < p.ld)
        *reinterpret_cast<detail::Pair*>(p.work + row * p.ld + column) =
            detail::Pair{sum[i][j][0], sum[i][j][1]};
    }
}

// The errors of a factorisation: InertiaCount of csrc/core/ldlt.h. One block per problem.
__global__ void __launch_bounds__(kLargeThreads, 2) ldlt_finish_kernel(LargeBatch b) {
  BlockGroup<kLargeThreads> group(dynamic_shared<double>());
  const LargeProblem p = large_problem(b, blockIdx.x);
  Factorisation& f = *p.factorisation;
  if (!f.active) return;
  double part = 0;
  for (int64_t i = threadIdx.x; i < p.side; i += kLargeThreads) part += p.growth[i];
  const double growth = group.sum(part);
  if (threadIdx.x != 0) return;
  const double n = static_cast<double>(p.side);
  f.valid = growth < kInfinity;
  f.factor_error = gamma(n + 4) * growth * (1.0 + gamma(n * n / 2 + 2 * n + 8));
  if (f.replaced) f.factor_error += detail::replacement(f.largest_diagonal) * (1.0 + 4 * kUnitRoundoff);
  f.shift_error = f.shift == 0 ? 0 : kUnitRoundoff * f.largest_diagonal * (1.0 + 4 * kUnitRoundoff);
  f.underflow_error = (n + 1) * (n + 1) * kTiny;
}

// All requested factorisations of a batch: 2 + 2 ceil(side / 64) launches. A problem that is not active costs
// the read of one flag per block.
inline void factorise(const LargeBatch& b, const LargeShapes& shapes, cudaStream_t stream) {
  const auto tiles = [](int64_t rows) {
    return static_cast<unsigned>((rows + kPanelColumns - 1) / kPanelColumns);
  };
  const auto problems = [&](int64_t limit) {
    return static_cast<unsigned>(shapes.above(b.first, b.count, limit) * b.shifts);
  };
  const int64_t side = shapes.side(b.first);
  BSGAP_LAUNCH(ldlt_begin_kernel, dim3(tiles(side), problems(0)), kLargeThreads, 0, stream, b);
  for (int64_t panel = 0; panel * kPanelColumns < side; ++panel) {
    const int64_t next = (panel + 1) * kPanelColumns;
    const unsigned below = side > next ? tiles(side - next) : 0;
    BSGAP_LAUNCH(ldlt_panel_kernel, dim3(std::max(below, 1u), problems(next - kPanelColumns)), kLargeThreads,
                 detail::kPanelShared, stream, b, panel);
    if (below == 0) continue;
    const bool narrow = panel % 2 == 0;
    const unsigned grid = narrow ? below : static_cast<unsigned>(uint64_t{below} * (below + 1) / 2);
    BSGAP_LAUNCH(ldlt_update_kernel, dim3(grid, problems(next)), detail::kUpdateThreads,
                 detail::kUpdateShared, stream, b, panel, narrow ? 1 : 2, narrow);
  }
  BSGAP_LAUNCH(ldlt_finish_kernel, dim3(problems(0)), kLargeThreads, detail::kPlanShared, stream, b);
}

}  // namespace bsgap::cuda
