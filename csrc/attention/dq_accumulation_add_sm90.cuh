// Methods with which a warp of the keys kernel adds its 16 rows x 64 columns of dq to the sums in fp32:
//
//   red.v2   A lane adds two neighbouring columns: 8 rows of 32 bytes per instruction.
//   red.v4   Lanes first exchange pairs: 8 rows of 64 bytes per instruction, half as many instructions.
//   bulk     TMA adds boxes of 32 columns from shared memory. The boxes use the third stage of rows, so that two stages
//            are left for rows.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "attention/backward_keys_shared_sm90.cuh"
#include "attention/launch.h"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "common/tile_store_sm90.cuh"

namespace illada::attention {
namespace {

template <DqAccumulation kAccumulation>
constexpr bool kIsBulk = kAccumulation == DqAccumulation::kBulk;
template <DqAccumulation kAccumulation>
constexpr bool kIsRed4 = kAccumulation == DqAccumulation::kRed4 || kAccumulation == DqAccumulation::kRed4Kept;
template <DqAccumulation kAccumulation>
constexpr bool kIsKept = kAccumulation == DqAccumulation::kRed2Kept || kAccumulation == DqAccumulation::kRed4Kept;

// Number of stages of rows that loads use.
template <DqAccumulation kAccumulation, typename Shared>
constexpr int kRowStages = Shared::kStages - (kIsBulk<kAccumulation> ? 1 : 0);
// Of the steps for which warp 1 has filled a stage, all but the last kUnaddedSteps have added their dq. A stage is free
// when both warpgroups have left it. Before they leave it, they add dq of the step before. With bulk, the dq that they
// added one step earlier has then arrived.
template <DqAccumulation kAccumulation, typename Shared>
constexpr int kUnaddedSteps = kRowStages<kAccumulation, Shared> + (kIsBulk<kAccumulation> ? 2 : 1);

// Adds a warp's part of dq to the sums.
template <DqAccumulation kAccumulation, int kHeadDim>
class DqAdder {
 public:
  // Number of parts in which dq can be added, one after the other.
  static constexpr int kParts = kIsBulk<kAccumulation> ? 2 : kIsRed4<kAccumulation> ? 8 : 16;

  // `first_row`: the warp's first row in a step; `column`: its first column.
  __device__ __forceinline__ DqAdder(const KeysArguments& a, const CUtensorMap& map, KeysShared<kHeadDim>& shared,
                                     int first_row, int column)
      : a_(a), first_row_(first_row), column_(column) {
    if constexpr (kIsBulk<kAccumulation>) map_ = &map, shared_ = &shared;
  }

  // Sets the step whose dq is added next. Rows that do not exist go to rows that are never read.
  __device__ __forceinline__ void open(const KeysStep& step) {
    const int lane = int(threadIdx.x) % 32;
    if constexpr (kIsBulk<kAccumulation>) {
      const int token = int(first_row_ * a_.group_reciprocal >> 16);
      head_ = step.kv_head * a_.group + first_row_ - token * a_.group;
      from_end_ = kRaggedTokens - step.tokens + token;
      end_ = step.token + step.tokens;
    } else {
      const int dq_first = step.token * a_.num_heads + step.kv_head * a_.group;
      int target[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = first_row_ + lane / 4 + 8 * i, token = int(row * a_.group_reciprocal >> 16);
        const bool valid = token < step.tokens;
        target[i] = valid ? dq_first + token * a_.num_heads + row - token * a_.group : a_.waste_row + row;
      }
      row_ = a_.dq_sums + int64_t(target[0]) * kHeadDim + lane_column(lane);
      second_ = (target[1] - target[0]) * kHeadDim;
    }
  }
  // The same for the step before the first one, whose dq is arbitrary.
  __device__ __forceinline__ void open_nowhere() {
    const int lane = int(threadIdx.x) % 32;
    if constexpr (kIsBulk<kAccumulation>) {
      head_ = end_ = 0;
      from_end_ = kRaggedTokens;  // outside of the map
    } else {
      row_ = a_.dq_sums + int64_t(a_.waste_row + first_row_ + lane / 4) * kHeadDim + lane_column(lane);
      second_ = 8 * kHeadDim;
    }
  }

