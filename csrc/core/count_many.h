// Point counts of many matrices of any shapes in one call: large ones take all threads in turn, small ones
// are shared out, and those of one small side are counted side by side in vector lanes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <vector>

#include "certified_gram.h"
#include "counts.h"
#include "lanes.h"
#include "parallel.h"

namespace bsgap {

// Of a Gram matrix G: what costs nothing beside counts.
struct Moments {
  double trace = 0;
  double frobenius = 0;  // norm of G
  double largest = 0;    // eigenvalue, to about 1e-6
};

struct CountJob {
  MatrixView a;  // of a given Gram matrix: nothing but its side, as rows and as columns
  GramPrecision precision = GramPrecision::kFloat64;
  const Threshold* thresholds = nullptr;
  int64_t count = 0;  // of thresholds
  int64_t* counts = nullptr;
  // At most the smallest tau / sigma_max: a caller takes singular values where the Gram matrix does not
  // resolve it.
  double* smallest_tau = nullptr;
  const double* gram = nullptr;  // side x side, lower triangle: given, then nothing is read of a
  Moments* moments = nullptr;    // if wanted
};

// A Gram matrix that was summed up elsewhere, without a bound of its error; brought into the range in which
// squares of its entries neither over- nor underflow. Where it lies there as it stands nothing is copied, and
// r.g is empty: `entries_of` says where to look.
inline CertifiedGram given_gram(const double* g, int64_t side) {
  ScopedIeee ieee;
  CertifiedGram r;
  r.side = side;
  double trace = 0;
  for (int64_t i = 0; i < side; ++i) trace += g[i * side + i];
  if (!(trace < kInfinity) || trace == 0) {
    r.content = trace == 0 ? Content::kZero : Content::kNonFinite;
    return r;
  }
  if (!(trace > 0x1p-400 && trace < 0x1p400)) r.exponent = -std::ilogb(trace) / 2;
  const double scale = std::ldexp(1.0, r.exponent);
  r.frobenius_sq = trace * scale * scale;
  if (r.exponent == 0) return r;
  r.g = Buffer<double>(side * side);
  for (int64_t i = 0; i < side; ++i)
    for (int64_t j = 0; j <= i; ++j) r.g[i * side + j] = g[i * side + j] * scale * scale;
  return r;
}

// given: what given_gram was called with, if r came from it.
inline const double* entries_of(const CertifiedGram& r, const double* given) {
  return r.g.size() > 0 ? r.g.data() : given;
}

namespace detail {

// A matrix with more arithmetic than this (about a millisecond) gets all threads for itself.
inline constexpr double kSharedWork = 64e6;

inline double work_of(const CountJob& job) {
  const double m = static_cast<double>(job.a.rows), n = static_cast<double>(job.a.cols), k = std::min(m, n);
  return (job.gram ? 0 : m * n * k) + 2 * k * k * k;
}

inline CertifiedGram gram_of(const CountJob& job, bool center, const ParallelFor& parallel,
                             Upcoming next = {}) {
  if (job.gram) return given_gram(job.gram, job.a.cols);
  return certified_gram(job.a, job.a.cols <= job.a.rows, center, job.precision, parallel, next);
}

// Thresholds of A * 2^exponent.
inline std::vector<Threshold> thresholds_of(const CountJob& job, const CertifiedGram& r) {
  std::vector<Threshold> result(job.thresholds, job.thresholds + job.count);
  for (Threshold& t : result) t = scaled(t, r.exponent);
  return result;
}

// The moments that need no eigenvalue; NaN where the matrix is not finite.
inline void begin_moments(const CountJob& job, const CertifiedGram& r) {
  if (!job.moments) return;
  const double nan = std::numeric_limits<double>::quiet_NaN();
  *job.moments = r.content == Content::kNonFinite ? Moments{nan, nan, nan} : Moments{};
  if (r.content != Content::kFinite) return;
  const double* g = entries_of(r, job.gram);
  const double back = std::ldexp(1.0, -r.exponent);
  double trace = 0, squares = 0;
  for (int64_t i = 0; i < r.side; ++i) {
    const double* row = g + i * r.side;
    double part = 0;
    for (int64_t j = 0; j < i; ++j) part += row[j] * row[j];
    trace += row[i];
    squares += 2 * part + row[i] * row[i];
  }
  job.moments->trace = trace * back * back;
  job.moments->frobenius = std::sqrt(squares) * back * back;
}

inline void set_largest(const CountJob& job, const CertifiedGram& r, double largest) {
  if (!job.moments) return;
  const double back = std::ldexp(1.0, -r.exponent);
  job.moments->largest = largest * back * back;
}

// Whether there is an eigenvalue to look at; fills in what is known without.
inline bool begin_count(const CountJob& job, const CertifiedGram& r,
                        const std::vector<Threshold>& thresholds) {
  begin_moments(job, r);
  double smallest_tau = kInfinity;
  for (int64_t t = 0; t < job.count; ++t) {
    if (r.content != Content::kFinite) {
      job.counts[t] = trivial_count(r.content, thresholds[t], r.side);
      continue;
    }
    const double sigma = std::sqrt(r.frobenius_sq / static_cast<double>(r.side));  // at most sigma_max
    const double tau = std::max(thresholds[t].absolute, thresholds[t].relative * sigma);
    if (tau >= 0) smallest_tau = std::min(smallest_tau, tau / std::sqrt(r.frobenius_sq));
  }
  if (job.smallest_tau) *job.smallest_tau = smallest_tau;
  return r.content == Content::kFinite && job.count > 0;
}

inline void count_alone(const CountJob& job, const CertifiedGram& r, const ParallelFor& parallel) {
  const std::vector<Threshold> thresholds = thresholds_of(job, r);
  if (!begin_count(job, r, thresholds)) return;
  double largest = 0;
  point_counts(entries_of(r, job.gram), r.side, thresholds.data(), job.count, job.counts, parallel,
               job.moments ? &largest : nullptr);
  set_largest(job, r, largest);
}

// Up to kLanes matrices of one side.
inline void count_in_lanes(const CountJob* const* jobs, const CertifiedGram* grams, int number) {
  ScopedIeee ieee;
  const CountJob* with_work[kLanes];
  const CertifiedGram* scaled[kLanes];
  const double* g[kLanes];
  std::vector<Threshold> thresholds[kLanes];
  int lanes = 0;
  int64_t most = 0;
  for (int i = 0; i < number; ++i) {
    thresholds[lanes] = thresholds_of(*jobs[i], grams[i]);
    if (!begin_count(*jobs[i], grams[i], thresholds[lanes])) continue;
    with_work[lanes] = jobs[i];
    scaled[lanes] = &grams[i];
    g[lanes++] = entries_of(grams[i], jobs[i]->gram);
    most = std::max(most, jobs[i]->count);
  }
  if (lanes == 0) return;
  const int64_t side = grams[0].side;
  LaneSpectra spectra(g, lanes, side);
  const Lanes top = spectra.largest();
  for (int l = 0; l < lanes; ++l) set_largest(*with_work[l], *scaled[l], std::max(top[l], 0.0));
  for (int64_t t = 0; t < most; ++t) {
    Lanes shift{};
    CountAt at[kLanes];
    for (int l = 0; l < lanes; ++l)
      if (t < with_work[l]->count) {
        at[l] = count_at(thresholds[l][t], side, std::max(top[l], 0.0));
        if (!at[l].known) shift[l] = at[l].tau_squared;
      }
    const Lanes counts = spectra.count_above(shift);
    for (int l = 0; l < lanes; ++l)
      if (t < with_work[l]->count)
        with_work[l]->counts[t] = at[l].known ? at[l].count : static_cast<int64_t>(counts[l]);
  }
}

// Matrices of one small side that are counted together, and single ones of a larger side.
struct CountGroup {
  const CountJob* jobs[kLanes];
  CertifiedGram grams[kLanes];
  int number = 0;

