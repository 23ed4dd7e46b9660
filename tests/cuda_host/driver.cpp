// Small problems through every kernel, for the sanitizers (tests/test_cuda_sanitizers.py). Exits 1 on a wrong
// answer. First argument: which kernels; a further one: the rows of the single matrix that is counted.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda/count_small.cuh"
#include "cuda/summary.cuh"
#include "cuda/table_fill.cuh"

namespace {

using namespace bsgap::cuda;

// Gram matrices of one side: D + ones / 10, so that all of the eigenvalues 1, 2 ... k move a little up.
struct Row {
  int64_t side, count;
};

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "driver: %s\n", what);
  std::exit(1);
}

void count(const std::vector<Row>& rows, bool certify) {
  std::vector<int64_t> table, sides, batches;
  std::vector<double> grams;
  int64_t matrices = 0, eigenvalue_count = 0;
  for (const Row& r : rows) {
    std::vector<int64_t> columns(kTableColumns, 0);
    columns[kFirstMatrix] = columns[kFirstResult] = matrices;
    columns[kCount] = r.count;
    columns[kSide] = columns[kFeatures] = columns[kObservations] = columns[kOuter] = r.side;
    columns[kInner] = 1;
    columns[kFirstGram] = static_cast<int64_t>(grams.size());
    columns[kRoundings] = 10;
    table.insert(table.end(), columns.begin(), columns.end());
    sides.push_back(r.side);
    batches.push_back(r.count);
    for (int64_t b = 0; b < r.count; ++b)
      for (int64_t i = 0; i < r.side; ++i)
        for (int64_t j = 0; j < r.side; ++j)
          grams.push_back((i == j ? static_cast<double>(i + 1) : 0.0) + 0.1);
    matrices += r.count;
    eigenvalue_count += r.count * r.side;
  }
  // sigma > 0: all; sigma^2 > (k + 1)^2: none.
  const std::vector<double> thresholds = {0.5, 0.0, 1000.0, 0.0, 0.0, 0.25};
  const int64_t t = 3;
  std::vector<int64_t> counts(matrices * t), lower(counts), upper(counts), copy(table.size());
  std::vector<double> eigenvalues(eigenvalue_count), summary(matrices * bsgap::kSummaryColumns);
  fill_table(copy.data(), table.data(), static_cast<int64_t>(table.size()), nullptr);
  require(copy == table, "fill_table");
  CountProblem p;
  p.grams = grams.data(), p.table = table.data(), p.rows = static_cast<int64_t>(rows.size());
  p.sides = sides.data(), p.batches = batches.data();
  p.thresholds = thresholds.data(), p.threshold_count = t, p.certify = certify, p.spectrum = true;
  p.counts = counts.data(), p.lower = lower.data(), p.upper = upper.data(),
  p.eigenvalues = eigenvalues.data();
  count_small_grams(p, nullptr);
  summarize_grams(p, eigenvalues.data(), summary.data(), nullptr);
  int64_t matrix = 0;
  for (const Row& r : rows)
    for (int64_t b = 0; b < r.count; ++b, ++matrix) {
      require(counts[matrix * t] == r.side && counts[matrix * t + 1] == 0, "counts");
      require(!certify || (lower[matrix * t] == r.side && upper[matrix * t + 1] == 0), "intervals");
      require(std::abs(summary[matrix * bsgap::kSummaryColumns] -
                       std::sqrt(eigenvalues[matrix == 0 ? r.side - 1 : 0])) < 1e-12 ||
                  matrix > 0,
              "summary");
    }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "one") == 0) {
    count({{argc > 2 ? std::atoi(argv[2]) : 33, 1}}, false);
    return 0;
  }
  // Two blocks of 37 and 34 rows; five warps, three sides, the second block of warps not full.
  count({{37, 1}, {34, 1}, {9, 2}, {6, 2}, {1, 1}}, true);
  std::vector<int64_t> values(1203), copy(1203);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<int64_t>(i * i) - 7;
  fill_table(copy.data(), values.data(), 1203, nullptr);
  require(copy == values, "fill_table in chunks");
  host::print_launches();
  return 0;
}
