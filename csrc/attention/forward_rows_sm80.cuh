// The products and the softmax of one warp of the sm_80 forward (forward_sm80.cuh), and the store of its rows.
//
// Registers limit the tiles. D 128 needs 128 for the output, 64 for two tiles of scores and 16 for probabilities.
// Values that are cheap to compute again (all that follow from the thread index, the item and the addresses) are not
// kept over a step. Warps of 16 rows hold half as much and read each key for half the rows. Shared memory then takes
// 2304 cycles for 64 keys of an SM, where the tensor cores of 8.6, 8.9 and 12.0 take 4096 to 8192.
#pragma once

#include <cmath>
#include <cstdint>

#include "attention/accumulator_rows.cuh"
#include "attention/forward_shared_sm80.cuh"
#include "attention/launch.h"
#include "attention/online_softmax_sm80.cuh"
#include "attention/probabilities.cuh"
#include "attention/tiles_sm80.cuh"
#include "attention/traits.h"
#include "common/dtype.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"

namespace illada::attention {
namespace {

// The rows of a warp: scores of a tile, probabilities and output, all in registers. kPairs: pairs of rows per lane.
template <typename T, int kHeadDim, int kWarps, int kKeys>
struct WarpRows {
  static constexpr int kRowBytes = kHeadDim * 2, kColumnSteps = kHeadDim / 16;
  static constexpr int kRows = SharedStorage<kHeadDim, kKeys>::kTileRows / kWarps, kPairs = kRows / 16;
  // Parts of a tile's exponentials (of kColumnSteps) that come before the barrier. Their registers are then free
  // sooner.
  static constexpr int kEarly = Traits<Arch::kSm80, kHeadDim>::forward_early(kWarps, kIsSm100);
  using Layout = RowLayout<kRowBytes>;
  using Scores = float[kPairs][kKeys / 2];

  const float scale_log2;
  Scores s;                           // of the tile in use
  float o[kPairs][kHeadDim / 2];      // output, relative to the references
  uint32_t p[kPairs][kKeys / 16][4];  // probabilities of the tile in use
  OnlineSoftmax softmax[kPairs];
  float growth;  // of s over the references, see OnlineSoftmax::growth

  __device__ __forceinline__ explicit WarpRows(float scale_log2) : scale_log2(scale_log2) {
#pragma unroll
    for (int m = 0; m < kPairs; ++m) {
      softmax[m].reset();
#pragma unroll
      for (int j = 0; j < kHeadDim / 2; ++j) o[m][j] = 0;
    }
  }

  // Computes next = q . k, 16 columns at a time, and calls `beside` after each of these steps.
  template <typename Beside>
  __device__ __forceinline__ void multiply_k(Scores& next, uint32_t q_tile, uint32_t k_tile, const Beside& beside) {
    const uint32_t thread = ptx::reread_thread_index();
    const Fragments<kRowBytes> at(thread);
    const uint32_t q_rows = q_tile + thread / 32 * (kRows * kRowBytes) + at.columns;
#pragma unroll
    for (int m = 0; m < kPairs; ++m) {
#pragma unroll
      for (int j = 0; j < kKeys / 2; ++j) next[m][j] = 0;
    }
#pragma unroll
    for (int step = 0; step < kColumnSteps; ++step) {
      uint32_t q[kPairs][4];
#pragma unroll
      for (int m = 0; m < kPairs; ++m) ldmatrix(q[m], Layout::right_of(q_rows, step) + m * 16 * kRowBytes);
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t k[4];
        ldmatrix(k, Layout::right_of(k_tile + at.rows, step) + n * 16 * kRowBytes);
#pragma unroll
        for (int m = 0; m < kPairs; ++m) {
          mma<T>(&next[m][8 * n], q[m], k[0], k[1]);
          mma<T>(&next[m][8 * n + 4], q[m], k[2], k[3]);
        }
      }
      beside(step);
    }
  }

  // Computes o += p . v.
  __device__ __forceinline__ void multiply_v(uint32_t v_tile) {
    const Fragments<kRowBytes> at(ptx::reread_thread_index());
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
#pragma unroll
      for (int n = 0; n < kColumnSteps; ++n) {
        uint32_t v[4];
        ldmatrix_trans(v, Layout::right_of(v_tile + at.columns, n) + step * 16 * kRowBytes);
#pragma unroll
        for (int m = 0; m < kPairs; ++m) {
          mma<T>(&o[m][8 * n], p[m][step], v[0], v[1]);
          mma<T>(&o[m][8 * n + 4], p[m][step], v[2], v[3]);
        }
      }
    }
  }

