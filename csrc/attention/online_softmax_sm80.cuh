// Online softmax of the attention forward on sm_80.
#pragma once

#include <cfloat>
#include <cmath>

#include "common/ptx.cuh"
#include "common/reduce.cuh"

namespace illada::attention {
namespace {

// Online softmax, in base 2, of two rows of scores in the layout of mma.sync m16n8's accumulators. Four neighbouring
// lanes share a row: lane l holds s[4 j + 2 i + e] of row i at key 8 j + l % 4 * 2 + e.
//
// Probabilities are relative to a reference score, which need not be the largest one. References move only when some
// row of the warp has outgrown its reference by kSlack. That is rare after the first tile, and lanes exchange nothing
// until then. 2^kSlack is as exact as 1 in either dtype. Beyond kFar there is no slack: the reference is the largest
// score, so that lse equals what the backward computes from it.
//
// Scores are subtracted before they are scaled. A score that equals the reference then has probability 1, however large
// it is. One fma for s * scale - reference * scale would leave the error of the second product, which may be any number
// of powers of 2. References start at the lowest finite number: rows with only -inf then have a sum of 0 and do not
// compute -inf - -inf.
struct OnlineSoftmax {
  static constexpr float kSlack = 8;
  static constexpr float kFar = 1 << 16;  // limit of reference * scale
  float reference[2], sum[2];             // sum: of this lane's probabilities

  __device__ __forceinline__ void reset() {
    reference[0] = reference[1] = -FLT_MAX;
    sum[0] = sum[1] = 0;
  }
  // Computes the largest of this lane's scores in each row.
  template <int kCount>
  static __device__ __forceinline__ void maxima(const float (&s)[kCount], float (&top)[2]) {
    float some[4] = {s[0], s[1], s[2], s[3]};
#pragma unroll
    for (int j = 4; j < kCount; ++j) some[j % 4] = fmaxf(some[j % 4], s[j]);
    top[0] = fmaxf(some[0], some[1]);
    top[1] = fmaxf(some[2], some[3]);
  }
  // Returns how far the rows exceed their references, in powers of 2. If it is more than kSlack in any lane of the
  // warp, the references must move. Far from 0, neighbouring numbers are at least 2^-8 apart. Any growth there is
  // scaled to more than kSlack.
  __device__ __forceinline__ float growth(const float (&top)[2], float scale_log2) const {
    float growth[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      growth[i] = (top[i] - reference[i]) * scale_log2;
      if (fabsf(reference[i]) * scale_log2 > kFar) growth[i] *= 1 << 12;
    }
    return fmaxf(growth[0], growth[1]);
  }
  // Moves the references up to the largest score. Earlier results must be multiplied by `rescale`.
  __device__ __forceinline__ void move(float (&top)[2], float scale_log2, float (&rescale)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      top[i] = warp_reduce<4>(top[i], [](float a, float b) { return fmaxf(a, b); });
      top[i] = fmaxf(top[i], reference[i]);
      rescale[i] = ptx::exp2_approx((reference[i] - top[i]) * scale_log2);
      sum[i] *= rescale[i];
      reference[i] = top[i];
    }
  }
  // Converts scores [first, last) to probabilities.
  template <int kCount>
  __device__ __forceinline__ void weigh(float (&s)[kCount], float scale_log2, int first = 0, int last = kCount) {
#pragma unroll
    for (int j = first; j < last; ++j) {
      s[j] = ptx::exp2_approx((s[j] - reference[j / 2 % 2]) * scale_log2);
      sum[j / 2 % 2] += s[j];
    }
  }
};

}  // namespace
}  // namespace illada::attention
