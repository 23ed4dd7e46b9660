// What is factored next, decided on the device: between two rounds of factorisations one block per matrix
// reads what the last round found and writes the shifts of the next one. The rules are those of
// csrc/core/counts.h and spectral_norm.h with a fixed number of rounds; a round that nobody needs finds no
// active problem.
#pragma once

#include <limits>

#include "large_matrix.cuh"

namespace bsgap::cuda {

// Which thresholds a round is about: `count` <= kThresholdGroup of them from `first` on. Factorisation
// kind * count + j belongs to threshold first + j.
struct ThresholdRange {
  int64_t first;
  int32_t count;
};

enum ShiftKind : int32_t { kLowerShift, kUpperShift, kPointShift, kFarLowerShift, kFarUpperShift };

namespace detail {

__device__ inline Factorisation* factorisations_of(const LargeBatch& b, int64_t matrix) {
  return b.factorisations + matrix * kShiftsPerMatrix;
}

// Asks for a factorisation at `shift`, or for none. All threads call.
__device__ inline void request(PlanGroup& group, const LargeMatrix& m, Factorisation& f, bool wanted,
                               double shift) {
  wanted = wanted && std::abs(shift) < kInfinity;
  double largest = 0;
  if (wanted)
    for (int64_t i = threadIdx.x; i < m.task.side; i += kLargeThreads)
      largest = larger(largest, std::abs(m.task.g[i * (m.task.side + 1)] - shift));
  largest = group.max(largest);
  if (threadIdx.x == 0) {
    f.shift = shift;
    f.largest_diagonal = largest;
    f.active = wanted;
  }
}

// What the factorisations at two shifts near the top say of the largest eigenvalue. One thread calls.
__device__ inline void absorb_top(LargeMatrix& m, const Factorisation* f) {
  for (int s = 0; s < 2; ++s) {
    if (!f[s].active || !f[s].valid) continue;
    const double error = total_error(f[s]);
    if (f[s].positive == 0) {
      m.top_upper = std::fmin(m.top_upper, round_up(f[s].shift + error));
    } else {
      m.top_lower = larger(m.top_lower, round_down(f[s].shift - error));
    }
  }
}

// See a_priori_error in csrc/core/counts.h: only a guess of where to look.
__device__ inline double a_priori_error(PlanGroup& group, const LargeMatrix& m, double shift) {
  double part = 0;
  for (int64_t i = threadIdx.x; i < m.task.side; i += kLargeThreads)
    part += std::abs(m.task.g[i * (m.task.side + 1)] - shift);
  const double n = static_cast<double>(m.task.side);
  return m.gram_error + (2 * gamma(n + 4) + kUnitRoundoff) * group.sum(part);
}

// Counts that need no factorisation, as the interval [count, count].
__device__ inline bool decided_at_once(const LargeMatrix& m, const Threshold& t, int64_t& count) {
  count = 0;
  if (m.content == kContentNonFinite || is_nan(t)) {
    count = -1;
    return true;
  }
  if (is_negative(t)) {
    count = m.task.side;
    return true;
  }
  return m.content == kContentZero || t.relative >= 1;
}

__device__ inline double squared_threshold(const Threshold& t, double top) {
  const double a = larger(t.absolute, 0.0), r = larger(t.relative, 0.0);
  // r * (r * top), not (r * r) * top: r * r may underflow where the product does not.
  return larger(a * a, r * (r * top));
}

__device__ inline Bounds squared_threshold_bounds(const Threshold& t, const LargeMatrix& m) {
  const double a = larger(t.absolute, 0.0), r = larger(t.relative, 0.0);
  if (r == 0) return {round_down(a * a), round_up(a * a)};
  const double low = round_down(m.top_lower - m.gram_error), high = round_up(m.top_upper + m.gram_error);
  return {larger(round_down(a * a), round_down(r * (r * low))),
          larger(round_up(a * a), round_up(r * (r * high)))};
}

// Where to look next for an end that did not pass: a shift about as far as the last error asks, and one far
// out. Near an eigenvalue of a leading block the errors of neighbouring shifts differ by orders of magnitude,
// so a single second guess would often fail like the first.
struct NextShifts {
  double near, far;
};
inline constexpr double kNearErrors = 1.5, kFarErrors = 24;
inline constexpr double kNearSteps = 1.25, kFarSteps = 5;  // of the last distance, after a replaced pivot

// One thread looks at a lower end's factorisation.
__device__ inline NextShifts read_lower(const LargeMatrix& m, const Factorisation& f, LargeThreshold& t) {
  if (t.lower_stands || !f.active) return {kInfinity, kInfinity};
  const double distance = larger(f.shift - t.high, kTiny);
  NextShifts next{t.high + kNearSteps * distance, t.high + kFarSteps * distance};
  if (f.valid) {
    const double error = round_up(m.gram_error + total_error(f));
    if (f.positive == 0 || round_down(f.shift - error) >= t.high) {
      t.lower = f.positive;
      t.lower_stands = 1;
    }
    if (!f.replaced) next = {t.high + kNearErrors * error, t.high + kFarErrors * error};
  }
  return {next.near + outward_rounding(next.near), next.far + outward_rounding(next.far)};
}

__device__ inline NextShifts read_upper(const LargeMatrix& m, const Factorisation& f, LargeThreshold& t) {
  if (t.upper_stands || !f.active) return {-kInfinity, -kInfinity};
  const double distance = larger(t.low - f.shift, kTiny);
  NextShifts next{t.low - kNearSteps * distance, t.low - kFarSteps * distance};
  if (f.valid) {
    const double error = round_up(m.gram_error + total_error(f));
    if (f.positive == m.task.side || round_up(f.shift + error) <= t.low) {
      t.upper = f.positive;
      t.upper_stands = 1;
    }
    if (!f.replaced) next = {t.low - kNearErrors * error, t.low - kFarErrors * error};
  }
  return {next.near - outward_rounding(next.near), next.far - outward_rounding(next.far)};
}

}  // namespace detail

// Two shifts at which no eigenvalue should be left above. Attempt 0: just above the proposal, and wide of it.
// Attempt 1, if the interval is still wider than 1e-5: two inside it, nearer to its lower end.
__global__ void __launch_bounds__(kLargeThreads, 2) plan_top_kernel(LargeBatch b, int32_t attempt) {
  detail::PlanGroup group(dynamic_shared<double>());
  const int64_t index = b.first + blockIdx.x;
  LargeMatrix& m = b.matrices[index];
  Factorisation* f = detail::factorisations_of(b, index);
  if (attempt > 0) {
    if (threadIdx.x == 0) detail::absorb_top(m, f);
    group.sync();
  }
  const double low = m.top_lower, width = m.top_upper - low;
  const bool wanted =
      m.content == kContentFinite && m.needs_top && (attempt == 0 || m.top_upper > low * (1 + 1e-5));
  for (int s = 0; s < 2; ++s) {
    const double shift = attempt == 0 ? m.theta * (1 + (s == 0 ? 1e-6 : 1e-3)) + kTiny
                                      : low + width * (s == 0 ? 0x1p-7 : 0x1p-3);
    detail::request(group, m, f[s], wanted && shift < m.top_upper, shift);
  }
}

// The first shifts of every threshold: two ends if certified, else tau^2 itself. absorb: the factorisations
// still hold the last round about the largest eigenvalue.
__global__ void __launch_bounds__(kLargeThreads, 2)
    plan_thresholds_kernel(LargeBatch b, ThresholdRange range, bool absorb) {
  detail::PlanGroup group(dynamic_shared<double>());
  const int64_t index = b.first + blockIdx.x;
  LargeMatrix& m = b.matrices[index];
  Factorisation* f = detail::factorisations_of(b, index);
  if (absorb && threadIdx.x == 0) detail::absorb_top(m, f);
  group.sync();
  for (int j = 0; j < range.count; ++j) {
    const Threshold t = threshold_of(b.problem, m.task, range.first + j);
    int64_t count = 0;
    bool decided = detail::decided_at_once(m, t, count);
    if (!b.problem.certify) {
      const double shift = detail::squared_threshold(t, m.top_lower);
      decided = decided || !(shift < kInfinity);
      detail::request(group, m, f[j], !decided, shift);
      if (threadIdx.x == 0) b.thresholds[index * kThresholdGroup + j] = {0, 0, decided, 0, 0, count, count};
      continue;
    }
    const Bounds bounds = detail::squared_threshold_bounds(t, m);
    decided = decided || bounds.lower >= round_up(m.top_upper + m.gram_error);
    double low = 0, high = 0;
    if (!decided) {
      low = bounds.lower - 1.25 * detail::a_priori_error(group, m, bounds.lower);
      high = bounds.upper + 1.25 * detail::a_priori_error(group, m, bounds.upper);
    }
    detail::request(group, m, f[kLowerShift * range.count + j], !decided, high + outward_rounding(high));
    detail::request(group, m, f[kUpperShift * range.count + j], !decided, low - outward_rounding(low));
    if (threadIdx.x == 0)
      b.thresholds[index * kThresholdGroup + j] = {
          bounds.lower, bounds.upper, decided, decided, decided, count, decided ? count : m.task.side};
  }
}

// Certified only: reads both ends, asks twice more for those that did not pass, and for the count at tau^2
// itself where the ends differ or one is missing.
__global__ void __launch_bounds__(kLargeThreads, 2) plan_retry_kernel(LargeBatch b, ThresholdRange range) {
  double* shared = dynamic_shared<double>();
  detail::PlanGroup group(shared);
  double* next = shared + detail::PlanGroup::kScratch;  // shift of each kind; infinite: none
  const int64_t index = b.first + blockIdx.x;
  const LargeMatrix& m = b.matrices[index];
  Factorisation* f = detail::factorisations_of(b, index);
  for (int j = 0; j < range.count; ++j) {
    if (threadIdx.x == 0) {
      LargeThreshold& t = b.thresholds[index * kThresholdGroup + j];
      const detail::NextShifts lower = detail::read_lower(m, f[kLowerShift * range.count + j], t);
      const detail::NextShifts upper = detail::read_upper(m, f[kUpperShift * range.count + j], t);
      next[kLowerShift] = t.lower_stands ? kInfinity : lower.near;
      next[kFarLowerShift] = t.lower_stands ? kInfinity : lower.far;
      next[kUpperShift] = t.upper_stands ? kInfinity : upper.near;
      next[kFarUpperShift] = t.upper_stands ? kInfinity : upper.far;
      const bool point = !t.decided && !(t.lower_stands && t.upper_stands && t.lower == t.upper);
      const Threshold threshold = threshold_of(b.problem, m.task, range.first + j);
      next[kPointShift] = point ? detail::squared_threshold(threshold, m.top_lower) : kInfinity;
    }
    group.sync();
    for (int kind = 0; kind < kShiftKinds; ++kind)
      detail::request(group, m, f[kind * range.count + j], true, next[kind]);
    group.sync();
  }
}

// Results of a range of thresholds. One thread per matrix.
__global__ void __launch_bounds__(kLargeThreads, 2) write_counts_kernel(LargeBatch b, ThresholdRange range) {
  const CountProblem& p = b.problem;
  const int64_t in_batch = static_cast<int64_t>(blockIdx.x) * kLargeThreads + threadIdx.x;
  if (in_batch >= b.count) return;
  const int64_t index = b.first + in_batch;
  const LargeMatrix& m = b.matrices[index];
  const Factorisation* f = detail::factorisations_of(b, index);
  if (p.moments != nullptr && range.first == 0) {
    double* out = p.moments + m.task.result * kMoments;
    const bool finite = m.content == kContentFinite;
    const double other = m.content == kContentZero ? 0.0 : std::numeric_limits<double>::quiet_NaN();
    out[0] = finite ? m.trace : other;
    out[1] = finite ? m.back * m.frobenius : other;
    out[2] = finite ? m.theta : other;
  }
  for (int j = 0; j < range.count; ++j) {
    LargeThreshold t = b.thresholds[index * kThresholdGroup + j];
    const int64_t out = m.task.result * p.threshold_count + range.first + j;
    const Factorisation& point = f[(p.certify ? kPointShift * range.count : 0) + j];
    int64_t count = t.lower;
    if (!t.decided && point.active) count = point.valid ? point.positive : -1;
    if (p.certify) {
      if (!t.decided) {
        detail::read_lower(m, f[kLowerShift * range.count + j], t);
        detail::read_lower(m, f[kFarLowerShift * range.count + j], t);
        detail::read_upper(m, f[kUpperShift * range.count + j], t);
        detail::read_upper(m, f[kFarUpperShift * range.count + j], t);
        if (!t.lower_stands) t.lower = 0;
        if (!t.upper_stands) t.upper = m.task.side;
        // Ends that contradict each other mean that a bound was false; then nothing is known.
        if (t.lower > t.upper) t.lower = 0, t.upper = m.task.side;
        count = count < t.lower ? t.lower : count > t.upper ? t.upper : count;
      }
      p.lower[out] = t.lower;
      p.upper[out] = t.upper;
    }
    p.counts[out] = count;
  }
}

}  // namespace bsgap::cuda
