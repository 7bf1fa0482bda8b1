// Log-sum-exp of a row, probabilities of the backward, and the mask of missing keys. Scores are in the tensor cores'
// accumulator layout (mma.sync m16n8, wgmma m64n8).
#pragma once

#include <cmath>

#include "common/ptx.cuh"

namespace illada::attention {

// Returns the natural log of the sum of exp(scale * s), from a sum relative to a score. For a single score it is
// scale * s, rounded as the backward rounds it where it is far from 0.
__device__ __forceinline__ float row_lse(float reference, float sum, float scale) {
  return fmaf(log2f(sum), float(M_LN2), __fmul_rn(reference, scale));
}

// The backward's probabilities are exp(scale * s - lse). In base 2 the exponent is one fma, s * scale_log2 - lse *
// log2(e). Both of its products are rounded. That is as exact as 16 bits while |lse| is at most kMaxNear: the error of
// the exponent is then 2^-10. Rows that are far from 0 round scale * s as `row_lse` does, and subtract before they
// change the base. A score of any size then has probability 1 if lse comes from it alone.
//
// A row's statistics contain its `offset`: lse * log2(e), or 2 lse for a far row. No near row's offset is as large.
// |lse| must therefore be below 2^127. Scores in fp32 cannot exceed that while scale is at most 1/2.
constexpr float kMaxNear = 1 << 12;  // largest |lse| of a near row

__device__ __forceinline__ float offset_of(float lse) {
  return fabsf(lse) <= kMaxNear ? lse * float(M_LOG2E) : 2 * lse;
}
__device__ __forceinline__ bool is_far(float offset) { return fabsf(offset) > 1.5f * kMaxNear; }

// Converts scores to probabilities. offset(j): offset of s[j]'s row. `far`: some row may be far; uniform in a warp.
template <int kCount, typename Offset>
__device__ __forceinline__ void exponentiate(float (&s)[kCount], float scale, float scale_log2, bool far,
                                             const Offset& offset) {
  if (far) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const float lse = offset(j) * (is_far(offset(j)) ? 0.5f : float(M_LN2));
      s[j] = ptx::exp2_approx((__fmul_rn(s[j], scale) - lse) * float(M_LOG2E));
    }
  } else {
#pragma unroll
    for (int j = 0; j < kCount; ++j) s[j] = ptx::exp2_approx(fmaf(s[j], scale_log2, -offset(j)));
  }
}

// Sets the scores of keys from `valid` on to -inf.
template <int kCount>
__device__ __forceinline__ void mask_scores(float (&s)[kCount], int valid) {
  const int limit = valid - 2 * int(threadIdx.x % 4);
#pragma unroll
  for (int first = 0; first < kCount / 4; first += 4) {
    if (valid < 8 * (first + 4)) {
#pragma unroll
      for (int j = first; j < min(first + 4, kCount / 4); ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (8 * j + e >= limit) s[4 * j + e] = s[4 * j + 2 + e] = -INFINITY;
      }
    }
  }
}

}  // namespace illada::attention