  // Adds `number` parts from `first` on. Whole warps call it.
  __device__ __forceinline__ void add(const float (&dq)[32], int first, int number) {
#pragma unroll
    for (int n = first; n < min(first + number, kParts); ++n) add(dq, n);
  }

  // Waits until the dq of all steps but the last one has arrived.
  __device__ __forceinline__ void wait_for_previous() const {
    if constexpr (kIsBulk<kAccumulation>) ptx::tma_store_wait_written<kParts>();
  }
  __device__ __forceinline__ void wait_for_all() const {
    if constexpr (kIsBulk<kAccumulation>) ptx::tma_store_wait_written<0>();
  }

 private:
  using Box = TileStoreSm90<float>;

  __device__ __forceinline__ int lane_column(int lane) const {
    return column_ + (kIsRed4<kAccumulation> ? lane % 2 * 8 + lane % 4 / 2 * 4 : lane % 4 * 2);
  }

  // Address of the warp's box `n` in shared memory. It is not kept, because registers are few.
  __device__ __forceinline__ uint32_t box(int n) const {
    constexpr int kUnused = KeysShared<kHeadDim>::kStages - 1;
    static_assert(4 * Box::kBytes <= sizeof(typename KeysShared<kHeadDim>::RowTile));
    const int warp = int(threadIdx.x) / 32;
    return ptx::smem_address(warp < 4 ? &shared_->q[kUnused] : &shared_->dout[kUnused]) +
           uint32_t(warp % 4 * Box::kBytes + n * Box::kBufferBytes);
  }

  __device__ __forceinline__ void add(const float (&dq)[32], int n) {
    if constexpr (kIsBulk<kAccumulation>) {
      cute::tma_store_wait<kParts - 1>();  // for the lane that stores: its previous store from this box has left
      __syncwarp();
      Box::fill_box(dq, n, box(n));
      if (threadIdx.x % 32 == 0)
        ptx::tma_reduce_add_5d(map_, a_.sums_hint, box(n), column_ + n * Box::kColumns, head_, from_end_, kRaggedTokens,
                               end_);
      cute::tma_store_arrive();
      __syncwarp();  // only one lane stored; the warp must be converged for the next product
    } else if constexpr (kIsRed4<kAccumulation>) {
      // Of the blocks 2 m and 2 m + 1 of 8 columns, an even lane gets four columns of the first, an odd lane four of
      // the second.
      const int i = n / 4, m = n % 4;
      const bool odd = threadIdx.x % 2;
      const float (&even_pair)[2] = reinterpret_cast<const float (&)[2]>(dq[8 * m + 2 * i]);
      const float (&odd_pair)[2] = reinterpret_cast<const float (&)[2]>(dq[8 * m + 4 + 2 * i]);
      const float x = __shfl_xor_sync(kFullWarp, odd ? even_pair[0] : odd_pair[0], 1);
      const float y = __shfl_xor_sync(kFullWarp, odd ? even_pair[1] : odd_pair[1], 1);
      float* const to = row_ + (i ? second_ : 0) + 16 * m;
      const float4 sum =
          odd ? make_float4(x, y, odd_pair[0], odd_pair[1]) : make_float4(even_pair[0], even_pair[1], x, y);
      if constexpr (kIsKept<kAccumulation>) {
        ptx::red_add_v4_hinted(to, sum.x, sum.y, sum.z, sum.w, a_.sums_hint);
      } else {
        ptx::red_add_v4(to, sum.x, sum.y, sum.z, sum.w);
      }
    } else {
      const int i = n / 8, j = n % 8;
      float* const to = row_ + (i ? second_ : 0) + 8 * j;
      if constexpr (kIsKept<kAccumulation>) {
        ptx::red_add_v2_hinted(to, dq[4 * j + 2 * i], dq[4 * j + 2 * i + 1], a_.sums_hint);
      } else {
        ptx::red_add_v2(to, dq[4 * j + 2 * i], dq[4 * j + 2 * i + 1]);
      }
    }
  }

  const KeysArguments& a_;
  int first_row_, column_;
  // red: address of this lane's first row of the sums, and distance to its second row in elements.
  float* row_;
  int32_t second_;
  // bulk: coordinates of the warp's boxes (tensor_map_ragged).
  const CUtensorMap* map_;
  KeysShared<kHeadDim>* shared_;
  int32_t head_, from_end_, end_;
};

}  // namespace
}  // namespace illada::attention
