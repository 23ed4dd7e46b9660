// A threshold of singular values, as every count takes it.
#pragma once

#include <cmath>

#include "rounding.h"

namespace bsgap {

// tau = max(absolute, relative * sigma_max). NaN in either gives a count of -1.
struct Threshold {
  double absolute = 0;
  double relative = 0;
};

// The threshold of A * 2^exponent. An absolute part that underflows leaves a square below kTiny, which
// round_up covers. Under ScopedIeee: with subnormals flushed, a subnormal tolerance would scale to 0.
BSGAP_HD inline Threshold scaled(Threshold t, int exponent) {
  ScopedIeee ieee;
  t.absolute = std::ldexp(t.absolute, exponent);
  return t;
}

struct Bounds {
  double lower = 0;
  double upper = 0;
};

}  // namespace bsgap
