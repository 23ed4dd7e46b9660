// Every kernel that a CountProblem needs, launched.
#pragma once

#include "count.cuh"
#include "count_small.cuh"

namespace bsgap::cuda {

// Bytes of scratch memory on the device: a function of shapes only.
inline int64_t count_workspace_bytes(const CountProblem&) { return 0; }

// Launches on one stream; throws std::runtime_error if a launch fails.
inline void count_grams(const CountProblem& problem, void*, cudaStream_t stream) {
  count_small_grams(problem, stream);
}

}  // namespace bsgap::cuda
