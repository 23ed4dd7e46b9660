// The two loops over vectors that everything but the tiles spends its time in.
#pragma once

#include <cstdint>

#include "isa.h"

namespace bsgap {

[[gnu::always_inline]] inline double dot_body(const double* x, const double* y, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}
BSGAP_PER_ISA(double, dot, (const double* x, const double* y, int64_t n), (x, y, n))

// y += a x.
[[gnu::always_inline]] inline void add_multiple_body(double a, const double* x, double* y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] += a * x[i];
}
BSGAP_PER_ISA(void, add_multiple, (double a, const double* x, double* y, int64_t n), (a, x, y, n))

}  // namespace bsgap
