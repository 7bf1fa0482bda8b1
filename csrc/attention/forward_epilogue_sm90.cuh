// Epilogue of the sm_90a forward (forward_sm90.cuh): the rows of an item leave the registers of a warpgroup.
//
//   sum = sum of the probabilities of a row, over the four lanes that share it
//   no key split:  out = o / sum, lse = log(sum) + reference; out leaves through shared memory by TMA, so that the
//                  store ends where the item's queries end and runs beside the next products. Where shared memory has
//                  no room for that, out leaves from registers.
//   a key split:   o, sum and reference go to the split's slot of the workspace; combine.cu merges the slots
//   no keys:       out = 0, lse = -inf
#pragma once

#include <cuda.h>

#include <cmath>
#include <cstdint>

#include "attention/accumulator_rows.cuh"
#include "attention/forward_shared_sm90.cuh"
#include "attention/online_softmax_sm90.cuh"
#include "attention/probabilities.cuh"
#include "attention/tiles_sm90.cuh"
#include "common/barrier_sm90.cuh"
#include "common/dtype.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"

namespace illada::attention {
namespace {

// Token and head of the group of a row of a warpgroup's block: rows are tokens x heads of the group.
struct RowPlace {
  int token, head;

  __device__ __forceinline__ RowPlace(int row, const ForwardArguments& a)
      : token(int(row * a.group_reciprocal >> 16)), head(row - token * a.group) {}
};

// Stores the rows that a warpgroup has finished of one item. A thread has two rows of its block, i = 0 and 1, and of
// these two neighbouring columns of every 8: o[4 j + 2 i + e] is column 8 j + lane % 4 * 2 + e.
template <typename T, typename Shared>
struct Epilogue {
  static constexpr int kHeadDim = Shared::kHeadDim;

  const ForwardArguments& a;
  const WorkItem& item;
  const int first_token;  // first token of the warpgroup's block, within the item

  // Stores out and lse, or the slot of a key split. All threads of the warpgroup call it.
  __device__ __forceinline__ void write(float (&o)[kHeadDim / 2], const OnlineSoftmax& rows, const CUtensorMap& out_map,
                                        uint32_t staging, int barrier) const {
    const int lane = int(threadIdx.x) % 32, row = int(threadIdx.x) % 128 / 32 * 16 + lane / 4;
    const int tokens = min(item.q_count - first_token, a.block_tokens);
    const bool whole = item.splits == 1;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = warp_reduce<4>(rows.sum[i], [](float x, float y) { return x + y; });
      const float inverse = whole ? 1.0f / sum : 1.0f;  // if all scores are -inf, out is NaN
      const RowPlace place(row + 8 * i, a);
      const bool is_real = place.token < tokens;
      if (!Shared::kStagesOut && whole) {
        store_out(o, i, inverse, place, is_real, lane);
      } else {
        scale_row(o, i, inverse);
      }
      if (is_real) {
        if (whole) {
          if (lane % 4 == 0) store_lse(place, row_lse(rows.reference[i], sum, a.scale));
        } else {
          store_slot(o, i, {rows.reference[i], sum}, place, lane);
        }
      }
    }
    if (Shared::kStagesOut && whole) store_out_by_tma(o, out_map, staging, barrier, lane);
    __syncwarp();  // only some lanes stored; the warp must be converged for the next product
  }

 private:
  __device__ __forceinline__ static void scale_row(float (&o)[kHeadDim / 2], int i, float factor) {
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
      o[4 * j + 2 * i] *= factor;
      o[4 * j + 2 * i + 1] *= factor;
    }
  }

  // Stores row i from registers. Its four lanes exchange words first, so all of them call it.
  __device__ __forceinline__ void store_out(const float (&o)[kHeadDim / 2], int i, float inverse, const RowPlace& place,
                                            bool is_real, int lane) const {
    const int64_t out_row =
        int64_t(item.q_start + first_token + place.token) * a.num_heads + item.kv_head * a.group + place.head;
    store_row<T, kHeadDim>(static_cast<T*>(a.out) + out_row * kHeadDim, o, i, inverse, is_real, lane,
                           [&](uint4* at, const uint4& x) { ptx::store_global_v4_hinted(at, x, a.rows_hint); });
  }

