// What the samplers keep of a row while they walk over its logits, how pieces of a row are merged, and the noise.
//
// Gumbel-max as an exponential race: token v wins with the largest x + T G, G = -log(E), E = -log(1 - u), u of 64 random
// bits. Because E >= u, a token whose u alone is too large to beat the best so far is out without a logarithm:
//   x + T G > best  =>  u <= E < 2^((x - best) log2(e) / T).
// The right side is taken once for eight neighbours, at the largest x of them, and the smallest of their upper 32 bits
// compared with it; what passes (a handful a row) is computed in double precision. The bound that is used as `best` only
// prunes: it never decides, so results do not depend on how rows are split or threads are scheduled.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/online_softmax.cuh"
#include "common/philox.h"
#include "common/reduce.cuh"
#include "illada/remask.h"

namespace illada::remask {

constexpr int kVector = 8;  // neighbours that are looked at together: two Philox blocks

// The token that leads so far: by score, then by lowest id. Without noise the score is the logit.
struct Leader {
  double score;
  int32_t token;
  float logit;

  __device__ __forceinline__ void offer(const Leader& other) {
    if (other.score > score || (other.score == score && other.token < token)) *this = other;
  }
};
constexpr int32_t kNoToken = 0x7fffffff;

// The two largest logits, equal where the largest occurs twice.
struct TopTwo {
  float first = -INFINITY, second = -INFINITY;

  __device__ __forceinline__ void add(float x) {
    second = fmaxf(second, fminf(first, x));
    first = fmaxf(first, x);
  }
  __device__ __forceinline__ void merge(TopTwo other) {
    second = fmaxf(fmaxf(second, other.second), fminf(first, other.first));
    first = fmaxf(first, other.first);
  }
};

// A piece of a row, as the walking kernels leave it in the workspace and the combining kernel reads it.
struct alignas(16) RowPiece {
  double score;
  int32_t token;
  float logit;
  float reference, sum, weighted;
  float first, second;
  float unused[3];
};
static_assert(sizeof(RowPiece) == 48, "three 16-byte stores");

// A row's noise.
struct RowNoise {
  uint32_t key0, key1, row_id, step;
  float temperature;
  float inverse;  // log2(e) / T

  __device__ __forceinline__ RowNoise(const SampleTokensParams& p, int64_t row) {
    const uint64_t seed = uint64_t(p.seeds ? p.seeds[row] : p.seed);
    key0 = uint32_t(seed);
    key1 = uint32_t(seed >> 32);
    row_id = uint32_t(p.row_ids ? p.row_ids[row] : row);
    step = uint32_t(p.steps ? p.steps[row] : p.step);
    temperature = p.temperatures ? p.temperatures[row] : p.temperature;
    inverse = temperature > 0 ? fminf(kLog2eF / temperature, 1e30f) : 0.0f;
  }

  // The upper 32 bits of the uniforms of ids 4 * block .. 4 * block + 3.
  __device__ __forceinline__ PhiloxWords upper(uint32_t block) const {
    return philox4x32({{block, row_id, step, kSampleStream}}, key0, key1);
  }

  // log2 of a bound of the uniforms with which an x may still win, plus 32: conservative, see the top of the file.
  __device__ __forceinline__ float log2_bound(float x, float best) const {
    // 2^-10 covers the roundings of this line and of the exponential: both are relative and matter below 2^7.
    return fmaf(x - best, inverse, 32.0f + 0x1p-10f);
  }
  // Below this even lower bits of zero would not win: u >= 2^-65.
  static constexpr float kHopeless = -33.0f;

  __device__ __forceinline__ static uint32_t as_limit(float log2_bound) {
    return __float2uint_rd(exp2_approx(log2_bound));  // saturates at 0 and 2^32 - 1; NaN cannot occur for finite best
  }

  // x + T G in full precision, from the upper bits.
  __device__ __forceinline__ double score(float x, uint32_t upper_bits, uint32_t id) const {
    const PhiloxWords low = philox4x32({{id / 4, row_id, step, kSampleStreamLowBits}}, key0, key1);
    const uint32_t lower_bits = id % 2 ? (id % 4 == 1 ? low.word[1] : low.word[3]) : (id % 4 ? low.word[2] : low.word[0]);
    const double u = (double(upper_bits) + (double(lower_bits) + 0.5) * 0x1p-32) * 0x1p-32;
    return double(x) - double(temperature) * log(-log1p(-u));
  }

