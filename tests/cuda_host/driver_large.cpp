// Two matrices of more than 128 rows through the kernels of csrc/cuda/count_large.cuh, for the sanitizers
// (tests/test_cuda_sanitizers_large.py). Exits 1 on a wrong answer. First argument: which part.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "cuda/count_large.cuh"

namespace {

using namespace bsgap::cuda;

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "driver: %s\n", what);
  std::exit(1);
}

struct Workspace {
  explicit Workspace(int64_t bytes)
      : memory(std::aligned_alloc(256, static_cast<size_t>(bytes)), &std::free) {
    std::memset(memory.get(), 0xFF, static_cast<size_t>(bytes));
  }
  std::unique_ptr<void, decltype(&std::free)> memory;
};

// The eigenvalues of D + ones / 10 lie between and above those of D = diag(1, 2, ... k).
struct Input {
  explicit Input(const std::vector<int64_t>& all_sides) : sides(all_sides), batches(sides.size(), 1) {
    int64_t matrix = 0;
    for (const int64_t side : sides) {
      std::vector<int64_t> columns(kTableColumns, 0);
      columns[kFirstMatrix] = columns[kFirstResult] = matrix++;
      columns[kCount] = columns[kInner] = 1;
      columns[kSide] = columns[kOuter] = side;
      columns[kFirstGram] = static_cast<int64_t>(grams.size());
      columns[kRoundings] = 10;
      table.insert(table.end(), columns.begin(), columns.end());
      for (int64_t i = 0; i < side; ++i)
        for (int64_t j = 0; j < side; ++j) grams.push_back((i == j ? static_cast<double>(i + 1) : 0.0) + 0.1);
    }
    problem.grams = grams.data(), problem.table = table.data();
    problem.rows = static_cast<int64_t>(sides.size());
    problem.sides = sides.data(), problem.batches = batches.data();
  }
  std::vector<int64_t> sides, batches, table;
  std::vector<double> grams;
  CountProblem problem;
};

struct Options {
  bool certify = false, spectrum = false, relative = false;
};

void counts(const std::vector<int64_t>& sides, Options options) {
  Input in(sides);
  CountProblem& p = in.problem;
  int64_t total = 0;
  for (const int64_t side : sides) total += side;
  std::vector<int64_t> count(sides.size()), lower(count), upper(count);
  std::vector<double> eigenvalues(total);
  // The eigenvalue j counted from 1 lies between j and j + 1 but for the largest.
  const int64_t below = 4 * sides.back() / 5;
  p.certify = options.certify, p.spectrum = options.spectrum;
  if (options.relative)
    p.rtol = std::sqrt(0.5);  // the largest of 17 is 17.1, the eighth is 8.1
  else
    p.atol = std::sqrt(static_cast<double>(below + 1));
  p.counts = count.data(), p.lower = lower.data(), p.upper = upper.data();
  p.eigenvalues = eigenvalues.data();
  Workspace workspace(count_large_workspace_bytes(p));
  count_large_grams(p, workspace.memory.get(), nullptr);
  int64_t first = 0;
  for (size_t i = 0; i < sides.size(); first += sides[i++]) {
    if (options.spectrum)
      for (int64_t j = 0; j + 1 < sides[i]; ++j)
        require(eigenvalues[first + j] > j + 1 && eigenvalues[first + j] < j + 2, "eigenvalues");
    int64_t expected = sides[i] - below;
    if (options.relative) expected = sides[i] - sides[i] / 2;
    require(count[i] == expected, "count");
    require(!options.certify || (lower[i] == count[i] && upper[i] == count[i]), "interval");
  }
}

// With room for two factorisations: two matrices, then one; certified, one after the other, a shift or two at
// a time.
void chunks(bool certify) {
  Input in({150, 131, 130});
  CountProblem& p = in.problem;
  std::vector<int64_t> count(3), lower(count), upper(count);
  p.rtol = 0.5, p.certify = certify;
  p.counts = count.data(), p.lower = lower.data(), p.upper = upper.data();
  const auto parts = detail::large_chunks(p, LargeShapes(p));
  require(parts.size() == (certify ? 3 : 2), "chunks");
  require(parts[0].count == (certify ? 1 : 2) && parts.back().first == 2, "matrices of a chunk");
  require(parts[0].shifts == 1 && parts.back().shifts == (certify ? 2 : 1), "shifts at a time");
  Workspace workspace(count_large_workspace_bytes(p));
  count_large_grams(p, workspace.memory.get(), nullptr);
  for (size_t i = 0; i < 3; ++i) {
    // The largest eigenvalue lies between k and 1.1 k.
    const double k = static_cast<double>(in.sides[i]), found = static_cast<double>(count[i]);
    require(found > k - 1.1 * k / 4 - 1 && found < k - k / 4 + 1, "count");
    require(!certify || (lower[i] == count[i] && upper[i] == count[i]), "interval");
  }
}

void lanczos(const std::vector<int64_t>& sides) {
  Input in(sides);
  in.problem.rtol = 0.5;
  const LargeShapes shapes(in.problem);
  const auto chunks = detail::large_chunks(in.problem, shapes);
  const auto places = detail::large_workspace(shapes, chunks);
  Workspace workspace(places.bytes);
  unsigned char* base = static_cast<unsigned char*>(workspace.memory.get());
  LargeBatch b{};
  b.problem = in.problem;
  b.matrices = reinterpret_cast<LargeMatrix*>(base + places.matrices);
  b.scratch = reinterpret_cast<double*>(base + places.scratch);
  b.count = shapes.matrices();
  b.shifts = 1;
  BSGAP_LAUNCH(describe_kernel, dim3(static_cast<unsigned>(b.count)), kLargeThreads, detail::kPlanShared,
               nullptr, b);
  propose_top(b, shapes, nullptr, 4);  // to the first look at the Ritz value
  for (size_t i = 0; i < sides.size(); ++i) {
    const double k = static_cast<double>(sides[i]);
    require(b.matrices[i].theta > 0.5 * k && b.matrices[i].theta < 1.1 * k + 1, "theta");
    require(b.matrices[i].top_lower <= b.matrices[i].theta, "lower bound");
    require(b.matrices[i].top_upper >= k, "upper bound");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const char* what = argc > 1 ? argv[1] : "counts";
  // Three panels: a narrow and a full update; the second matrix has only two.
  if (std::strcmp(what, "counts") == 0) counts({140, 128 + 1}, {});
  if (std::strcmp(what, "certified") == 0) counts({140, 130}, {.certify = true});
  if (std::strcmp(what, "chunks") == 0) {
    chunks(false);
    chunks(true);
  }
  if (std::strcmp(what, "lanczos") == 0) lanczos({130});
  // With BSGAP_TEST_SMALL_SIDE: the rest of the sequence, on one panel.
  if (std::strcmp(what, "top") == 0) counts({17}, {.certify = true, .relative = true});
  if (std::strcmp(what, "spectrum") == 0) counts({20, 17}, {.spectrum = true});
  host::print_launches();
  return 0;
}
