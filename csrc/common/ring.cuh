// A ring of stages between a producer and its consumers.
#pragma once

#include <cstdint>

namespace illada {

// The stage that is next, and the parity of its phase.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace illada