  // A score that the token with these upper bits reaches for sure, in fp32: what the bound starts from. E <= 2u for
  // u <= 1/2; larger u are of no use and give -inf.
  __device__ __forceinline__ float sure_score(float x, uint32_t upper_bits) const {
    if (upper_bits >= 0x80000000u) return -INFINITY;
    const float u = float((upper_bits >> 8) + 1) * 0x1p-24f;  // rounded up
    const float gumbel = -0.69314718f * (log2f(u) + 1.0f);
    const float score = fmaf(temperature, gumbel, x);
    return score - 1e-5f * (fabsf(score) + temperature * 32.0f + fabsf(x));  // more than the roundings above
  }
};

// The sparse bias of a row: `values` are added at `ids`, in order.
struct RowBias {
  const int32_t* ids;
  const float* values;
  int count;

  __device__ __forceinline__ RowBias(const SampleTokensParams& p, int64_t row)
      : ids(p.bias_ids + row * p.bias_row_stride),
        values(p.bias_values + row * p.bias_row_stride),
        count(int(p.bias_count)) {}
};

// A row in progress: what one thread has seen of it.
template <bool kWantExtras>
struct RowState {
  OnlineSoftmax<kWantExtras> softmax;
  TopTwo top;  // of use with kWantExtras only
  Leader leader{-INFINITY, kNoToken, -INFINITY};

  __device__ __forceinline__ void merge(const RowState& other) {
    softmax.merge(other.softmax);
    if constexpr (kWantExtras) top.merge(other.top);
    leader.offer(other.leader);
  }

  __device__ __forceinline__ RowState shuffled(int lane_mask) const {
    RowState o;
    o.softmax.reference = __shfl_xor_sync(kFullWarp, softmax.reference, lane_mask);
    o.softmax.sum = __shfl_xor_sync(kFullWarp, softmax.sum, lane_mask);
    if constexpr (kWantExtras) {
      o.softmax.weighted = __shfl_xor_sync(kFullWarp, softmax.weighted, lane_mask);
      o.top.first = __shfl_xor_sync(kFullWarp, top.first, lane_mask);
      o.top.second = __shfl_xor_sync(kFullWarp, top.second, lane_mask);
    }
    o.leader.score = __shfl_xor_sync(kFullWarp, leader.score, lane_mask);
    o.leader.token = __shfl_xor_sync(kFullWarp, leader.token, lane_mask);
    o.leader.logit = __shfl_xor_sync(kFullWarp, leader.logit, lane_mask);
    return o;
  }

  __device__ __forceinline__ RowPiece piece() const {
    return {leader.score,     leader.token, leader.logit, softmax.reference, softmax.sum,
            softmax.weighted, top.first,    top.second,   {}};
  }
  __device__ __forceinline__ static RowState from(const RowPiece& piece) {
    RowState s;
    s.softmax.reference = piece.reference;
    s.softmax.sum = piece.sum;
    s.softmax.weighted = piece.weighted;
    s.top = {piece.first, piece.second};
    s.leader = {piece.score, piece.token, piece.logit};
    return s;
  }
};

// The results of a finished row, written by one thread.
template <bool kWantExtras>
__device__ __forceinline__ void write_row(const SampleTokensParams& p, int64_t row, const RowState<kWantExtras>& s) {
  const bool valid = s.softmax.sum > 0;  // not for NaN
  const double log2_sum = log2(double(s.softmax.sum));
  const double logprob =
      (double(s.leader.logit) * double(kLog2eF) - double(s.softmax.reference) - log2_sum) * kLn2D;
  float entropy = NAN, margin = NAN;
  if constexpr (kWantExtras) {
    if (valid) {
      entropy = float((log2_sum - double(s.softmax.weighted) / double(s.softmax.sum)) * kLn2D);
      const auto power = [&](float x) { return exp2(double(x) * double(kLog2eF) - double(s.softmax.reference)); };
      margin = float((power(s.top.first) - power(s.top.second)) / double(s.softmax.sum));  // they may nearly cancel
    }
  }
  float confidence = float(exp(logprob));
  if (p.measure == Measure::kMargin) confidence = margin;
  if (p.measure == Measure::kEntropy) confidence = -entropy;
  if (p.measure == Measure::kRandom) {
    const RowNoise noise(p, row);
    const PhiloxWords words =
        philox4x32({{0, noise.row_id, noise.step, kSampleStreamRandom}}, noise.key0, noise.key1);
    confidence = float(words.word[0] >> 8) * 0x1p-24f;
  }
  p.token[row] = s.leader.token == kNoToken ? 0 : s.leader.token;
  p.confidence[row] = valid ? confidence : -INFINITY;
  p.logprob[row] = valid ? float(logprob) : -INFINITY;
  if (p.entropy) p.entropy[row] = entropy;
  if (p.margin) p.margin[row] = margin;
}

}  // namespace illada::remask
