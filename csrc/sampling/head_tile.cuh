// Epilogue of the fused head. A thread's share of a tile of logits is 2 rows x 64 ids in wgmma's accumulator layout.
// The epilogue reduces it into the states of the two rows. Four neighbouring lanes share the two rows.
//
//   RowPairState::reduce, for a tile:
//     ids past the range's end become -inf; add the bias
//     for both rows: maxima of each group of columns; softmax; without noise: the largest logit becomes the leader
//     if any row of the warp has noise (update_leaders):
//       for each group of columns, if some lane needs random words: draw them together
//         in the first group of a range: raise the bounds to scores that are certain
//         for both rows: mark the ids that may beat the row's bound
//       for both rows: score the marked ids in double precision; raise the bound
//
// No warp waits for another. Words are drawn by all lanes of a warp together, so tests that lead there are of the warp.
#pragma once

#include <cfloat>

#include "sampling/row_sample.cuh"

namespace illada::sampling {

template <bool kWantExtras>
struct RowPairState {
  static constexpr int kIds = 256;  // ids per tile
  static constexpr int kGroup = 4;  // column blocks of a row that are tested together: eight ids
  static constexpr int kGroups = kIds / 8 / kGroup;

  RowState<kWantExtras> state[2];
  float temperature[2], inverse[2];       // see RowNoise
  float bound[2] = {-FLT_MAX, -FLT_MAX};  // lower bound of the row's best score
  bool any_noise;                         // true if any row of this warp has noise
  // Neighbouring lanes share the Philox blocks of their columns. The even lane draws the blocks of the upper row, the
  // odd lane those of the lower row. They then exchange halves.
  RowNoiseLoop noise;

