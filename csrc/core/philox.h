// Counter-based random numbers: Philox4x32-10 (Salmon, Moraes, Dror & Shaw, SC'11), and Gaussians from
// it by Box-Muller. A draw depends on (seed, index, stream) only, never on what was drawn before.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <utility>

#include "host_device.h"

namespace bsgap {

BSGAP_HD inline std::array<uint32_t, 4> philox(uint64_t seed, uint64_t index, uint64_t stream) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  std::array<uint32_t, 4> c = {static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32),
                               static_cast<uint32_t>(stream), static_cast<uint32_t>(stream >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = 0xD2511F53ULL * c[0], p1 = 0xCD9E8D57ULL * c[2];
    c = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(p0)};
    k0 += 0x9E3779B9U;
    k1 += 0xBB67AE85U;
  }
  return c;
}

// Two independent standard normal numbers, from 53-bit uniforms in (0, 1].
BSGAP_HD inline std::pair<double, double> gaussian_pair(uint64_t seed, uint64_t index, uint64_t stream) {
  const auto r = philox(seed, index, stream);
  const auto uniform = [](uint32_t high, uint32_t low) {
    const uint64_t bits = (static_cast<uint64_t>(high) << 32 | low) >> 11;
    return (static_cast<double>(bits) + 1.0) * 0x1p-53;
  };
  const double radius = std::sqrt(-2.0 * std::log(uniform(r[0], r[1])));
  const double turn = uniform(r[2], r[3]);
#ifdef __CUDA_ARCH__
  // The same up to rounding, without the reduction of large angles, which would take a stack.
  return {radius * ::cospi(2 * turn), radius * ::sinpi(2 * turn)};
#else
  const double angle = 6.283185307179586 * turn;
  return {radius * std::cos(angle), radius * std::sin(angle)};
#endif
}

}  // namespace bsgap
