// The core owns no threads: callers hand in a way to run a range of independent items.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

namespace bsgap {

// Runs body(0) ... body(count - 1), in any order, possibly at once, and returns when all are done.
using ParallelFor = std::function<void(int64_t count, const std::function<void(int64_t)>& body)>;

inline void serial_for(int64_t count, const std::function<void(int64_t)>& body) {
  for (int64_t i = 0; i < count; ++i) body(i);
}

// The same for items of unequal cost, or cores that other work shares: whoever is free takes the next item.
// Thread pools cut a range into equal parts; here the first call a thread gets works until nothing is left.
template <class Body>
void balanced_for(int64_t count, const ParallelFor& parallel, const Body& body) {
  if (count == 1) return body(int64_t{0});
  std::atomic<int64_t> next{0};
  parallel(count, [&](int64_t) {
    for (int64_t i = next++; i < count; i = next++) body(i);
  });
}

}  // namespace bsgap
