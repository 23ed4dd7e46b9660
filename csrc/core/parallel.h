// The core owns no threads: callers hand in a way to run a range of independent items.
#pragma once

#include <cstdint>
#include <functional>

namespace bsgap {

// Runs body(0) ... body(count - 1), in any order, possibly at once, and returns when all are done.
using ParallelFor = std::function<void(int64_t count, const std::function<void(int64_t)>& body)>;

inline void serial_for(int64_t count, const std::function<void(int64_t)>& body) {
  for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace bsgap
