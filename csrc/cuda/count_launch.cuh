// Every kernel that a CountProblem needs, launched.
#pragma once

#include "count.cuh"
#include "count_large.cuh"
#include "count_small.cuh"

namespace bsgap::cuda {

// Bytes of scratch memory on the device: a function of shapes and options only.
inline int64_t count_workspace_bytes(const CountProblem& problem) {
  return count_large_workspace_bytes(problem);
}

// workspace: that many bytes, aligned to 256. Launches on one stream; throws std::runtime_error if one fails.
inline void count_grams(const CountProblem& problem, void* workspace, cudaStream_t stream) {
  count_large_grams(problem, workspace, stream);
  count_small_grams(problem, stream);
}

}  // namespace bsgap::cuda
