// Runs the torch-free core over sizes around its tiles, panels and chunks; built by test_sanitizers.py under
// AddressSanitizer + UBSan and under ThreadSanitizer. Fails on a wrong count as well as on a report.
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

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

}  // namespace

int main(int argc, char** argv) {
  // Known answer of Philox4x32-10 for counter and key 0 (Random123, kat_vectors).
  const auto r = bsgap::philox(0, 0, 0);
  check(r[0] == 0x6627e8d5u && r[1] == 0xe169c58du && r[2] == 0xbc57ac4cu && r[3] == 0x9b00dbd8u, "philox",
        0);
  if (argc > 1 && std::string(argv[1]) == "threads") {
    run(700, 530, threaded_for);   // more than one block of G, parallel panels and products
    run(20000, 30, threaded_for);  // row slabs
    return 0;
  }
  for (const int64_t n : {1, 2, 7, 8, 9, 23, 24, 25, 63, 64, 65, 95, 96, 97, 200}) {
    run(n, n, bsgap::serial_for);
    run(n, 257, bsgap::serial_for);
    run(300, n, bsgap::serial_for);
  }
  return 0;
}
