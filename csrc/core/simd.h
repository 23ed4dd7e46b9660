// Vectors of one width, and how they are read and written.
//
// std::memcpy into a vector wider than the baseline's 16 bytes is compiled by GCC 12, where the body is
// inlined into a function for AVX2, as two copies through the stack, whose reload stalls (store forwarding).
// A type that may stand at any address of a T gives one load.
#pragma once

#include <cstdint>

namespace bsgap {

template <class T, int kBytes>
struct Simd {
  static constexpr int kLanes = kBytes / static_cast<int>(sizeof(T));
  typedef T Vector __attribute__((vector_size(kBytes)));
  typedef T Anywhere __attribute__((vector_size(kBytes), aligned(alignof(T)), may_alias));

  [[gnu::always_inline]] static inline Vector load(const T* p) {
    return *reinterpret_cast<const Anywhere*>(p);
  }
  [[gnu::always_inline]] static inline void store(T* p, const Vector& v) {
    *reinterpret_cast<Anywhere*>(p) = v;
  }
};

}  // namespace bsgap
