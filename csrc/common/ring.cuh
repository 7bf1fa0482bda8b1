// The stages of common/gemm_sm90.cuh's ring.
#pragma once

#include <cstdint>

#include "common/gemm_atoms_sm90.cuh"

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
