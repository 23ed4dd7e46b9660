// Counts and certified intervals for sides above kSmallSide, all matrices of a call together: the host
// launches a sequence that depends on shapes and options only.
//
//   describe, then for every relative threshold a proposal of the largest eigenvalue (lanczos.cuh)
//   spectrum   or more than four thresholds without a certificate: tridiagonal form (tridiagonal_large.cuh)
//   moments    from the same proposal
//   points     one factorisation per threshold, at tau^2 from the Rayleigh quotient
//   certified  two above the proposal (and two more if those left it open) bound the largest eigenvalue; two
//              per threshold bound the count; one more of each that did not pass, and the count at tau^2
//              itself where the interval is no single number
//
// Scratch holds kScratchElements doubles at most, or one factorisation: larger calls go through it in chunks.
#pragma once

#include "lanczos.cuh"
#include "large_plan.cuh"
#include "ldlt.cuh"
#include "tridiagonal_large.cuh"

namespace bsgap::cuda {

namespace detail {

#ifdef BSGAP_SCRATCH_ELEMENTS  // tests: chunks of matrices of a size that a CPU can count
inline constexpr int64_t kScratchElements = BSGAP_SCRATCH_ELEMENTS;
#else
inline constexpr int64_t kScratchElements = int64_t{1} << 28;  // 2 GiB of doubles
#endif
inline constexpr int64_t kChunkMatrices = 3072;  // times kShiftsPerMatrix stays below a grid's 65535

struct LargeChunk {
  int64_t first, count, first_scratch;
  int64_t shifts;    // factorisations of a matrix that fit at a time
  int64_t elements;  // of scratch
};

// Most shifts of one matrix that a round asks for.
inline int64_t most_shifts(const CountProblem& p) {
  const int64_t group = std::clamp<int64_t>(p.threshold_count, 1, kThresholdGroup);
  return p.certify ? kShiftKinds * group : group;
}

inline std::vector<LargeChunk> large_chunks(const CountProblem& p, const LargeShapes& shapes) {
  std::vector<LargeChunk> chunks;
  const int64_t wanted = most_shifts(p);
  for (int64_t first = 0; first < shapes.matrices();) {
    const int64_t before = shapes.scratch_before(first);
    int64_t count = 1;
    while (first + count < shapes.matrices() && count < kChunkMatrices &&
           (shapes.scratch_before(first + count + 1) - before) * wanted <= kScratchElements)
      ++count;
    const int64_t each = shapes.scratch_before(first + count) - before;
    const int64_t shifts = std::clamp<int64_t>(kScratchElements / each, 1, wanted);
    chunks.push_back({first, count, before, shifts, each * shifts});
    first += count;
  }
  return chunks;
}

// Places of the parts of the workspace, in bytes from its start.
struct LargeWorkspace {
  int64_t matrices = 0, factorisations = 0, thresholds = 0, scratch = 0, bytes = 0;

