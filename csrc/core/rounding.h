// Floating-point model used by every bound of this library: IEEE-754 binary64, round to nearest,
// gradual underflow. fl(x op y) = (x op y)(1 + e) + h with |e| <= kUnitRoundoff and |h| <= kTiny / 2,
// where h is 0 for additions and subtractions.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>

#include "host_device.h"

// A GPU has no such register: double arithmetic there always keeps subnormals and rounds to nearest.
#if (defined(__SSE2__) || defined(_M_X64)) && !defined(__CUDA_ARCH__)
#include <xmmintrin.h>
#define BSGAP_HAS_MXCSR 1
#else
#define BSGAP_HAS_MXCSR 0
#endif

// Nothing below is true of arithmetic that drops NaN, signed rounding or the order of operations, or
// that keeps hidden extra digits: refuse to build rather than return an unproven count.
#ifdef __FAST_MATH__
#error "bsgap_kernels: build without -ffast-math and -Ofast, the certified counts need IEEE arithmetic"
#endif
static_assert(
    std::numeric_limits<double>::is_iec559 && FLT_EVAL_METHOD == 0,
    "bsgap_kernels: the certified counts need IEEE binary64 arithmetic (on 32-bit x86: -mfpmath=sse)");

namespace bsgap {

inline constexpr double kUnitRoundoff = 0x1p-53;
inline constexpr double kTiny = 0x1p-1074;  // smallest subnormal
inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

// gamma_n = n u / (1 - n u), rounded up by two units in the last place.
BSGAP_HD inline double gamma(double n) {
  const double nu = n * kUnitRoundoff;
  if (nu >= 0.5) return kInfinity;
  return nu / (1.0 - nu) * (1.0 + 4 * kUnitRoundoff);
}

// x rounded up / down by more than the error of a handful of preceding operations on non-negative
// numbers. The additive part covers results that underflowed. An overflowed value is only known to
// exceed the largest finite number, so that is what it is rounded down to.
BSGAP_HD inline double round_up(double x) { return x * (1.0 + 8 * kUnitRoundoff) + 4 * kTiny; }
BSGAP_HD inline double round_down(double x) {
  constexpr double kLargest = std::numeric_limits<double>::max();
  const double y = x * (1.0 - 8 * kUnitRoundoff) - 4 * kTiny;
  return y > 0 ? (y < kLargest ? y : kLargest) : 0;
}

// What round_up and round_down take when the guess of a shift is checked against t: without it a guess whose
// error is far below t's own last place could never pass.
BSGAP_HD inline double outward_rounding(double shift) {
  return 16 * kUnitRoundoff * std::abs(shift) + 16 * kTiny;
}

// Frameworks may switch the processor to flush subnormals to zero (torch.set_flush_denormal), or
// leave another rounding mode behind; the bounds hold for neither, so every entry point restores the
// default for its own duration. On processors other than x86 the default is assumed.
class ScopedIeee {
 public:
  BSGAP_HD ScopedIeee() {
#if BSGAP_HAS_MXCSR
    saved_ = _mm_getcsr();
    _mm_setcsr((saved_ & ~0xE040u) | 0x1F80u);
#endif
  }
  BSGAP_HD ~ScopedIeee() {
#if BSGAP_HAS_MXCSR
    _mm_setcsr(saved_);
#endif
  }
  ScopedIeee(const ScopedIeee&) = delete;
  ScopedIeee& operator=(const ScopedIeee&) = delete;

 private:
  [[maybe_unused]] unsigned saved_ = 0;
};

}  // namespace bsgap
