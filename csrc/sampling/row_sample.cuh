// State of a row while the samplers walk over its logits, the merge of a row's records, and the noise.
//
// Sampling uses Gumbel-max as an exponential race. Token v with the largest x + T G wins, where G = -log(E),
// E = -log(1 - u) and u has 64 random bits. Because E >= u, a token whose u is too large to beat the best score so far
// needs no logarithm:
//   x + T G > best  =>  u <= E < 2^((x - best) log2(e) / T).
// The kernels compute the right side once for eight neighbours, at their largest x. They compare it with the smallest
// of the neighbours' upper 32 bits. Tokens that pass (a handful per row) are computed in double precision. The bound
// used as `best` only prunes and never decides. Results therefore do not depend on how rows are split or how threads
// are scheduled.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/online_softmax.cuh"
#include "common/philox.h"
#include "common/reduce.cuh"
#include "illada/sampling.h"
#include "sampling/launch.h"

namespace illada::sampling {

constexpr int kVector = 8;  // neighbours that are tested together: two Philox blocks

// Best token so far: the highest score, and of equal scores the lowest id. Without noise the score is the logit. If no
// score is above -inf, the first id is the best.
struct Leader {
  double score = -INFINITY;
  int32_t token = 0;
  float logit = -INFINITY;

  __device__ __forceinline__ void offer(const Leader& other) {
    if (other.score > score || (other.score == score && other.token < token)) *this = other;
  }
};

// The two largest logits. They are equal if the largest occurs twice.
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

// Records of a row in the workspace: one SoftmaxRecord for each separate sum, and one LeaderRecord for each CTA.
// Floating-point sums depend on their order. The separate sums are therefore the same for every distribution of a row
// over CTAs, and merge_records adds their records in a fixed order. So a row's result does not depend on the batch,
// to the last bit.
struct alignas(16) LeaderRecord {
  double score;
  int32_t token;
  float logit;
  float first, second;
  float unused[2];
};
struct alignas(16) SoftmaxRecord {
  float reference, sum, weighted;
  float unused;
};
static_assert(sizeof(LeaderRecord) == 32 && sizeof(SoftmaxRecord) == 16, "16-byte accesses");

__device__ __forceinline__ uint32_t word(const PhiloxWords& words, int i) {
  const uint32_t even = i < 2 ? words.word[0] : words.word[2], odd = i < 2 ? words.word[1] : words.word[3];
  return i % 2 ? odd : even;
}

// Noise of a row.
struct RowNoise {
  uint32_t key0, key1, row_id, step;  // the step of generation
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

  // Upper 32 bits of the uniforms of ids 4 * block .. 4 * block + 3.
  __device__ __forceinline__ PhiloxWords upper(uint32_t block) const {
    return philox4x32({{block, row_id, step, kStreamSample}}, key0, key1);
  }

  // log2 of an upper bound of the uniforms with which x may still win, plus 32. The bound is conservative; see the top
  // of this file.
  __device__ __forceinline__ float log2_bound(float x, float best) const { return log2_bound(x, best, inverse); }
  __device__ __forceinline__ static float log2_bound(float x, float best, float inverse) {
    // 2^-10 covers the rounding errors of this line and of the exponential. Both are relative and matter below 2^7.
    return fmaf(x - best, inverse, 32.0f + 0x1p-10f);
  }
  // Below this limit a token cannot win even with lower bits of zero: u >= 2^-65.
  static constexpr float kMinLog2Bound = -33.0f;

  __device__ __forceinline__ static uint32_t max_bits(float log2_bound) {
    return __float2uint_rd(exp2_approx(log2_bound));  // saturates at 0 and 2^32 - 1; NaN cannot occur for finite best
  }

  // x + T G in full precision. It draws the lower bits and combines them with the given upper bits.
  __device__ __forceinline__ double score(float x, uint32_t upper_bits, uint32_t id) const {
    const PhiloxWords low = philox4x32({{id / 4, row_id, step, kStreamSampleLowBits}}, key0, key1);
    const double u = (double(upper_bits) + (double(word(low, id % 4)) + 0.5) * 0x1p-32) * 0x1p-32;
    return double(x) - double(temperature) * log(-log1p(-u));
  }

  // Lower bound in fp32 of the score of the token with these upper bits; the initial value of the pruning bound.
  // E <= u + u^2 for u <= 1/2; larger u are not useful and give -inf.
  __device__ __forceinline__ static float score_lower_bound(float x, uint32_t upper_bits, float temperature) {
    const float u = float((upper_bits >> 8) + 1) * 0x1p-24f;  // rounded up
    const float gumbel = fmaf(-kLn2F, __log2f(u), -u);        // log(1 + u) <= u
    const float score = fmaf(temperature, gumbel, x);
    // The subtracted term is larger than the rounding errors above.
    return u <= 0.5f ? score - 1e-5f * (fabsf(x) + temperature * 32.0f) : -INFINITY;
  }
};

// RowNoise::upper for a hot loop, with the keys of all rounds in registers. The keys go through shuffles so that the
// compiler keeps them. Otherwise it would add the increments again in every round, which is a third of the loop's work
// on the integer pipe.
struct RowNoiseLoop {
  uint32_t key0[10], key1[10];
  uint32_t row_id, step;

  __device__ __forceinline__ explicit RowNoiseLoop(const RowNoise& noise) : row_id(noise.row_id), step(noise.step) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      key0[round] = __shfl_sync(kFullWarp, noise.key0 + round * kPhiloxW0, int(threadIdx.x % 32));
      key1[round] = __shfl_sync(kFullWarp, noise.key1 + round * kPhiloxW1, int(threadIdx.x % 32));
    }
  }

  __device__ __forceinline__ PhiloxWords upper(uint32_t block) const {
    PhiloxWords c{{block, row_id, step, kStreamSample}};
#pragma unroll
    for (int round = 0; round < 10; ++round) c = philox_round(c, key0[round], key1[round]);
    return c;
  }
};

