// Online softmax of the attention forward, and probabilities of the backward. Scores are in the tensor cores'
// accumulator layout (mma.sync m16n8, wgmma m64n8).
#pragma once

#include <cfloat>
#include <cmath>

#include "common/ptx.cuh"
#include "common/reduce.cuh"

namespace illada::attention {

// Online softmax, in base 2, of two rows of scores. Four neighbouring lanes share a row: lane l holds s[4 j + 2 i + e]
// of row i at key 8 j + l % 4 * 2 + e.
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
struct RowPair {
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

// Returns the natural log of the sum of exp(scale * s), from a sum relative to a score. For a single score it is
// scale * s, rounded as the backward rounds it where it is far from 0.
__device__ __forceinline__ float row_lse(float reference, float sum, float scale) {
  return fmaf(log2f(sum), float(M_LN2), __fmul_rn(reference, scale));
}

// The backward's probabilities are exp(scale * s - lse). In base 2 the exponent is one fma, s * scale_log2 - lse *
// log2(e). Both of its products are rounded. That is as exact as 16 bits while |lse| is at most kMostNear: the error of
// the exponent is then 2^-10. Rows that are far from 0 round scale * s as `row_lse` does, and subtract before they
// change the base. A score of any size then has probability 1 if lse comes from it alone.
//
// A row's statistics contain its `offset`: lse * log2(e), or 2 lse for a far row. No near row's offset is as large.
// |lse| must therefore be below 2^127. Scores in fp32 cannot exceed that while scale is at most 1/2.
constexpr float kMostNear = 1 << 12;  // largest |lse| of a near row

__device__ __forceinline__ float offset_of(float lse) {
  return fabsf(lse) <= kMostNear ? lse * float(M_LOG2E) : 2 * lse;
}
__device__ __forceinline__ bool is_far(float offset) { return fabsf(offset) > 1.5f * kMostNear; }

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
