// A strided matrix of any supported dtype, read element by element in place.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace bsgap {

enum class DType { kFloat64, kFloat32, kBFloat16, kFloat16 };

// Storage types of the 16-bit formats: load() turns them into float, which is exact.
struct BFloat16Bits {
  uint16_t bits;
};
struct Float16Bits {
  uint16_t bits;
};

inline double load(const double* p) { return *p; }
inline float load(const float* p) { return *p; }
inline float load(const BFloat16Bits* p) {
  const uint32_t wide = static_cast<uint32_t>(p->bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}
inline float load(const Float16Bits* p) {
  const uint32_t sign = static_cast<uint32_t>(p->bits & 0x8000u) << 16;
  const uint32_t exponent = (p->bits >> 10) & 0x1Fu, fraction = p->bits & 0x3FFu;
  uint32_t wide;
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  wide = exponent == 31 ? 0x7F800000u | (fraction << 13) : ((exponent + 112) << 23) | (fraction << 13);
  wide |= sign;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// Element (i, j) stands at data + i * row_stride + j * col_stride, strides in elements, any sign.
struct MatrixView {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t rows = 0, cols = 0;
  int64_t row_stride = 0, col_stride = 0;

  MatrixView transposed() const { return {data, dtype, cols, rows, col_stride, row_stride}; }
};

// Calls f with the data pointer in its own type.
template <class F>
decltype(auto) with_pointer(const MatrixView& a, F&& f) {
  switch (a.dtype) {
    case DType::kFloat64:
      return f(static_cast<const double*>(a.data));
    case DType::kBFloat16:
      return f(static_cast<const BFloat16Bits*>(a.data));
    case DType::kFloat16:
      return f(static_cast<const Float16Bits*>(a.data));
    default:
      return f(static_cast<const float*>(a.data));
  }
}

}  // namespace bsgap
