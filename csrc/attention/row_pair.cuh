// The online softmax of the attention forward, and the backward's probabilities, on scores as the tensor cores leave
// them (mma.sync m16n8, wgmma m64n8).
#pragma once

#include <cfloat>
#include <cmath>

#include "common/ptx.cuh"
#include "common/reduce.cuh"

namespace illada::attention {

// Two rows of scores, four neighbouring lanes to a row: lane l holds s[4 j + 2 i + e] of row i at key
// 8 j + l % 4 * 2 + e. Base 2. Probabilities are relative to a score that need not be the largest one: it moves only
// when some row of the warp has outgrown its own by kSlack, which is rare after the first tile, and no lane asks
// another one until then. 2^kSlack is as exact as 1 in either dtype. Beyond kFar there is no slack: the largest score
// is the reference, so that lse is what the backward makes of it.
//
// Scores are subtracted before they are scaled: a score that is the reference has probability 1, however large it is.
// s * scale - reference * scale in one fma would leave the error of the second product, which may be any number of
// powers of 2. References start at the lowest number: scores of -inf alone have a sum of 0 so, not -inf - -inf.
struct RowPair {
  static constexpr float kSlack = 8;
  static constexpr float kFar = 1 << 16;  // of reference * scale
  float reference[2], sum[2];             // of this lane's probabilities

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
  // the references have to move. Far from 0 neighbouring numbers are 2^-8 apart at least: any growth is made more than
  // kSlack.
  __device__ __forceinline__ float growth(const float (&top)[2], float scale_log2) const {
    float growth[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      growth[i] = (top[i] - reference[i]) * scale_log2;
      if (fabsf(reference[i]) * scale_log2 > kFar) growth[i] *= 1 << 12;
    }
    return fmaxf(growth[0], growth[1]);
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

// The logarithm of the sum of exp(scale * s), from a sum relative to a score. Of one score alone it is scale * s, as
// the backward rounds it where that is far from 0.
__device__ __forceinline__ float row_lse(float reference, float sum, float scale) {
  return fmaf(log2f(sum), float(M_LN2), __fmul_rn(reference, scale));
}

// The backward's probabilities, exp(scale * s - lse). In base 2 the exponent is one fma, s * scale_log2 - lse *
// log2(e). Both of its products are rounded, which is as exact as 16 bits while lse is no further from 0 than
// kMostNear: the error of the exponent is 2^-10 then. Rows that are far from 0 round scale * s as `row_lse` did, and
// subtract before they change the base: scores of any size have 1 if they alone make lse.
//
// A row's statistics have its `offset`: lse * log2(e), or of a far row 2 lse, which no near row's can be as large as.
// |lse| is below 2^127 so, which scores in fp32 cannot exceed while scale is at most 1/2.
constexpr float kMostNear = 1 << 12;  // of lse

__device__ __forceinline__ float offset_of(float lse) {
  return fabsf(lse) <= kMostNear ? lse * float(M_LOG2E) : 2 * lse;
}
__device__ __forceinline__ bool is_far(float offset) { return fabsf(offset) > 1.5f * kMostNear; }

// Scores become probabilities; offset(j) is that of s[j]'s row. `far`: may some row be far? The same for a warp.
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
