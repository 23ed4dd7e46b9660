// What the kernels for sides above kSmallSide know of a matrix and of one factorisation of it, and where the
// scratch of both lies. Host code knows the shapes only; every value stays on the device.
#pragma once

#include <algorithm>
#include <cmath>
#include <iterator>
#include <vector>

#include "group.cuh"
#include "matrix.cuh"

namespace bsgap::cuda {

inline constexpr int kLargeThreads = 256;     // of every kernel here but the trailing update
inline constexpr int64_t kPanelColumns = 64;  // columns factored before one trailing update
inline constexpr int kThresholdGroup = 4;     // thresholds factored together
inline constexpr int kShiftKinds = 5;         // ShiftKind of large_plan.cuh
inline constexpr int kShiftsPerMatrix = kShiftKinds * kThresholdGroup;
inline constexpr int kLanczosSteps = 96;

namespace detail {

using PlanGroup = BlockGroup<kLargeThreads>;
inline constexpr size_t kPlanShared = sizeof(double) * PlanGroup::kScratch;
inline constexpr size_t kRetryShared = kPlanShared + sizeof(double) * kShiftKinds;

}  // namespace detail

// Rows of the factored matrix start at multiples of 64 bytes.
BSGAP_HD inline int64_t leading_dimension(int64_t side) { return (side + 7) / 8 * 8; }

// Doubles of scratch for one factorisation: the matrix, L of two panels, a growth sum for each row. A Lanczos
// run (basis of kLanczosSteps + 2 vectors) and a tridiagonalisation fit in the same.
BSGAP_HD inline int64_t scratch_elements(int64_t side) {
  const int64_t ld = leading_dimension(side);
  return ld * (side + 2 * kPanelColumns + 1);
}

enum LargeContent : int32_t { kContentFinite, kContentZero, kContentNonFinite };

// One matrix, in table order. Written by describe_kernel, then by one kernel after the other.
struct LargeMatrix {
  MatrixTask task;
  int64_t scratch;     // scratch_elements of all matrices before it
  int64_t eigenvalue;  // place of its first eigenvalue
  int32_t content;
  int32_t needs_top;  // some threshold is relative, or moments are asked for
  double trace, gram_error;
  double scale, back;  // powers of two: the matrix times `scale` has a trace in [1/2, 1)
  // Lanczos, in units of the scaled matrix.
  double ritz;       // largest Ritz value at the last check
  double frobenius;  // upper bound of the Frobenius norm
  int32_t steps, done;
  unsigned arrivals;
  double diagonal[kLanczosSteps], off_diagonal[kLanczosSteps];
  double reflector;  // beta of the Householder vector in use, H = I - beta v v^T
  // Of the matrix itself.
  double theta;                 // Rayleigh quotient
  double top_lower, top_upper;  // bounds of the largest eigenvalue
};

// One LDL^T of a matrix less a shift: a request, and what came of it.
struct Factorisation {
  double shift;
  double largest_diagonal;  // max_j |g_jj - shift|
  int32_t active;
  int32_t replaced;  // a pivot was zero and was replaced
  int64_t positive;  // positive pivots
  int32_t valid;     // false: the growth was not finite, nothing is known
  double factor_error, shift_error, underflow_error;
};

// All errors of a factorisation together; ErrorTerms::total of csrc/core/spectral_norm.h.
BSGAP_HD inline double total_error(const Factorisation& f) {
  return round_up(f.factor_error + f.shift_error + f.underflow_error);
}

// The interval of one threshold while it is found.
struct LargeThreshold {
  double low, high;      // of tau^2
  int32_t decided;       // lower and upper stand
  int32_t lower_stands;  // only the lower end does
  int32_t upper_stands;
  int64_t lower, upper;
};

// What one launch works on: matrices [first, first + count) of the table, and `shifts` of each matrix's
// kShiftsPerMatrix factorisations from first_shift on. Problem y of the grid: matrix y / shifts, shift
// y % shifts.
struct LargeBatch {
  CountProblem problem;
  LargeMatrix* matrices;
  Factorisation* factorisations;
  LargeThreshold* thresholds;  // kThresholdGroup for each matrix
  double* scratch;
  int64_t first, count;
  int64_t first_scratch;  // LargeMatrix::scratch of matrix `first`
  int64_t first_shift, shifts;
};

struct LargeProblem {
  LargeMatrix* matrix;
  Factorisation* factorisation;
  int64_t side, ld;
  double *work, *pack, *growth;  // side x ld, side x 128, side
};

__device__ inline LargeProblem large_problem(const LargeBatch& b, int64_t index) {
  const int64_t m = b.first + index / b.shifts, s = index % b.shifts;
  LargeMatrix* matrix = b.matrices + m;
  const int64_t side = matrix->task.side, ld = leading_dimension(side);
  double* work = b.scratch + (matrix->scratch - b.first_scratch) * b.shifts + s * scratch_elements(side);
  double* pack = work + side * ld;
  return {matrix,
          b.factorisations + m * kShiftsPerMatrix + b.first_shift + s,
          side,
          ld,
          work,
          pack,
          pack + 2 * kPanelColumns * ld};
}

// Reads the table and the diagonal of one matrix per block: what is finite, scale, Gram error.
__global__ void __launch_bounds__(kLargeThreads, 2) describe_kernel(LargeBatch b) {
  BlockGroup<kLargeThreads> group(dynamic_shared<double>());
  const CountProblem& p = b.problem;
  const int64_t index = b.first + blockIdx.x;
  const MatrixTask task = find_matrix(p, index);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < task.side; i += kLargeThreads) sum += task.g[i * (task.side + 1)];
  const double trace = group.sum(sum);
  const int64_t eigenvalue = first_eigenvalue(group, p, task);
  const int64_t scratch = place_of(group, p, task, scratch_elements);
  if (threadIdx.x != 0) return;
  LargeMatrix& m = b.matrices[index];
  m.task = task;
  m.eigenvalue = eigenvalue;
  m.scratch = scratch;
  const double size = std::abs(trace);
  m.content = !(size < kInfinity)       ? kContentNonFinite
              : is_zero(p, task, trace) ? kContentZero
                                        : kContentFinite;
  m.trace = trace;
  m.gram_error = m.content == kContentFinite ? gram_error_of(p, task, trace) : 0;
  int exponent = 0;
  if (m.content == kContentFinite) std::frexp(size, &exponent);
  exponent = exponent < -1000 ? -1000 : exponent;
  m.scale = std::ldexp(1.0, -exponent);
  m.back = std::ldexp(1.0, exponent);
  m.needs_top = p.moments != nullptr;
  for (int64_t j = 0; j < p.threshold_count; ++j) {
    const Threshold t = threshold_of(p, task, j);
    m.needs_top |= !is_nan(t) && t.relative > 0 && t.relative < 1;
  }
  m.ritz = 0;
  m.steps = 0;
  m.done = 0;
  m.arrivals = 0;
  m.theta = m.top_lower = 0;
  // A Gram matrix has no eigenvalue above its trace, which is that of G but for the errors of its entries.
  const double n = static_cast<double>(task.side);
  m.top_upper = round_up(size * (1 + 2 * gamma(n)) + (n + 2) * m.gram_error);
  m.frobenius = m.reflector = 0;
}