  void form_gram(int i, bool center) {
    Upcoming next;
    if (i + 1 < number && !jobs[i]->gram)
      next = jobs[i + 1]->a.upcoming(0, std::min<int64_t>(jobs[i + 1]->a.rows, kChunk));
    grams[i] = gram_of(*jobs[i], center, serial_for, next);
  }
  void count() {
    if (grams[0].side <= kLaneSide) {
      count_in_lanes(jobs, grams, number);
    } else {
      count_alone(*jobs[0], grams[0], serial_for);
    }
    for (int i = 0; i < number; ++i) grams[i] = {};  // or the memory of all would be held to the end
  }
};

inline std::vector<CountGroup> groups_of(const std::vector<const CountJob*>& jobs) {
  std::vector<CountGroup> groups;
  groups.reserve(jobs.size());
  std::map<int64_t, size_t> open;  // by side, the group that still has lanes
  for (const CountJob* job : jobs) {
    const int64_t side = std::min(job->a.rows, job->a.cols);
    const auto found = open.find(side);
    if (side > kLaneSide || found == open.end() || groups[found->second].number == kLanes) {
      open[side] = groups.size();
      groups.emplace_back();
    }
    CountGroup& group = groups[open[side]];
    group.jobs[group.number++] = job;
  }
  return groups;
}

// From here on a group is one piece of work; of fewer matrices every Gram matrix is one, so that all threads
// have some.
inline constexpr size_t kManyMatrices = 128;

inline void count_shared(const std::vector<const CountJob*>& jobs, bool center, const ParallelFor& parallel) {
  std::vector<CountGroup> groups = groups_of(jobs);
  const int64_t number = static_cast<int64_t>(groups.size());
  // Forming a given Gram matrix takes no time.
  const bool given = std::all_of(jobs.begin(), jobs.end(), [](const CountJob* job) { return job->gram; });
  const bool many = jobs.size() >= kManyMatrices || given;
  if (!many) {
    std::vector<std::pair<CountGroup*, int>> members;
    for (CountGroup& group : groups)
      for (int i = 0; i < group.number; ++i) members.emplace_back(&group, i);
    balanced_for(static_cast<int64_t>(members.size()), parallel,
                 [&](int64_t i) { members[i].first->form_gram(members[i].second, center); });
  }
  balanced_for(number, parallel, [&](int64_t i) {
    if (many)
      for (int member = 0; member < groups[i].number; ++member) groups[i].form_gram(member, center);
    groups[i].count();
  });
}

}  // namespace detail

// Counts of all jobs; the result of each depends on itself alone, not on its company or the number of
// threads.
inline void count_many(const std::vector<CountJob>& jobs, bool center, const ParallelFor& parallel) {
  std::vector<const CountJob*> shared;
  for (const CountJob& job : jobs) {
    if (jobs.size() > 1 && detail::work_of(job) <= detail::kSharedWork) {
      shared.push_back(&job);
      continue;
    }
    const CertifiedGram r = detail::gram_of(job, center, parallel);
    const CountJob* alone = &job;
    if (r.side <= kLaneSide) {
      detail::count_in_lanes(&alone, &r, 1);
    } else {
      detail::count_alone(job, r, parallel);
    }
  }
  // The largest first: what is begun last is waited for.
  std::stable_sort(shared.begin(), shared.end(), [](const CountJob* x, const CountJob* y) {
    return std::min(x->a.rows, x->a.cols) > std::min(y->a.rows, y->a.cols);
  });
  if (!shared.empty()) detail::count_shared(shared, center, parallel);
}

}  // namespace bsgap