  LargeWorkspace(int64_t count, int64_t scratch_elements) {
    const auto take = [this](int64_t size) {
      const int64_t place = bytes;
      bytes += (size + 255) / 256 * 256;
      return place;
    };
    matrices = take(count * static_cast<int64_t>(sizeof(LargeMatrix)));
    factorisations = take(count * kShiftsPerMatrix * static_cast<int64_t>(sizeof(Factorisation)));
    thresholds = take(count * kThresholdGroup * static_cast<int64_t>(sizeof(LargeThreshold)));
    scratch = take(scratch_elements * static_cast<int64_t>(sizeof(double)));
  }
};

inline LargeWorkspace large_workspace(const LargeShapes& shapes, const std::vector<LargeChunk>& chunks) {
  int64_t elements = 0;
  for (const LargeChunk& c : chunks) elements = std::max(elements, c.elements);
  return LargeWorkspace(shapes.matrices(), elements);
}

// Factorisations [0, shifts) of every matrix of the chunk, as many at a time as its scratch holds.
inline void factorise_all(LargeBatch b, const LargeShapes& shapes, const LargeChunk& chunk, int64_t shifts,
                          cudaStream_t stream) {
  for (b.first_shift = 0; b.first_shift < shifts; b.first_shift += b.shifts) {
    b.shifts = std::min(chunk.shifts, shifts - b.first_shift);
    factorise(b, shapes, stream);
  }
}

}  // namespace detail

inline int64_t count_large_workspace_bytes(const CountProblem& p) {
  const LargeShapes shapes(p);
  if (shapes.matrices() == 0) return 0;
  return detail::large_workspace(shapes, detail::large_chunks(p, shapes)).bytes;
}

// workspace: count_large_workspace_bytes of device memory, aligned to 256 bytes.
inline void count_large_grams(const CountProblem& p, void* workspace, cudaStream_t stream) {
  const LargeShapes shapes(p);
  if (shapes.matrices() == 0) return;
  const std::vector<detail::LargeChunk> chunks = detail::large_chunks(p, shapes);
  const detail::LargeWorkspace places = detail::large_workspace(shapes, chunks);
  unsigned char* base = static_cast<unsigned char*>(workspace);
  LargeBatch b{};
  b.problem = p;
  b.matrices = reinterpret_cast<LargeMatrix*>(base + places.matrices);
  b.factorisations = reinterpret_cast<Factorisation*>(base + places.factorisations);
  b.thresholds = reinterpret_cast<LargeThreshold*>(base + places.thresholds);
  b.scratch = reinterpret_cast<double*>(base + places.scratch);
  // With thresholds on the device nobody here knows whether one is relative.
  const bool may_need_top = p.moments != nullptr || p.thresholds != nullptr || (p.rtol > 0 && p.rtol < 1);
  // From there on a tridiagonal form costs less than a factorisation for each threshold.
  const bool by_spectrum = !p.certify && p.moments == nullptr && p.threshold_count > kThresholdGroup;
  for (const detail::LargeChunk& chunk : chunks) {
    b.first = chunk.first;
    b.count = chunk.count;
    b.first_scratch = chunk.first_scratch;
    b.first_shift = 0;
    b.shifts = 1;
    const dim3 matrices(static_cast<unsigned>(chunk.count));
    const auto factorise_shifts = [&](int64_t shifts) {
      detail::factorise_all(b, shapes, chunk, shifts, stream);
    };
    BSGAP_LAUNCH(describe_kernel, matrices, kLargeThreads, detail::kPlanShared, stream, b);
    if (p.spectrum || by_spectrum) {
      tridiagonalise(b, shapes, stream);
      if (p.spectrum) {
        const int64_t blocks = (shapes.side(b.first) + kLargeThreads - 1) / kLargeThreads;
        BSGAP_LAUNCH(bisection_kernel, dim3(static_cast<unsigned>(blocks), matrices.x), kLargeThreads,
                     detail::kLanczosShared, stream, b);
      }
      if (!p.certify) {
        BSGAP_LAUNCH(sturm_counts_kernel, matrices, kLargeThreads, detail::kLanczosShared, stream, b);
        continue;
      }
    }
    if (may_need_top) {
      propose_top(b, shapes, stream);
      for (int32_t attempt = 0; p.certify && attempt < 2; ++attempt) {
        BSGAP_LAUNCH(plan_top_kernel, matrices, kLargeThreads, detail::kPlanShared, stream, b, attempt);
        factorise_shifts(2);
      }
    }
    for (int64_t first = 0; first < p.threshold_count; first += kThresholdGroup) {
      const ThresholdRange range{
          first, static_cast<int32_t>(std::min<int64_t>(kThresholdGroup, p.threshold_count - first))};
      const bool absorb = p.certify && may_need_top && first == 0;
      BSGAP_LAUNCH(plan_thresholds_kernel, matrices, kLargeThreads, detail::kPlanShared, stream, b, range,
                   absorb);
      factorise_shifts((p.certify ? 2 : 1) * range.count);
      if (p.certify) {
        BSGAP_LAUNCH(plan_retry_kernel, matrices, kLargeThreads, detail::kRetryShared, stream, b, range);
        factorise_shifts(kShiftKinds * range.count);
      }
      BSGAP_LAUNCH(write_counts_kernel,
                   dim3(static_cast<unsigned>((chunk.count + kLargeThreads - 1) / kLargeThreads)),
                   kLargeThreads, 0, stream, b, range);
    }
  }
}

}  // namespace bsgap::cuda