  // Converts part `step` of the scores to probabilities. A part is a number of pairs, as packed values are.
  __device__ __forceinline__ void weigh(int step) {
    constexpr int kScorePairs = kKeys / 4, kPart = kScorePairs / kColumnSteps * 2;
    const bool even = kScorePairs % kColumnSteps == 0;  // else parts differ by one pair
    const int first = even ? step * kPart : step * kScorePairs / kColumnSteps * 2;
    const int last = even ? (step + 1) * kPart : (step + 1) * kScorePairs / kColumnSteps * 2;
#pragma unroll
    for (int m = 0; m < kPairs; ++m) {
      softmax[m].weigh(s[m], scale_log2, first, last);
#pragma unroll
      for (int j = first; j < last; j += 2) p[m][j / 8][j % 8 / 2] = pack2<T>(s[m][j], s[m][j + 1]);
    }
  }
  template <int kFirst, int kLast>
  __device__ __forceinline__ void weigh_parts() {
#pragma unroll
    for (int step = kFirst; step < kLast; ++step) weigh(step);
  }

  // Measures the growth of s over the references.
  __device__ __forceinline__ void measure() {
    growth = -INFINITY;
#pragma unroll
    for (int m = 0; m < kPairs; ++m) {
      float top[2];
      OnlineSoftmax::maxima(s[m], top);
      growth = fmaxf(growth, softmax[m].growth(top, scale_log2));
    }
  }

  // Moves the references up to the scores, if they must move.
  __device__ __forceinline__ void follow() {
    // Of the whole warp: `move` exchanges between lanes. Of the maxima only `growth` was kept, as this is rare.
    if (__any_sync(kFullWarp, growth > OnlineSoftmax::kSlack)) {
#pragma unroll
      for (int m = 0; m < kPairs; ++m) {
        float top[2], rescale[2];
        OnlineSoftmax::maxima(s[m], top);
        softmax[m].move(top, scale_log2, rescale);
#pragma unroll
        for (int j = 0; j < kHeadDim / 2; ++j) o[m][j] *= rescale[j / 2 % 2];
      }
    }
  }

  // Computes the scores of an item's first tile, of which `valid` keys exist.
  __device__ __forceinline__ void begin(uint32_t q_tile, uint32_t k_tile, int valid) {
    multiply_k(s, q_tile, k_tile, [](int) {});
    if (valid < kKeys) {  // missing keys are zeros, and have a score of 0
#pragma unroll
      for (int m = 0; m < kPairs; ++m) mask_scores(s[m], valid);
    }
    measure();
  }

  // Computes the scores of the next tile beside the rest of this tile's exponentials, then adds this tile's output.
  __device__ __forceinline__ void advance(uint32_t q_tile, uint32_t k_tile, uint32_t v_tile) {
    Scores next;  // not s: its exponentials are still to come
    multiply_k(next, q_tile, k_tile, [&](int step) {
      if (step + kEarly < kColumnSteps) weigh(step + kEarly);
    });
    multiply_v(v_tile);
#pragma unroll
    for (int m = 0; m < kPairs; ++m) {
#pragma unroll
      for (int j = 0; j < kKeys / 2; ++j) s[m][j] = next[m][j];
    }
    measure();
  }

  // Stores the output and lse of an item, or its part of them if several items share the rows.
  __device__ __forceinline__ void store(const ForwardArguments& a, const WorkItem& item) {
    const int thread = int(ptx::reread_thread_index()), lane = thread & 31, first_row = (thread >> 5) * kRows;
    const bool whole = item.splits == 1;
#pragma unroll
    for (int m = 0; m < kPairs; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float sum = warp_reduce<4>(softmax[m].sum[i], [](float x, float y) { return x + y; });
        // Without keys, out is 0. If all scores are -inf, it is NaN.
        const float inverse = item.k_count == 0 ? 0 : 1 / sum, reference = softmax[m].reference[i];
        const TileRow row(first_row + m * 16 + i * 8 + lane / 4, a);
        const bool is_real = row.token < item.q_count;
        const int64_t token = item.q_start + row.token;
        const int head = item.kv_head * a.group + row.head;
        if (whole) {
          store_row<T, kHeadDim>(static_cast<T*>(a.out) + (token * a.num_heads + head) * kHeadDim, o[m], i, inverse,
                                 is_real, lane);
          if (is_real && lane % 4 == 0) a.lse[int64_t(head) * a.total_q + token] = row_lse(reference, sum, a.scale);
        } else if (is_real) {
          const int64_t slot_row =
              int64_t(item.first_slot + item.split) * a.slots.rows + row.token * a.group + row.head;
          float* values = a.slots.values + slot_row * kHeadDim + lane % 4 * 2;
#pragma unroll
          for (int j = 0; j < kHeadDim / 8; ++j)
            *reinterpret_cast<float2*>(values + 8 * j) = make_float2(o[m][4 * j + 2 * i], o[m][4 * j + 2 * i + 1]);
          if (lane % 4 == 0) a.slots.sums[slot_row] = {reference, sum};
        }
      }
    }
  }
};

}  // namespace
}  // namespace illada::attention
