// Runs the torch-free core over sizes around its tiles, panels and chunks; built by test_sanitizers.py under
// AddressSanitizer + UBSan and under ThreadSanitizer. Fails on a wrong count as well as on a report.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "core/count_many.h"
#include "core/counts.h"
#include "core/probe.h"

namespace {

void check(bool ok, const char* what, int64_t n) {
  if (ok) return;
  std::fprintf(stderr, "wrong: %s at %lld\n", what, static_cast<long long>(n));
  std::exit(1);
}

// Three threads, each a strided share: every parallel region of the core runs on more than one.
void threaded_for(int64_t count, const std::function<void(int64_t)>& body) {
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < 3; ++t)
    threads.emplace_back([=, &body] {
      for (int64_t i = t; i < count; i += 3) body(i);
    });
  for (auto& thread : threads) thread.join();
}

// diag(1, 1/2, 1/4, 1/8, 1/8 ...) and noise far below it: 3 values above 0.2.
std::vector<float> activation_matrix(int64_t rows, int64_t cols) {
  std::vector<float> a(rows * cols);
  for (int64_t i = 0; i < rows * cols; ++i)
    a[i] = static_cast<float>(1e-6 * bsgap::gaussian_pair(1, i, 0).first);
  for (int64_t i = 0; i < std::min(rows, cols); ++i)
    a[i * cols + i] += std::ldexp(1.0f, -static_cast<int>(std::min<int64_t>(i, 3)));
  return a;
}

void run(int64_t rows, int64_t cols, const bsgap::ParallelFor& parallel) {
  const std::vector<float> a = activation_matrix(rows, cols);
  const bsgap::MatrixView view{a.data(), bsgap::DType::kFloat32, rows, cols, cols, 1};
  const int64_t side = std::min(rows, cols), expected = std::min<int64_t>(side, 3);
  const bsgap::Threshold threshold{0.2, 0.0};
  for (const bool center : {false, true})
    for (const bool probed : {false, true}) {
      const auto precision = probed ? bsgap::GramPrecision::kFloat32 : bsgap::GramPrecision::kFloat64;
      bsgap::CertifiedGram r = bsgap::certified_gram(view, cols <= rows, center, precision, parallel);
      if (r.content != bsgap::Content::kFinite) continue;  // one row, centred: nothing is left
      if (!(r.rounding_error < bsgap::kInfinity)) bsgap::probe(view, cols <= rows, 5, r, parallel);
      bsgap::CountInterval interval;
      bsgap::certified_counts(r.g.data(), r.side, r.error(), &threshold, 1, &interval, parallel);
      check(interval.lower <= interval.upper && interval.upper <= side, "order of the interval", side);
      if (!center) check(interval.lower == expected && interval.upper == expected, "interval", side);
      int64_t count = 0;
      bsgap::point_counts(r.g.data(), r.side, &threshold, 1, &count, parallel);
      if (!center) check(count == expected, "count", side);
    }
}

// The matrix of the sine transform: dense, symmetric and orthogonal, so its eigenvalues are 1 and -1 and the
// trace tells how many of each. A part of the factorisation that is left out shows in the count.
void run_factorisation(int64_t n, const bsgap::ParallelFor& parallel) {
  std::vector<double> g(n * n), work(n * bsgap::factor_stride(n));
  const double step = std::acos(-1.0) / static_cast<double>(n + 1);
  double trace = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j)
      g[i * n + j] = std::sqrt(2.0 / static_cast<double>(n + 1)) *
                     std::sin(static_cast<double>((i + 1) * (j + 1) % (2 * n + 2)) * step);
    trace += g[i * n + i];
  }
  const bsgap::InertiaCount c = bsgap::count_above(g.data(), n, 0.1, work.data(), parallel);
  check(c.valid && c.factor_error < 0.5, "factorisation", n);
  check(c.positive == std::lround((static_cast<double>(n) + trace) / 2), "inertia", n);
}

// Entries as each dtype stores them; those of an activation matrix above its noise are powers of two.
void store(double value, bsgap::DType dtype, char* to) {
  const float narrow = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &narrow, sizeof bits);
  if (dtype == bsgap::DType::kFloat64) {
    std::memcpy(to, &value, sizeof value);
  } else if (dtype == bsgap::DType::kFloat32) {
    std::memcpy(to, &narrow, sizeof narrow);
  } else if (dtype == bsgap::DType::kBFloat16) {
    const uint16_t half = static_cast<uint16_t>(bits >> 16);
    std::memcpy(to, &half, sizeof half);
  } else {
    const int exponent = static_cast<int>(bits >> 23 & 0xFF) - 112;  // below 1: too small, here 0
    uint32_t half = exponent < 1 ? 0 : std::min(exponent, 31) << 10 | (bits >> 13 & 0x3FF);
    const uint16_t stored = static_cast<uint16_t>(half | (bits >> 16 & 0x8000));
    std::memcpy(to, &stored, sizeof stored);
  }
}

enum class Layout { kRows, kColumns, kPadded, kImages };

// An activation matrix in memory of its own, not a byte longer than it reaches.
struct Matrix {
  std::vector<char> data;
  bsgap::MatrixView view;
  int64_t expected = 0;  // values above 0.2; -1 with a NaN

