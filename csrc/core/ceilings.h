// What one thread of this processor reaches at most: multiply-adds in registers and reading of memory.
// The benchmark compares the kernels with it; nothing else uses it.
#pragma once

#include <chrono>
#include <cstdint>

#include "isa.h"
#include "simd.h"

namespace bsgap {

// Calls round() until so many seconds are over; rounds a second. At least one round.
template <class F>
double rounds_per_second(double seconds, const F& round) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point start = Clock::now();
  int64_t rounds = 0;
  double spent = 0;
  do {
    round();
    ++rounds;
    spent = std::chrono::duration<double>(Clock::now() - start).count();
  } while (spent < seconds);
  return static_cast<double>(rounds) / spent;
}

// Rounds of a chain of dependent multiply-adds; about a millisecond.
inline constexpr int64_t kFmaRounds = 200000;

// `Chains` independent chains of x = x a + b on vectors of `Bytes`, all in registers: two units of a
// latency of 4 or 5 clocks need 8 to 10 of them, and 16 registers hold 12 beside a and b.
template <class T, int Bytes, int Chains>
[[gnu::always_inline]] inline double multiply_add_chains() {
  typedef T Vector __attribute__((vector_size(Bytes)));
  Vector x[Chains];
  for (Vector& v : x) v = Vector{} + T(1);
  volatile T factor = T(0.75), term = T(0.25);  // or the compiler would find that x stays 1
  const Vector a = Vector{} + factor, b = Vector{} + term;
  for (int64_t i = 0; i < kFmaRounds; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < Chains; ++j) x[j] = x[j] * a + b;
  }
  for (int j = 1; j < Chains; ++j) x[0] += x[j];  // returned, so that no chain is left out
  T sum = 0;
  for (int i = 0; i < static_cast<int>(Bytes / sizeof(T)); ++i) sum += x[0][i];
  return static_cast<double>(sum);
}

// Floating-point operations of one call of multiply_add_chains, a multiply-add counted as two.
template <class T, int Bytes, int Chains>
constexpr double chain_flops() {
  return 2.0 * kFmaRounds * Chains * (Bytes / sizeof(T));
}

inline constexpr int kReadAccumulators = 8;

// Sum of the words of a buffer, whatever they mean, as integers: the adds hide behind the loads.
template <class Word, int Bytes>
[[gnu::always_inline]] inline Word word_sum(const char* data, int64_t bytes) {
  using V = Simd<Word, Bytes>;
  typename V::Vector sum[kReadAccumulators] = {};
  for (int64_t i = 0; i + Bytes * kReadAccumulators <= bytes; i += Bytes * kReadAccumulators) {
#pragma GCC unroll 8
    for (int j = 0; j < kReadAccumulators; ++j)
      sum[j] += V::load(reinterpret_cast<const Word*>(data + i + j * Bytes));
  }
  for (int j = 1; j < kReadAccumulators; ++j) sum[0] += sum[j];
  Word total = 0;
  for (int i = 0; i < static_cast<int>(Bytes / sizeof(Word)); ++i) total += sum[0][i];
  return total;
}

#if BSGAP_X86_DISPATCH
template <class T>
BSGAP_AVX512 double multiply_adds_avx512() {
  return multiply_add_chains<T, 64, 16>();
}
template <class T>
BSGAP_AVX2 double multiply_adds_avx2() {
  return multiply_add_chains<T, 32, 12>();
}
BSGAP_AVX512 inline uint64_t read_words_avx512(const char* data, int64_t bytes) {
  return word_sum<uint64_t, 64>(data, bytes);
}
BSGAP_AVX2 inline uint64_t read_words_avx2(const char* data, int64_t bytes) {
  return word_sum<uint64_t, 32>(data, bytes);
}
#endif

// Without multiply-add instructions: a product and a sum each, which are the same two operations. Ten
// chains, since the products need registers too.
template <class T>
double multiply_adds_generic() {
  return multiply_add_chains<T, 16, 10>();
}

// Floating-point operations a second of the calling thread, a multiply-add counted as two.
template <class T>
double fma_rate(double seconds) {
  volatile double sink = 0;
  const auto rate = [&](double flops, double (*chains)()) {
    return flops * rounds_per_second(seconds, [&] { sink = sink + chains(); });
  };
#if BSGAP_X86_DISPATCH
  const Isa isa = instruction_set();
  if (isa == Isa::kAvx512) return rate(chain_flops<T, 64, 16>(), &multiply_adds_avx512<T>);
  if (isa == Isa::kAvx2) return rate(chain_flops<T, 32, 12>(), &multiply_adds_avx2<T>);
#endif
  return rate(chain_flops<T, 16, 10>(), &multiply_adds_generic<T>);
}

// Bytes a second at which the calling thread reads a buffer, over and over.
inline double read_rate(const char* data, int64_t bytes, double seconds) {
  volatile uint64_t sink = 0;
  const auto rate = [&](uint64_t (*read)(const char*, int64_t)) {
    return static_cast<double>(bytes) * rounds_per_second(seconds, [&] { sink = sink + read(data, bytes); });
  };
#if BSGAP_X86_DISPATCH
  const Isa isa = instruction_set();
  if (isa == Isa::kAvx512) return rate(&read_words_avx512);
  if (isa == Isa::kAvx2) return rate(&read_words_avx2);
#endif
  return rate(&word_sum<uint64_t, 16>);
}

}  // namespace bsgap