  __device__ __forceinline__ void store_lse(const RowPlace& place, float lse) const {
    a.lse[int64_t(item.kv_head * a.group + place.head) * a.total_q + item.q_start + first_token + place.token] = lse;
  }

  // Stores row i of a key split, not divided by its sum, to the split's slot.
  __device__ __forceinline__ void store_slot(const float (&o)[kHeadDim / 2], int i, const SlotSum& sum,
                                             const RowPlace& place, int lane) const {
    const int64_t slot_row =
        int64_t(item.first_slot + item.split) * a.slots.rows + (first_token + place.token) * a.group + place.head;
    float* values = a.slots.values + slot_row * kHeadDim + 2 * (lane % 4);
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j)
      *reinterpret_cast<float2*>(values + 8 * j) = make_float2(o[4 * j + 2 * i], o[4 * j + 2 * i + 1]);
    if (lane % 4 == 0) a.slots.sums[slot_row] = sum;
  }

  // Writes the block to `staging` in TMA's swizzle, and lets one thread store it. The store runs on by itself. Rows
  // behind the item's last query leave the box of the tensor map, and are not written. `barrier`: the warpgroup's own.
  __device__ __forceinline__ void store_out_by_tma(const float (&o)[kHeadDim / 2], const CUtensorMap& out_map,
                                                   uint32_t staging, int barrier, int lane) const {
    // The previous item's store must have read the staging rows. Only the thread that issued it waits for something.
    cute::tma_store_wait<0>();
    NamedBarrier::arrive_and_wait(128, barrier);
    const int swizzle = lane % 8;
    const uint32_t target = staging + uint32_t((int(threadIdx.x) % 128 / 32 * 16 + lane % 16) * kRowBytes);
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; j += 2) {  // lanes 0 .. 15: the sixteen rows of block j, others: of j + 1
      const int chunk = (j + lane / 16) % 8;
      store_matrices(target + j / 8 * (kBlockRows * kRowBytes) + uint32_t((chunk ^ swizzle) * 16),
                     pack2<T>(o[4 * j], o[4 * j + 1]), pack2<T>(o[4 * j + 2], o[4 * j + 3]),
                     pack2<T>(o[4 * j + 4], o[4 * j + 5]), pack2<T>(o[4 * j + 6], o[4 * j + 7]));
    }
    fence_view_async_shared();  // each thread makes its rows visible to TMA, before the one thread stores them
    NamedBarrier::arrive_and_wait(128, barrier);
    if (threadIdx.x % 128 == 0) {
#pragma unroll
      for (int slice = 0; slice < kHeadDim / 64; ++slice)
        ptx::tma_store_5d(&out_map, a.rows_hint, staging + slice * (kBlockRows * kRowBytes), 64 * slice,
                          item.kv_head * a.group, kRaggedTokens - item.q_count + first_token, kRaggedTokens,
                          item.q_start + item.q_count);
    }
    cute::tma_store_arrive();
  }
};

// Writes the results of items without keys, which are the last ones of the list, from `round` on. Eight threads store a
// row. All threads of the consumers call it.
template <typename T, typename Shared, int kCluster>
__device__ __forceinline__ void write_empty_items(const ForwardArguments& a, int round, int rank) {
  const int halves = halves_items<kCluster>(a.plan), items = plan_header(a.plan).forward_items << halves;
  for (int index; (index = item_index<kCluster>(round)) < items; ++round) {
    const WorkItem item = forward_items(a.plan)[index >> halves];
    const int first = (kCluster == 1 ? index & halves : rank) * a.tile_tokens;
    const int tokens = min(item.q_count - first, a.tile_tokens);
    for (int row = int(threadIdx.x) / 8; row < tokens * a.group; row += 128 * Shared::kConsumers / 8) {
      const int64_t q = item.q_start + first + row / a.group, h = item.kv_head * a.group + row % a.group;
      uint4* out = reinterpret_cast<uint4*>(static_cast<T*>(a.out) + (q * a.num_heads + h) * Shared::kHeadDim);
#pragma unroll
      for (int i = 0; i < Shared::kSlices; ++i) out[8 * i + threadIdx.x % 8] = make_uint4(0, 0, 0, 0);
      if (threadIdx.x % 8 == 0) a.lse[h * a.total_q + q] = -INFINITY;
    }
  }
}

}  // namespace
}  // namespace illada::attention
