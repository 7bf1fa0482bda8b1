// The online softmax of the attention forward on sm_90a, which looks for no maximum in the common step.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "common/dtype.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"

namespace illada::attention {
namespace {

// Two rows of scores in wgmma's layout, four neighbouring lanes to a row: the online softmax in base 2. Probabilities
// are relative to a score that need not be the largest one, as long as a lane's share of a tile sums to no more than
// kMost, which is as exact as 1 in either dtype. So the exponentials wait for no maximum and no other lane, and nobody
// looks for a maximum but in the first tile, and when a row has outgrown its reference, which is rare.
struct SoftmaxRows {
  static constexpr float kMost = 256, kMostLog2 = 8;
  float reference[2], sum[2];  // of this lane's probabilities

  // The first tile of an item.
  template <int kCount>
  __device__ __forceinline__ void start(const float (&s)[kCount]) {
    reference[0] = reference[1] = -FLT_MAX;
    raise_reference(s);
    sum[0] = sum[1] = 0;
  }

  // Scores to probabilities, packed as the A operand of the second product. True: the reference has moved, and what
  // came before is to be multiplied by `rescale`.
  template <typename T, int kCount>
  __device__ __forceinline__ bool update(const float (&s)[kCount], float scale_log2, uint32_t (&p)[kCount / 8][4],
                                         float (&rescale)[2]) {
    float total[2];
    exponentials<T>(s, scale_log2, p, total);
    const bool moves = __any_sync(kFullWarp, fmaxf(total[0], total[1]) > kMost);
    if (moves) {
      move_reference(s, scale_log2, rescale);
      exponentials<T>(s, scale_log2, p, total);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) sum[i] += total[i];
    return moves;
  }

  // The same with the probabilities in the place of the scores. As those are gone afterwards, each lane looks for its
  // own maximum first: the reference moves before a probability of some row exceeds kMost.
  template <int kCount>
  __device__ __forceinline__ bool update_in_place(float (&s)[kCount], float scale_log2, float (&rescale)[2]) {
    float top[4] = {s[0], s[1], s[2], s[3]};
#pragma unroll
    for (int j = 4; j < kCount; ++j) top[j % 4] = fmaxf(top[j % 4], s[j]);
    const float growth = fmaxf(fmaxf(top[0], top[1]) - reference[0], fmaxf(top[2], top[3]) - reference[1]);
    const bool moves = __any_sync(kFullWarp, growth * scale_log2 > kMostLog2);
    if (moves) move_reference(s, scale_log2, rescale);
    float part[4] = {};
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      s[j] = ptx::exp2_approx((s[j] - reference[j / 2 % 2]) * scale_log2);
      part[j % 4] += s[j];
    }
    sum[0] += part[0] + part[1];
    sum[1] += part[2] + part[3];
    return moves;
  }

 private:
  template <int kCount>
  __device__ __forceinline__ void move_reference(const float (&s)[kCount], float scale_log2, float (&rescale)[2]) {
    rescale[0] = reference[0];
    rescale[1] = reference[1];
    raise_reference(s);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      rescale[i] = ptx::exp2_approx((rescale[i] - reference[i]) * scale_log2);
      sum[i] *= rescale[i];
    }
  }

  template <int kCount>
  __device__ __forceinline__ void raise_reference(const float (&s)[kCount]) {
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
  }

  template <typename T, int kCount>
  __device__ __forceinline__ void exponentials(const float (&s)[kCount], float scale_log2, uint32_t (&p)[kCount / 8][4],
                                               float (&total)[2]) const {
    float part[4] = {};
#pragma unroll
    for (int j = 0; j < kCount; j += 2) {
      float x[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        x[e] = ptx::exp2_approx((s[j + e] - reference[j / 2 % 2]) * scale_log2);
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