// Host: the sides of the table's matrices above kSmallSide, in table order (descending).
class LargeShapes {
 public:
  explicit LargeShapes(const CountProblem& p) {
    for (int64_t r = 0; r < p.rows && p.sides[r] > kSmallSide; ++r) {
      if (p.batches[r] == 0) continue;
      rows_.push_back({p.sides[r], matrices_, scratch_});
      matrices_ += p.batches[r];
      scratch_ += p.batches[r] * scratch_elements(p.sides[r]);
    }
  }

  int64_t matrices() const { return matrices_; }
  int64_t side(int64_t matrix) const { return row_of(matrix).side; }

  // Matrices of [first, first + count) whose side is above `limit`: they come first.
  int64_t above(int64_t first, int64_t count, int64_t limit) const {
    const auto row =
        std::partition_point(rows_.begin(), rows_.end(), [limit](const Row& r) { return r.side > limit; });
    const int64_t end = row == rows_.end() ? matrices_ : row->first_matrix;
    return std::clamp<int64_t>(end - first, 0, count);
  }

  int64_t scratch_before(int64_t matrix) const {
    if (matrix == matrices_) return scratch_;
    const Row& row = row_of(matrix);
    return row.first_scratch + (matrix - row.first_matrix) * scratch_elements(row.side);
  }

 private:
  struct Row {
    int64_t side, first_matrix, first_scratch;
  };

  const Row& row_of(int64_t matrix) const {
    return *std::prev(std::partition_point(rows_.begin(), rows_.end(),
                                           [matrix](const Row& r) { return r.first_matrix <= matrix; }));
  }

  std::vector<Row> rows_;
  int64_t matrices_ = 0, scratch_ = 0;
};

}  // namespace bsgap::cuda
