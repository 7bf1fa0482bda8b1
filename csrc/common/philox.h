// Philox4x32-10 (Salmon et al., SC'11): four random 32-bit words as a pure function of (counter, key).
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace illada {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;  // round multipliers
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;  // key increments

// Streams: counter word 3, one for each purpose. Words of different streams are independent. The numbers are part of
// the results for a seed and never change.
enum PhiloxStream : uint32_t {
  // 0 to 15: forward process and scoring, in Python (illada.philox).
  kStreamSample = 16,         // token sampler: upper 32 bits of the uniforms
  kStreamSampleLowBits = 17,  // token sampler: lower 32 bits, drawn only for tokens that can still win
  kStreamSampleRandom = 18,   // Measure::kRandom
  // From 19 on: commit rules, in Python (illada.philox).
};

// A counter, or the four random words of one.
struct PhiloxWords {
  uint32_t word[4];
};

// Computes one of the ten rounds.
ILLADA_HOST_DEVICE PhiloxWords philox_round(const PhiloxWords& c, uint32_t key0, uint32_t key1) {
  const uint64_t p0 = uint64_t(kPhiloxM0) * c.word[0], p1 = uint64_t(kPhiloxM1) * c.word[2];
  return {{uint32_t(p1 >> 32) ^ c.word[1] ^ key0, uint32_t(p1), uint32_t(p0 >> 32) ^ c.word[3] ^ key1, uint32_t(p0)}};
}

// Returns the four random words of counter `c`.
ILLADA_HOST_DEVICE PhiloxWords philox4x32(PhiloxWords c, uint32_t key0, uint32_t key1) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    c = philox_round(c, key0, key1);
    key0 += kPhiloxW0;
    key1 += kPhiloxW1;
  }
  return c;
}

}  // namespace illada
