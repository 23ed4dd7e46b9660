// C entry points of csrc/cuda/count_large.cuh on the host harness, for ctypes (tests/test_cuda_count_large.py)
// and for the sanitizers' driver.
#include "cuda/count_large.cuh"

#include <cstring>

using bsgap::cuda::CountProblem;

extern "C" {

// The workspace has its exact size and is poisoned: whoever reads what nobody wrote finds NaN, and
// AddressSanitizer sees what is written outside.
int64_t bsgap_count_large(const CountProblem* problem) {
  const int64_t bytes = bsgap::cuda::count_large_workspace_bytes(*problem);
  void* workspace = std::aligned_alloc(256, static_cast<size_t>(bytes > 0 ? bytes : 256));
  std::memset(workspace, 0xFF, static_cast<size_t>(bytes));
  bsgap::cuda::host::launches().clear();
  bsgap::cuda::count_large_grams(*problem, workspace, nullptr);
  std::free(workspace);
  return bytes;
}

int64_t bsgap_count_large_bytes(const CountProblem* problem) {
  return bsgap::cuda::count_large_workspace_bytes(*problem);
}

// Launches of the last call, one a line: name, grid, threads, shared bytes. Returns the text's length.
int64_t bsgap_launches(char* out, int64_t size) {
  std::string text;
  for (const auto& l : bsgap::cuda::host::launches())
    text += l.name + " " + std::to_string(l.grid.x) + " " + std::to_string(l.grid.y) + " " +
            std::to_string(l.threads) + " " + std::to_string(l.shared) + "\n";
  if (out != nullptr) std::strncpy(out, text.c_str(), static_cast<size_t>(size));
  return static_cast<int64_t>(text.size()) + 1;
}
}
