// Point counts of kLanes small symmetric matrices at once, one a lane of the vector unit: Householder
// tridiagonalisation, the largest eigenvalue by Laguerre's iteration, Sturm counts. A matrix of side 32 alone
// has rows too short for wide vectors; here every operation of every step fills them.
//
// Point counts only: no backward-error theorem with constants stands behind them, so no certificate is built
// on them (interval ends come from ldlt.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "buffer.h"
#include "isa.h"
#include "rounding.h"

namespace bsgap {

inline constexpr int kLanes = 8;
typedef double Lanes __attribute__((vector_size(kLanes * sizeof(double))));

namespace detail {

inline int64_t triangle(int64_t i) { return i * (i + 1) / 2; }

// As many of the lanes as one register of the instruction set holds. Kernels work on these, one part of the
// lanes after the other: GCC sends vectors wider than a register through the stack, a lane at a time where
// they are compared.
template <int kVectorBytes>
struct LanePart {
  typedef double Vector __attribute__((vector_size(kVectorBytes), may_alias));
  static constexpr int kSize = kVectorBytes / static_cast<int>(sizeof(double)), kParts = kLanes / kSize;

  // This part of an array of Lanes.
  struct Array {
    Vector* data;
    Vector& operator[](int64_t i) const { return data[i * kParts]; }
    Array operator+(int64_t i) const { return {data + i * kParts}; }
  };
  struct ConstArray {
    const Vector* data;
    const Vector& operator[](int64_t i) const { return data[i * kParts]; }
  };
  static Array of(Lanes* lanes, int part) { return {reinterpret_cast<Vector*>(lanes) + part}; }
  static ConstArray of(const Lanes* lanes, int part) {
    return {reinterpret_cast<const Vector*>(lanes) + part};
  }
  // Parts that hold the first `lanes` of them.
  static int holding(int lanes) { return (lanes + kSize - 1) / kSize; }
};
template <class Part>
using LaneArray = typename Part::Array;
template <class Part>
using ConstLaneArray = typename Part::ConstArray;

// Row blocks of kRows rows by columns [first, columns): p += A v, with A as rows and as columns.
template <class Part, int kRows>
[[gnu::always_inline]] inline void lanes_multiply(LaneArray<Part> a, int64_t i, int64_t first,
                                                  LaneArray<Part> v, LaneArray<Part> p) {
  using Vector = typename Part::Vector;
  LaneArray<Part> row[kRows];
  Vector sum[kRows], vi[kRows];
  for (int r = 0; r < kRows; ++r) {
    row[r] = a + triangle(i + r);
    sum[r] = Vector{};
    vi[r] = v[i + r];
  }
  for (int64_t j = first; j < i; ++j) {
    const Vector vj = v[j];
    Vector pj = p[j];
    for (int r = 0; r < kRows; ++r) {
      const Vector entry = row[r][j];
      sum[r] += entry * vj;
      pj += entry * vi[r];
    }
    p[j] = pj;
  }
  for (int r = 0; r < kRows; ++r) {
    for (int q = 0; q < r; ++q) {
      sum[r] += row[r][i + q] * vi[q];
      p[i + q] += row[r][i + q] * vi[r];
    }
    p[i + r] += sum[r] + row[r][i + r] * vi[r];
  }
}

// The same rows: A -= v p^T + p v^T.
template <class Part, int kRows>
[[gnu::always_inline]] inline void lanes_update(LaneArray<Part> a, int64_t i, int64_t first,
                                                LaneArray<Part> v, LaneArray<Part> p) {
  using Vector = typename Part::Vector;
  LaneArray<Part> row[kRows];
  Vector vi[kRows], pi[kRows];
  for (int r = 0; r < kRows; ++r) {
    row[r] = a + triangle(i + r);
    vi[r] = v[i + r];
    pi[r] = p[i + r];
  }
  for (int64_t j = first; j < i; ++j) {
    const Vector vj = v[j], pj = p[j];
    for (int r = 0; r < kRows; ++r) row[r][j] = row[r][j] - vi[r] * pj - pi[r] * vj;
  }
  for (int r = 0; r < kRows; ++r)
    for (int q = 0; q <= r; ++q) row[r][i + q] = row[r][i + q] - vi[r] * pi[q] - pi[r] * vi[q];
}

// Of matrices whose largest entry is about 1: entries below 1e-140 are dropped, because reciprocals of their
// squares overflow and one NaN would make a wrong count of the lane. No eigenvalue moves by more.
inline constexpr double kNegligibleSquares = 1e-280;

// a: lower triangles, row after row, overwritten. Golub & Van Loan, Matrix Computations, section 8.3.1.
// scratch: 2 n.
template <class Part>
[[gnu::always_inline]] inline void tridiagonalize_part(LaneArray<Part> a, int64_t n, LaneArray<Part> diagonal,
                                                       LaneArray<Part> off_diagonal, LaneArray<Part> v,
                                                       LaneArray<Part> p) {
  using Vector = typename Part::Vector;
  for (int64_t k = 0; k + 2 < n; ++k) {
    const int64_t first = k + 1;
    for (int64_t i = first; i < n; ++i) v[i] = a[triangle(i) + k];
    Vector tail{};
    for (int64_t i = first + 1; i < n; ++i) tail += v[i] * v[i];
    const Vector head = v[first];
    Vector alpha = head * head + tail, zero{};
    for (int l = 0; l < Part::kSize; ++l) alpha[l] = std::sqrt(alpha[l]);
    alpha = head > 0 ? -alpha : alpha;
    const auto nothing = tail < kNegligibleSquares;
    alpha = nothing ? head : alpha;  // nothing to eliminate: the factor is then 0
    v[first] = head - alpha;
    const Vector beta = nothing ? zero : 2.0 / (tail + v[first] * v[first]);
    for (int64_t i = first; i < n; ++i) p[i] = zero;
    int64_t i = first;
    for (; i + 4 <= n; i += 4) lanes_multiply<Part, 4>(a, i, first, v, p);
    for (; i < n; ++i) lanes_multiply<Part, 1>(a, i, first, v, p);
    Vector vp{};
    for (i = first; i < n; ++i) {
      p[i] *= beta;
      vp += v[i] * p[i];
    }
    const Vector half = 0.5 * beta * vp;
    for (i = first; i < n; ++i) p[i] -= half * v[i];
    for (i = first; i + 4 <= n; i += 4) lanes_update<Part, 4>(a, i, first, v, p);
    for (; i < n; ++i) lanes_update<Part, 1>(a, i, first, v, p);
    off_diagonal[k] = alpha;
  }
  for (int64_t k = 0; k < n; ++k) diagonal[k] = a[triangle(k) + k];
  if (n > 1) off_diagonal[n - 2] = a[triangle(n - 1) + n - 2];
}
template <int kVectorBytes>
[[gnu::always_inline]] inline void lanes_tridiagonalize_body(int lanes, Lanes* a, int64_t n, Lanes* diagonal,
                                                             Lanes* off_diagonal, Lanes* scratch) {
  using Part = LanePart<kVectorBytes>;
  for (int part = 0; part < Part::holding(lanes); ++part)
    tridiagonalize_part<Part>(Part::of(a, part), n, Part::of(diagonal, part), Part::of(off_diagonal, part),
                              Part::of(scratch, part), Part::of(scratch + n, part));
}
BSGAP_PER_ISA_WIDTH(void, lanes_tridiagonalize,
                    (int lanes, Lanes* a, int64_t n, Lanes* diagonal, Lanes* off_diagonal, Lanes* scratch),
                    (lanes, a, n, diagonal, off_diagonal, scratch))

// Largest eigenvalues: Laguerre's iteration from Gershgorin's upper bound, which comes down to the largest
// root without passing it, cubically near it (J. H. Wilkinson, The Algebraic Eigenvalue Problem, 1965,
// section 7.62). The characteristic polynomial is the product of the pivots of T - x I, its logarithmic
// derivatives are sums.
template <class Part>
[[gnu::always_inline]] inline typename Part::Vector largest_part(ConstLaneArray<Part> diagonal,
                                                                 ConstLaneArray<Part> off_diagonal,
                                                                 int64_t n) {
  using Vector = typename Part::Vector;
  Vector upper = diagonal[0] - diagonal[0];  // of a positive semidefinite matrix: at least 0
  for (int64_t i = 0; i < n; ++i) {
    Vector radius{};
    if (i > 0) radius += off_diagonal[i - 1] < 0 ? -off_diagonal[i - 1] : off_diagonal[i - 1];
    if (i + 1 < n) radius += off_diagonal[i] < 0 ? -off_diagonal[i] : off_diagonal[i];
    const Vector bound = diagonal[i] + radius;
    upper = bound > upper ? bound : upper;
  }
  constexpr double kSmallest = 1e-290;  // below, reciprocals overflow: Gershgorin's bound has to do
  Vector x = upper * (1 + 1e-6);
  auto active = upper > kSmallest;
  const double nd = static_cast<double>(n);
  for (int step = 0; step < 60; ++step) {
    Vector inverse{}, first{}, second{}, s1{}, s2{};
    auto passed = x < 0;
    for (int64_t i = 0; i < n; ++i) {
      const Vector e = i > 0 ? off_diagonal[i - 1] * inverse : Vector{}, e2 = e * e;
      const Vector pivot = diagonal[i] - x - (i > 0 ? off_diagonal[i - 1] * e : Vector{});
      passed |= pivot >= 0;
      second = e2 * (second - 2.0 * inverse * first * first);
      first = e2 * first - 1.0;
      inverse = 1.0 / pivot;
      const Vector ratio = first * inverse;
      s1 += ratio;
      s2 += ratio * ratio - second * inverse;
    }
    Vector discriminant = (nd - 1) * (nd * s2 - s1 * s1);
    for (int l = 0; l < Part::kSize; ++l)
      discriminant[l] = discriminant[l] > 0 ? std::sqrt(discriminant[l]) : 0;
    const Vector down = nd / (s1 + discriminant), next = x - down;
    active &= ~passed & (down > 1e-15 * x);
    x = active ? next : x;
    bool any = false;
    for (int l = 0; l < Part::kSize; ++l) any |= active[l] != 0;
    if (!any) break;
  }
  return upper > kSmallest ? x : upper;
}
template <int kVectorBytes>
[[gnu::always_inline]] inline void lanes_largest_body(int lanes, const Lanes* diagonal,
                                                      const Lanes* off_diagonal, int64_t n, Lanes* result) {
  using Part = LanePart<kVectorBytes>;
  for (int part = 0; part < Part::holding(lanes); ++part)
    Part::of(result, part)[0] = largest_part<Part>(Part::of(diagonal, part), Part::of(off_diagonal, part), n);
}
BSGAP_PER_ISA_WIDTH(void, lanes_largest,
                    (int lanes, const Lanes* diagonal, const Lanes* off_diagonal, int64_t n, Lanes* result),
                    (lanes, diagonal, off_diagonal, n, result))

// #{eigenvalues above x}: positive pivots of T - x I. A vanishing pivot is replaced by a tiny negative one,
// as in LAPACK's dstebz, so that an eigenvalue equal to x is not counted.
template <class Part>
[[gnu::always_inline]] inline typename Part::Vector sturm_part(ConstLaneArray<Part> diagonal,
                                                               ConstLaneArray<Part> off_diagonal, int64_t n,
                                                               typename Part::Vector x) {
  using Vector = typename Part::Vector;
  Vector smallest = Vector{} + 1.0;
  for (int64_t i = 0; i + 1 < n; ++i) {
    const Vector square = off_diagonal[i] * off_diagonal[i];
    smallest = square > smallest ? square : smallest;
  }
  smallest *= std::numeric_limits<double>::min();
  const Vector zero{};
  Vector pivot = zero + 1.0, total{};
  for (int64_t i = 0; i < n; ++i) {
    const Vector e = i > 0 ? off_diagonal[i - 1] : zero;
    pivot = diagonal[i] - x - e * e / pivot;
    const Vector size = pivot < 0 ? -pivot : pivot;
    pivot = size < smallest ? -smallest : pivot;
    total += pivot > 0 ? zero + 1.0 : zero;
  }
  return total;
}
template <int kVectorBytes>
[[gnu::always_inline]] inline void lanes_sturm_body(int lanes, const Lanes* diagonal,
                                                    const Lanes* off_diagonal, int64_t n, const Lanes* x,
                                                    Lanes* count) {
  using Part = LanePart<kVectorBytes>;
  for (int part = 0; part < Part::holding(lanes); ++part)
    Part::of(count, part)[0] =
        sturm_part<Part>(Part::of(diagonal, part), Part::of(off_diagonal, part), n, Part::of(x, part)[0]);
}
BSGAP_PER_ISA_WIDTH(void, lanes_sturm,
                    (int lanes, const Lanes* diagonal, const Lanes* off_diagonal, int64_t n, const Lanes* x,
                     Lanes* count),
                    (lanes, diagonal, off_diagonal, n, x, count))

}  // namespace detail

// Tridiagonal forms of up to kLanes matrices of side n, and what is asked of them.
class LaneSpectra {
 public:
  // g: `count` matrices, n x n, row-major, lower triangle read. Lanes without a matrix hold anything.
  LaneSpectra(const double* const* g, int count, int64_t n)
      : count_(count), n_(n), storage_(detail::triangle(n) + 4 * n) {
    // Powers of two bring the largest diagonal entries near 1, so that no square leaves the range.
    for (int l = 0; l < count; ++l) {
      double largest = 0;
      for (int64_t i = 0; i < n; ++i) largest = std::max(largest, g[l][i * n + i]);
      scale_[l] = largest > 0 ? std::ldexp(1.0, std::clamp(-std::ilogb(largest), -1000, 1000)) : 1.0;
    }
    Lanes *diagonal = storage_.data(), *off_diagonal = diagonal + n, *a = off_diagonal + n;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j <= i; ++j) {
        Lanes entry{};
        for (int l = 0; l < count; ++l) entry[l] = g[l][i * n + j];
        a[detail::triangle(i) + j] = entry * scale_;
      }
    detail::lanes_tridiagonalize(count, a, n, diagonal, off_diagonal, a + detail::triangle(n));
  }

  // Of the matrices times scale().
  const Lanes* diagonal() const { return storage_.data(); }           // n
  const Lanes* off_diagonal() const { return storage_.data() + n_; }  // n - 1
  Lanes scale() const { return scale_; }

  Lanes largest() const {
    Lanes result{};
    detail::lanes_largest(count_, diagonal(), off_diagonal(), n_, &result);
    return result / scale_;
  }
  Lanes count_above(const Lanes& x) const {
    const Lanes scaled = x * scale_;
    Lanes count{};
    detail::lanes_sturm(count_, diagonal(), off_diagonal(), n_, &scaled, &count);
    return count;
  }

 private:
  int count_;
  int64_t n_;
  Lanes scale_ = Lanes{} + 1.0;
  Buffer<Lanes> storage_;
};

}  // namespace bsgap
