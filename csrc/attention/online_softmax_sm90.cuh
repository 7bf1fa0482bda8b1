// Online softmax of the attention forward on sm_90a. Its common step needs no maximum.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "common/dtype.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"

namespace illada::attention {
namespace {

// Online softmax, in base 2, of two rows of scores in wgmma's layout. Four neighbouring lanes share a row.
//
// Probabilities are relative to a reference score, which need not be the largest one. A lane's share of a tile must sum
// to at most kMaxSum; that is as exact as 1 in either dtype. The exponentials therefore wait for no maximum and no
// other lane. A maximum is computed only in the first tile, and when a row has outgrown its reference, which is rare.
//
//   p = 2^(s * scale - offset); total = this lane's sum of p
//   if total > kMaxSum in any lane of the warp, or NaN:
//     move the references to the largest scores; compute p again; rescale the earlier results
//
// An exponent is one fma, s * scale - reference * scale, which leaves the error of the second product. In rows whose
// scores are far from 0, that error may be as large as 2^-9. There, scores are subtracted before they are scaled. The
// reference score then has probability 1, however large it is. The offset of such a row is -inf, which makes its lanes'
// sums infinite or NaN, so the common step needs no test for it. References start at the lowest finite number: rows
// with only -inf then have a sum of 0 and do not compute -inf - -inf.
struct OnlineSoftmax {
  static constexpr float kMaxSum = 256, kMaxSumLog2 = 8;
  static constexpr float kFar = 1 << 16;  // limit of reference * scale
  float reference[2], offset[2], sum[2];  // sum: of this lane's probabilities

  // Starts an item with its first tile.
  template <int kCount>
  __device__ __forceinline__ void start(const float (&s)[kCount], float scale_log2) {
    reference[0] = reference[1] = -FLT_MAX;
    raise_reference(s, scale_log2);
    sum[0] = sum[1] = 0;
  }

  // Converts scores to probabilities, packed as the A operand of the second product. Returns true if the reference has
  // moved. Earlier results must then be multiplied by `rescale`.
  template <typename T, int kCount>
  __device__ __forceinline__ bool update(const float (&s)[kCount], float scale_log2, uint32_t (&p)[kCount / 8][4],
                                         float (&rescale)[2]) {
    float total[2];
    exponentials<T>(s, p, total, [&](float x, int i) { return fmaf(x, scale_log2, -offset[i]); });
    const bool moves = __any_sync(kFullWarp, !(total[0] + total[1] <= kMaxSum));
    if (moves) {
      move_reference(s, scale_log2, rescale);
      exponentials<T>(s, p, total, [&](float x, int i) { return (x - reference[i]) * scale_log2; });
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) sum[i] += total[i];
    return moves;
  }

  // The same with the probabilities in place of the scores. The scores are lost, so each lane first computes its own
  // maximum. The reference moves before a probability of some row exceeds kMaxSum.
  template <int kCount>
  __device__ __forceinline__ bool update_in_place(float (&s)[kCount], float scale_log2, float (&rescale)[2]) {
    float top[4] = {s[0], s[1], s[2], s[3]};
#pragma unroll
    for (int j = 4; j < kCount; ++j) top[j % 4] = fmaxf(top[j % 4], s[j]);
    const float growth = fmaxf(fmaxf(top[0], top[1]) - reference[0], fmaxf(top[2], top[3]) - reference[1]);
    const bool moves =
        __any_sync(kFullWarp, growth * scale_log2 > kMaxSumLog2 || fminf(offset[0], offset[1]) == -INFINITY);
    if (moves) {
      move_reference(s, scale_log2, rescale);
      weigh(s, [&](float x, int i) { return (x - reference[i]) * scale_log2; });
    } else {
      weigh(s, [&](float x, int i) { return fmaf(x, scale_log2, -offset[i]); });
    }
    return moves;
  }

 private:
  template <int kCount>
  __device__ __forceinline__ void move_reference(const float (&s)[kCount], float scale_log2, float (&rescale)[2]) {
    rescale[0] = reference[0];
    rescale[1] = reference[1];
    raise_reference(s, scale_log2);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      rescale[i] = ptx::exp2_approx((rescale[i] - reference[i]) * scale_log2);
      sum[i] *= rescale[i];
    }
  }

  template <int kCount>
  __device__ __forceinline__ void raise_reference(const float (&s)[kCount], float scale_log2) {
    float top[4] = {reference[0], reference[0], reference[1], reference[1]};
#pragma unroll
    for (int j = 0; j < kCount; ++j) top[j % 4] = fmaxf(top[j % 4], s[j]);
    reference[0] = fmaxf(top[0], top[1]);
    reference[1] = fmaxf(top[2], top[3]);
#pragma unroll
    for (int lanes = 2; lanes; lanes /= 2) {
#pragma unroll
      for (int i = 0; i < 2; ++i) reference[i] = fmaxf(reference[i], __shfl_xor_sync(kFullWarp, reference[i], lanes));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      offset[i] = reference[i] * scale_log2;
      if (fabsf(offset[i]) > kFar) offset[i] = -INFINITY;
    }
  }

  // `exponent`: function of a score and its row i that returns the exponent.
  template <int kCount, typename Exponent>
  __device__ __forceinline__ void weigh(float (&s)[kCount], const Exponent& exponent) {
    float part[4] = {};
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      s[j] = ptx::exp2_approx(exponent(s[j], j / 2 % 2));
      part[j % 4] += s[j];
    }
    sum[0] += part[0] + part[1];
    sum[1] += part[2] + part[3];
  }

  template <typename T, int kCount, typename Exponent>
  __device__ __forceinline__ void exponentials(const float (&s)[kCount], uint32_t (&p)[kCount / 8][4],
                                               float (&total)[2], const Exponent& exponent) const {
    float part[4] = {};
#pragma unroll
    for (int j = 0; j < kCount; j += 2) {
      float x[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        x[e] = ptx::exp2_approx(exponent(s[j + e], j / 2 % 2));
        part[j % 4 + e] += x[e];
      }
      p[j / 8][j / 2 % 4] = pack2<T>(x[0], x[1]);
    }
    total[0] = part[0] + part[1];
    total[1] = part[2] + part[3];
  }
};

}  // namespace
}  // namespace illada::attention
