// The online softmax of the attention forward, on scores as the tensor cores leave them (mma.sync m16n8, wgmma m64n8).
#pragma once

#include <cmath>

#include "common/ptx.cuh"
#include "common/reduce.cuh"

namespace illada::attention {

// Two rows of scores, four neighbouring lanes to a row: lane l holds s[4 j + 2 i + e] of row i at key
// 8 j + l % 4 * 2 + e. Base 2. Probabilities are relative to a score that need not be the largest one: it moves only
// when some row of the warp has outgrown its own by kSlack, which is rare after the first tile, and no lane asks
// another one until then. 2^kSlack is as exact as 1 in either dtype.
struct RowPair {
  static constexpr float kSlack = 8;
  float reference[2];  // times scale_log2
  float sum[2];        // of this lane's probabilities

  __device__ __forceinline__ void reset() {
    reference[0] = reference[1] = -INFINITY;
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
    return fmaxf(fmaf(top[0], scale_log2, -reference[0]), fmaf(top[1], scale_log2, -reference[1]));
  }
  // The references move up to the largest score. What came before is to be multiplied by `rescale`.
  __device__ __forceinline__ void move(float (&top)[2], float scale_log2, float (&rescale)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      top[i] = warp_reduce<4>(top[i], [](float a, float b) { return fmaxf(a, b); });
      top[i] = fmaxf(top[i] * scale_log2, reference[i]);
      rescale[i] = ptx::exp2_approx(reference[i] - top[i]);
      sum[i] *= rescale[i];
      reference[i] = top[i];
    }
  }
  // Scores [first, last) become probabilities.
  template <int kCount>
  __device__ __forceinline__ void weigh(float (&s)[kCount], float scale_log2, int first = 0, int last = kCount) {
#pragma unroll
    for (int j = first; j < last; ++j) {
      s[j] = ptx::exp2_approx(fmaf(s[j], scale_log2, -reference[j / 2 % 2]));
      sum[j / 2 % 2] += s[j];
    }
  }
};

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