  Matrix(int64_t rows, int64_t cols, bsgap::DType dtype, Layout layout, bool spoiled) {
    view = {nullptr, dtype, rows, cols, cols, 1};
    if (layout == Layout::kColumns) view.row_stride = 1, view.col_stride = rows;
    if (layout == Layout::kPadded) view.row_stride = 2 * cols + 3, view.col_stride = 2;
    if (layout == Layout::kImages && rows % 4 == 0 && rows >= cols) {  // four images, channels are columns
      view.group = rows / 4;
      view.row_stride = 1, view.col_stride = view.group, view.group_stride = view.group * cols;
    }
    const auto offset = [&](int64_t i, int64_t j) { return view.row_offset(i) + j * view.col_stride; };
    data.resize((offset(rows - 1, cols - 1) + 1) * view.item_bytes());
    const std::vector<float> values = activation_matrix(rows, cols);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j)
        store(values[i * cols + j], dtype, data.data() + offset(i, j) * view.item_bytes());
    expected = std::min<int64_t>(std::min(rows, cols), 3);
    if (spoiled) {
      store(std::nan(""), dtype, data.data() + offset(rows - 1, cols - 1) * view.item_bytes());
      expected = -1;
    }
    view.data = data.data();
  }
};

// Counts at 0.2 and at 10, all in one call.
void count_all(const std::vector<Matrix>& matrices, const bsgap::ParallelFor& parallel) {
  const bsgap::Threshold thresholds[] = {{0.2, 0.0}, {10.0, 0.1}};
  for (const bool center : {false, true}) {
    std::vector<bsgap::CountJob> jobs;
    std::vector<int64_t> counts(2 * matrices.size(), -7);
    std::vector<double> smallest(matrices.size());
    for (size_t i = 0; i < matrices.size(); ++i) {
      const auto precision = i % 3 == 0 ? bsgap::GramPrecision::kFloat64 : bsgap::GramPrecision::kFloat32;
      const int64_t number = 1 + static_cast<int64_t>(i % 2);
      jobs.push_back({matrices[i].view, precision, thresholds, number, &counts[2 * i], &smallest[i]});
    }
    bsgap::count_many(jobs, center, parallel);
    for (size_t i = 0; i < matrices.size(); ++i) {
      const int64_t expected = matrices[i].expected, where = static_cast<int64_t>(i);
      check(center ? (counts[2 * i] == -1) == (expected == -1) : counts[2 * i] == expected, "count of a list",
            where);
      check(counts[2 * i + 1] == (i % 2 == 0 ? -7 : std::min<int64_t>(expected, 0)), "second threshold",
            where);
    }
  }
}

// Lists of every side, dtype and layout, with lanes partly filled and NaN among the members; from 128
// matrices on a group is one piece of work.
void run_lists(const bsgap::ParallelFor& parallel) {
  const bsgap::DType dtypes[] = {bsgap::DType::kFloat64, bsgap::DType::kFloat32, bsgap::DType::kBFloat16,
                                 bsgap::DType::kFloat16};
  const auto matrix = [&](int64_t i, int64_t rows, int64_t cols) {
    return Matrix(rows, cols, dtypes[i % 4], static_cast<Layout>(i / 4 % 4), i % 5 == 3);
  };
  const int64_t sides[] = {1, 2, 7, 8, 9, 24, 63, 64, 65, 97};
  std::vector<Matrix> mixed, many, one;
  int64_t i = 0;
  for (const int64_t side : sides) {
    mixed.push_back(matrix(++i, 4 * side, side));
    mixed.push_back(matrix(++i, side, 40));
  }
  count_all(mixed, parallel);
  for (i = 0; i < 131; ++i) many.push_back(matrix(i, 20 + 4 * (i % 3), i % 7 == 6 ? 66 : 1 + i % 20));
  count_all(many, parallel);
  for (const int64_t side : {20, 80}) {
    one.clear();
    one.push_back(matrix(0, 2 * side, side));
    count_all(one, parallel);
  }
}

}  // namespace

int main(int argc, char** argv) {
  // Known answer of Philox4x32-10 for counter and key 0 (Random123, kat_vectors).
  const auto r = bsgap::philox(0, 0, 0);
  check(r[0] == 0x6627e8d5u && r[1] == 0xe169c58du && r[2] == 0xbc57ac4cu && r[3] == 0x9b00dbd8u, "philox",
        0);
  if (argc > 1 && std::string(argv[1]) == "threads") {
    run(700, 530, threaded_for);   // more than one block of G, parallel panels and products
    run(20000, 30, threaded_for);  // row slabs
    run_factorisation(530, threaded_for);
    run_lists(threaded_for);
    return 0;
  }
  for (const int64_t n : {1, 2, 7, 8, 9, 23, 24, 25, 63, 64, 65, 95, 96, 97, 200}) {
    run(n, n, bsgap::serial_for);
    run(n, 257, bsgap::serial_for);
    run(300, n, bsgap::serial_for);
  }
  run(4300, 130, bsgap::serial_for);  // slabs
  run(530, 520, bsgap::serial_for);   // blocks of G, shares of the product
  for (const int64_t n : {1, 8, 63, 64, 65, 130, 256, 257, 300, 330, 513, 530})  // strips of 256 columns
    run_factorisation(n, bsgap::serial_for);
  run_lists(bsgap::serial_for);
  return 0;
}