// Sparse bias of a row: `values` are added at `ids`, in order.
struct RowBias {
  const int32_t* ids;
  const float* values;
  int count;

  __device__ __forceinline__ RowBias(const SampleTokensParams& p, int64_t row)
      : ids(p.bias_ids + row * p.bias_row_stride),
        values(p.bias_values + row * p.bias_row_stride),
        count(int(p.bias_count)) {}
};

// State of a row in progress: what one thread has seen of it.
template <bool kWantExtras>
struct RowState {
  OnlineSoftmax<kWantExtras> softmax;
  TopTwo top;  // used only with kWantExtras
  Leader leader;

  // Merges the leader and the two largest logits with those of lane ^ mask. Does not merge the softmax.
  __device__ __forceinline__ void merge_leader(int mask) {
    Leader other;
    other.score = __shfl_xor_sync(kFullWarp, leader.score, mask);
    other.token = __shfl_xor_sync(kFullWarp, leader.token, mask);
    other.logit = __shfl_xor_sync(kFullWarp, leader.logit, mask);
    leader.offer(other);
    if constexpr (kWantExtras)
      top.merge({__shfl_xor_sync(kFullWarp, top.first, mask), __shfl_xor_sync(kFullWarp, top.second, mask)});
  }

  __device__ __forceinline__ LeaderRecord leader_record() const {
    return {leader.score, leader.token, leader.logit, top.first, top.second, {}};
  }
  __device__ __forceinline__ void merge(const LeaderRecord& record) {
    leader.offer({record.score, record.token, record.logit});
    if constexpr (kWantExtras) top.merge({record.first, record.second});
  }
};

template <bool kWantExtras>
__device__ __forceinline__ SoftmaxRecord to_record(const OnlineSoftmax<kWantExtras>& softmax) {
  return {softmax.reference, softmax.sum, softmax.weighted, 0.0f};
}
template <bool kWantExtras>
__device__ __forceinline__ OnlineSoftmax<kWantExtras> from_record(const SoftmaxRecord& record) {
  OnlineSoftmax<kWantExtras> softmax;
  softmax.reference = record.reference;
  softmax.sum = record.sum;
  softmax.weighted = record.weighted;
  return softmax;
}

// Address of a row's softmax records in a workspace of RowRecords.
__device__ __forceinline__ SoftmaxRecord* softmax_records(void* workspace, int64_t num_rows, const RowRecords& records,
                                                          int64_t row) {
  void* const after_leaders = static_cast<LeaderRecord*>(workspace) + num_rows * records.leaders;
  return static_cast<SoftmaxRecord*>(after_leaders) + row * records.softmaxes;
}

// Sums a row's softmax records. One warp calls it.
template <bool kWantExtras>
__device__ __forceinline__ OnlineSoftmax<kWantExtras> merge_records(const SoftmaxRecord* records, int count) {
  const int lane = threadIdx.x % 32;
  constexpr int kPrefetch = 4;  // loads in flight at the same time
  OnlineSoftmax<kWantExtras> total;
  for (int first = lane; first < count; first += 32 * kPrefetch) {
    OnlineSoftmax<kWantExtras> partial[kPrefetch];
    float common = total.reference;
#pragma unroll
    for (int i = 0; i < kPrefetch; ++i) {
      if (first + 32 * i < count) partial[i] = from_record<kWantExtras>(records[first + 32 * i]);
      common = fmaxf(common, partial[i].reference);
    }
    total.rebase(common);
#pragma unroll
    for (int i = 0; i < kPrefetch; ++i) {
      partial[i].rebase(common);
      total.sum += partial[i].sum;
      if constexpr (kWantExtras) total.weighted += partial[i].weighted;
    }
  }
  total.merge_lanes();
  return total;
}

// Writes the results of a finished row. One thread calls it.
template <bool kWantExtras>
__device__ __forceinline__ void write_row(const SampleTokensParams& p, int64_t row, const RowState<kWantExtras>& s) {
  const bool valid = s.softmax.sum > 0;  // false for NaN
  const double log2_sum = log2(double(s.softmax.sum));
  const double logprob = double(s.leader.logit) - double(s.softmax.reference) - log2_sum * kLn2;
  float entropy = NAN, margin = NAN;
  if constexpr (kWantExtras) {
    if (valid) {
      entropy = float((log2_sum - double(s.softmax.weighted) / double(s.softmax.sum)) * kLn2);
      const auto power = [&](float x) { return exp2((double(x) - double(s.softmax.reference)) * double(kLog2eF)); };
      margin = float((power(s.top.first) - power(s.top.second)) / double(s.softmax.sum));  // they may nearly cancel
    }
  }
  float confidence = expf(float(logprob));
  if (p.measure == Measure::kMargin) confidence = margin;
  if (p.measure == Measure::kEntropy) confidence = -entropy;
  if (p.measure == Measure::kRandom) {
    const RowNoise noise(p, row);
    const PhiloxWords words = philox4x32({{0, noise.row_id, noise.step, kStreamSampleRandom}}, noise.key0, noise.key1);
    confidence = float(words.word[0] >> 8) * 0x1p-24f;
  }
  p.token[row] = s.leader.token;
  p.confidence[row] = valid ? confidence : -INFINITY;
  p.logprob[row] = valid ? float(logprob) : -INFINITY;
  if (p.entropy) p.entropy[row] = entropy;
  if (p.margin) p.margin[row] = margin;
}

}  // namespace illada::sampling