  __device__ __forceinline__ RowPairState(const SampleTokensParams& p, const int (&row)[2])
      : noise(RowNoise(p, threadIdx.x % 2 ? row[1] : row[0])) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const RowNoise own(p, row[i]);
      temperature[i] = own.temperature;
      inverse[i] = own.inverse;
    }
    any_noise = __any_sync(kFullWarp, temperature[0] > 0 || temperature[1] > 0);
  }

  // Excludes row i, which only fills the tile: none of its ids can win any more, and its scores are not published. They
  // would otherwise raise the bound of the real row whose index it has.
  __device__ __forceinline__ void exclude(int i) { bound[i] = FLT_MAX; }

  // Reads the rows' bounds that other CTAs found. `bounds`: [num_rows], encoded by ordered(), or null. Bounds only
  // prune.
  __device__ __forceinline__ void read_bounds(const int32_t* bounds, const int (&row)[2], int32_t (&seen)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      seen[i] = bounds ? *static_cast<const volatile int32_t*>(bounds + row[i]) : ordered(-FLT_MAX);
  }
  __device__ __forceinline__ void apply_bounds(const int32_t (&seen)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) bound[i] = fmaxf(bound[i], from_ordered(seen[i]));
  }

  // Reduces a tile. d[4 j + 2 i + e] is the logit of row i and id tile_id + 8 j + 2 (lane % 4) + e. Ids from end_id on
  // do not count.
  __device__ __forceinline__ void reduce(float (&d)[128], const SampleTokensParams& p, const int (&row)[2], int tile_id,
                                         int end_id, int32_t* bounds) {
    const int column = 2 * int(threadIdx.x % 4), left = min(end_id - tile_id, kIds);
    if (left < kIds) exclude_past_end(d, column, left);
    if (p.bias_count) add_bias(d, p, row, tile_id, left);

    float maximum[2][kGroups];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float top = find_maxima(d, i, maximum[i]);
      add_to_softmax(d, i, top);
      if (temperature[i] == 0 && top > state[i].leader.logit)  // in a tie the earlier tile wins
        state[i].leader = {double(top), tile_id + column + find_lowest(d, i, top), top};
    }
    if (any_noise) update_leaders(d, maximum, p, row, tile_id, bounds);
  }

 private:
  __device__ __forceinline__ static void exclude_past_end(float (&d)[128], int column, int left) {
#pragma unroll
    for (int j = 0; j < kIds / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (8 * j + column + e >= left) d[4 * j + e] = d[4 * j + 2 + e] = -INFINITY;
    }
  }

  // Sets the maximum of each group of row i's columns and returns that of all of them.
  __device__ __forceinline__ static float find_maxima(const float (&d)[128], int i, float (&maximum)[kGroups]) {
    float top = -INFINITY;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      maximum[g] = -INFINITY;
#pragma unroll
      for (int j = g * kGroup; j < (g + 1) * kGroup; ++j)
        maximum[g] = fmaxf(maximum[g], fmaxf(d[4 * j + 2 * i], d[4 * j + 2 * i + 1]));
      top = fmaxf(top, maximum[g]);
    }
    return top;
  }

  __device__ __forceinline__ void add_to_softmax(const float (&d)[128], int i, float top) {
    state[i].softmax.raise(top);  // the reference moves once for the whole tile
#pragma unroll
    for (int j = 0; j < kIds / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        state[i].softmax.add(d[4 * j + 2 * i + e]);
        if constexpr (kWantExtras) state[i].top.add(d[4 * j + 2 * i + e]);
      }
    }
  }

  // Returns the lowest column of row i, relative to the lane's first, whose logit is `top`.
  __device__ __forceinline__ static int find_lowest(const float (&d)[128], int i, float top) {
    int found = 0;
#pragma unroll
    for (int j = kIds / 8 - 1; j >= 0; --j) {
#pragma unroll
      for (int e = 1; e >= 0; --e) found = d[4 * j + 2 * i + e] == top ? 8 * j + e : found;
    }
    return found;
  }

  __device__ __forceinline__ void add_bias(float (&d)[128], const SampleTokensParams& p, const int (&row)[2],
                                           int tile_id, int left) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const RowBias bias(p, row[i]);
      for (int b = 0; b < bias.count; ++b) {
        const int64_t at = int64_t(bias.ids[b]) - tile_id;
        if (at < 0 || at >= left || at % 8 / 2 != threadIdx.x % 4) continue;
        const int k = int(at / 8 * 2 + at % 2);
        const float value = bias.values[b];
#pragma unroll
        for (int m = 0; m < 64; ++m)  // an index that is not constant would put d in local memory
          if (m == k) d[m / 2 * 4 + m % 2 + 2 * i] += value;
      }
    }
  }

  // Upper bits of the uniforms of columns 8 j + 2 (lane % 4) + {0, 1} of both rows. All lanes must call it together.
  __device__ __forceinline__ void uniforms(int tile_id, int j, uint32_t (&u)[2][2]) const {
    const bool odd = threadIdx.x % 2 != 0;
    const PhiloxWords w = noise.upper(uint32_t(tile_id) / 4 + uint32_t(2 * j) + threadIdx.x % 4 / 2);
    const uint32_t a = __shfl_xor_sync(kFullWarp, odd ? w.word[0] : w.word[2], 1);
    const uint32_t b = __shfl_xor_sync(kFullWarp, odd ? w.word[1] : w.word[3], 1);
    u[0][0] = odd ? a : w.word[0];
    u[0][1] = odd ? b : w.word[1];
    u[1][0] = odd ? w.word[2] : a;
    u[1][1] = odd ? w.word[3] : b;
  }

  // Raises a row's bound to the best score of the four lanes that share it. One of them publishes it to other CTAs.
  __device__ __forceinline__ void raise_bound(int i, float score, int row, int32_t* bounds) {
    score = fminf(fmaxf(score, -FLT_MAX), FLT_MAX);
    const float best = warp_reduce<4>(score, [](float a, float b) { return fmaxf(a, b); });
    if (bounds && best > bound[i] && threadIdx.x % 4 == 0) atomicMax(bounds + row, ordered(best));
    bound[i] = fmaxf(bound[i], best);
  }

  // Finds the maximum with noise; see row_sample.cuh.
  __device__ __forceinline__ void update_leaders(const float (&d)[128], const float (&maximum)[2][kGroups],
                                                 const SampleTokensParams& p, const int (&row)[2], int tile_id,
                                                 int32_t* bounds) {
    uint64_t candidates[2] = {0, 0};  // bit 2 j + e
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      uint32_t u[kGroup][2][2];
      const float log2_limit = fmaxf(RowNoise::log2_bound(maximum[0][g], bound[0], inverse[0]),
                                     RowNoise::log2_bound(maximum[1][g], bound[1], inverse[1]));
      if (!__any_sync(kFullWarp, log2_limit > RowNoise::kMinLog2Bound)) continue;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) uniforms(tile_id, g * kGroup + j, u[j]);
      if (g == 0 && __any_sync(kFullWarp, fminf(bound[0], bound[1]) == -FLT_MAX)) find_first_bounds(d, u, row, bounds);
