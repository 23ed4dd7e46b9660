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
// Without branches, so that loops over it can be vectorised: as a float of exponent - 112 the value is right
// but for that factor, which the product restores, also of subnormals; infinity and NaN get their exponent
// back.
inline float load(const Float16Bits* p) {
  const uint32_t magnitude = static_cast<uint32_t>(p->bits & 0x7FFFu) << 13;
  float value;
  std::memcpy(&value, &magnitude, sizeof value);
  value *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits |= (magnitude >= 0x0F800000u ? 0x7F800000u : 0u) | static_cast<uint32_t>(p->bits & 0x8000u) << 16;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// A stretch of memory that will be read soon, to be asked for while there is something else to do.
struct Upcoming {
  const char* data = nullptr;
  int64_t bytes = 0;

  // The next `lines` cache lines of it; null when all have been asked for.
  const char* take(int64_t lines) {
    if (bytes <= 0) return nullptr;
    const char* first = data;
    data += lines * 64;
    bytes -= lines * 64;
    return first;
  }
};

// Element (i, j) stands at data + row_offset(i) + j * col_stride, strides in elements, any sign. Rows come in
// groups of `group` rows with strides of their own, as the pixels of the images of a batch (NCHW) do; one
// group holds them all elsewhere.
struct MatrixView {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t rows = 0, cols = 0;
  int64_t row_stride = 0, col_stride = 0;
  int64_t group = INT64_MAX, group_stride = 0;

  int64_t row_offset(int64_t i) const { return i / group * group_stride + i % group * row_stride; }
  int64_t rows_to_next_group(int64_t i) const { return group - i % group; }
  int64_t item_bytes() const { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }
  // Memory of some rows, if they stand close together.
  Upcoming upcoming(int64_t row, int64_t count) const {
    if (col_stride != 1 || row_stride < cols || row_stride > 2 * cols || row + count > rows ||
        count > rows_to_next_group(row))
      return {};
    return {static_cast<const char*>(data) + row_offset(row) * item_bytes(),
            count * row_stride * item_bytes()};
  }
  // Of a matrix whose rows form one group.
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
