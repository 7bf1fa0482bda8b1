// Softmax of a row in one pass, relative to a moving reference:
//   sum = sum_v 2^d_v,   weighted = sum_v 2^d_v d_v,   d_v = (x_v - reference) log2 e
// so lse = reference + ln(sum) and entropy = (log2 sum - weighted / sum) ln 2. The largest x adds exactly 1. A NaN or
// +inf among the x makes `sum` NaN. If all x are -inf, `sum` stays 0.
#pragma once

#include <cfloat>

#include "common/constants.h"
#include "common/ptx.cuh"
#include "common/reduce.cuh"

namespace illada {

using ptx::exp2_approx;

template <bool kWantEntropy>
struct OnlineSoftmax {
  float reference = -FLT_MAX, sum = 0.0f, weighted = 0.0f;

  // Raises the reference to `maximum`, the largest of the x that come next, unless it is higher already.
  __device__ __forceinline__ void raise(float maximum) { rebase(fmaxf(reference, maximum)); }

  __device__ __forceinline__ void add(float x) {
    const float d = (x - reference) * kLog2eF, e = exp2_approx(d);
    sum += e;
    if constexpr (kWantEntropy) weighted = fmaf(e, fmaxf(d, -200.0f), weighted);  // avoids 0 * -inf
  }

  // Merges the states of kWidth neighbouring lanes. Each lane gets the result.
  template <int kWidth = 32>
  __device__ __forceinline__ void merge_lanes() {
    if constexpr (kWidth == 32) {
      rebase(from_ordered(__reduce_max_sync(kFullWarp, ordered(reference))));
    } else {
      rebase(warp_reduce<kWidth>(reference, [](float a, float b) { return fmaxf(a, b); }));
    }
    sum = warp_reduce<kWidth>(sum, [](float a, float b) { return a + b; });
    if constexpr (kWantEntropy) weighted = warp_reduce<kWidth>(weighted, [](float a, float b) { return a + b; });
  }

  // Converts the sums to another reference.
  __device__ __forceinline__ void rebase(float target) {
    const float shift = (reference - target) * kLog2eF, factor = exp2_approx(shift);
    if constexpr (kWantEntropy) weighted = (weighted + fmaxf(shift, -200.0f) * sum) * factor;
    sum *= factor;
    reference = target;
  }
};

}  // namespace illada