#pragma unroll
      for (int i = 0; i < 2; ++i) mark_candidates(d, u, g, i, maximum[i][g], candidates[i]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (__any_sync(kFullWarp, candidates[i] != 0)) {
        score_candidates(d, p, row[i], tile_id, i, candidates[i]);
        __syncwarp();  // the lanes had different numbers of candidates
        raise_bound(i, __double2float_rd(state[i].leader.score), row[i], bounds);
      }
    }
  }

  // Raises the bounds of both rows to scores that are certain, from the first group of columns. `u`: its uniforms.
  __device__ __forceinline__ void find_first_bounds(const float (&d)[128], const uint32_t (&u)[kGroup][2][2],
                                                    const int (&row)[2], int32_t* bounds) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float lower_bound = -FLT_MAX;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e)
          lower_bound =
              fmaxf(lower_bound, RowNoise::score_lower_bound(d[4 * j + 2 * i + e], u[j][i][e], temperature[i]));
      }
      raise_bound(i, lower_bound, row[i], bounds);
    }
  }

  // Marks the ids of group g that may beat row i's bound. The group's smallest uniform is compared first.
  __device__ __forceinline__ void mark_candidates(const float (&d)[128], const uint32_t (&u)[kGroup][2][2], int g,
                                                  int i, float maximum, uint64_t& candidates) const {
    uint32_t min_bits = ~0u;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) min_bits = min(min_bits, min(u[j][i][0], u[j][i][1]));
    if (temperature[i] == 0 || min_bits > RowNoise::max_bits(RowNoise::log2_bound(maximum, bound[i], inverse[i])))
      return;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int k = 2 * (g * kGroup + j) + e;
        const float x = d[4 * (g * kGroup + j) + 2 * i + e];
        if (u[j][i][e] <= RowNoise::max_bits(RowNoise::log2_bound(x, bound[i], inverse[i])))
          candidates |= uint64_t(1) << k;
      }
    }
  }

  // Scores the marked ids of row i in double precision and offers them to its leader. Rare.
  __device__ __forceinline__ void score_candidates(const float (&d)[128], const SampleTokensParams& p, int row,
                                                   int tile_id, int i, uint64_t& candidates) {
    for (; candidates; candidates &= candidates - 1) {
      const int k = __ffsll(int64_t(candidates)) - 1;
      float x = 0;
#pragma unroll
      for (int m = 0; m < 64; ++m) x = m == k ? d[m / 2 * 4 + m % 2 + 2 * i] : x;  // d has no address
      const int id = tile_id + k / 2 * 8 + 2 * int(threadIdx.x % 4) + k % 2;
      const RowNoise exact(p, row);  // read again: it is rare, and registers are few
      const uint32_t bits = word(exact.upper(uint32_t(id) / 4), id % 4);
      state[i].leader.offer({exact.score(x, bits, uint32_t(id)), id, x});
    }
  }
};

}  // namespace illada::sampling
