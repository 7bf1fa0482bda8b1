// The online softmax of the attention forward, on scores as the tensor cores leave them (mma.sync m16n8, wgmma m64n8).
#pragma once

#include <cfloat>
#include <cmath>

#include "common/ptx.cuh"
#include "common/reduce.cuh"

namespace illada::attention {

// Two rows of scores, four neighbouring lanes to a row: lane l holds s[4 j + 2 i + e] of row i at key
// 8 j + l % 4 * 2 + e. Base 2. Probabilities are relative to a score that need not be the largest one: it moves only
// when some row of the warp has outgrown its own by kSlack, which is rare after the first tile, and no lane asks
// another one until then. 2^kSlack is as exact as 1 in either dtype.
//
// Scores are subtracted before they are scaled: a score that is the reference has probability 1, however large it is.
// s * scale - reference * scale in one fma would leave the error of the second product, which may be any number of
// powers of 2. References start at the lowest number: scores of -inf alone have a sum of 0 so, not -inf - -inf.
struct RowPair {
  static constexpr float kSlack = 8;
  float reference[2], sum[2];  // of this lane's probabilities

  __device__ __forceinline__ void reset() {
    reference[0] = reference[1] = -FLT_MAX;
    sum[0] = sum[1] = 0;
  }
  // The largest of this lane's scores in each row.
  template <int kCount>
  static __device__ __forceinline__ void maxima(const float (&s)[kCount], float (&top)[2]) {
    float some[4] = {s[0], s[1], s[2], s[3]};
#pragma unroll
    for (int j = 4; j < kCount; ++j) some[j % 4] = fmaxf(some[j % 4], s[j]);
    top[0] = fmaxf(some[0], some[1]);
    top[1] = fmaxf(some[2], some[3]);
  }
  // By how much some row would outgrow its reference, in powers of 2: more than kSlack in any lane of the warp, and
  // the references have to move.
  __device__ __forceinline__ float growth(const float (&top)[2], float scale_log2) const {
    return fmaxf(top[0] - reference[0], top[1] - reference[1]) * scale_log2;
  }
  // The references move up to the largest score. What came before is to be multiplied by `rescale`.
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
  // Scores [first, last) become probabilities.
  template <int kCount>
  __device__ __forceinline__ void weigh(float (&s)[kCount], float scale_log2, int first = 0, int last = kCount) {
#pragma unroll
    for (int j = first; j < last; ++j) {
      s[j] = ptx::exp2_approx((s[j] - reference[j / 2 % 2]) * scale_log2);
      sum[j / 2 % 2] += s[j];
    }
  }
};

// The logarithm of the sum of exp(scale * s), from a sum relative to a score. Of one score alone it is scale * s as the
// backward rounds it too.
__device__ __forceinline__ float row_lse(float reference, float sum, float scale) {
  return fmaf(log2f(sum), float(M_LN2), __fmul_rn(reference, scale));
}

// exp(scale * s - lse), with the product rounded by itself: of scores of any size those that make lse have 1.
__device__ __forceinline__ float probability(float s, float scale, float lse) {
  return ptx::exp2_approx((__fmul_rn(s, scale) - lse) * float(M_LOG2E));
}

// Keys from `valid` on do not count.
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
