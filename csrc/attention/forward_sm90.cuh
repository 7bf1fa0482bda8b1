// Attention forward on sm_90a. Two files per head dim include this file: the default tiling, and the variants.
//
// CTAs walk over the items of the plan. A producer warp loads by TMA. Two consumer warpgroups (three for head dim 64)
// have a block of 64 rows each. Rows are the tokens x heads of a group: a box of the queries' tensor map is 64 columns
// x heads of the group x tokens, so that grouped queries arrive as one tile of rows. Boxes end where the item's queries
// and keys end (tensor_map_ragged). Elements behind the end read as 0, whatever they belong to, and are not written.
//
//   producer, one thread:
//     for each item:
//       load K of the first tile; load Q and the item's record for each warpgroup; start loading the next item's record
//       for each tile: load K of the next tile and V of this tile
//
//   consumer warpgroup:
//     s = q . k of the first tile; p = softmax of s
//     for each tile of all items:
//       wait for the own turn
//       issue s = q . k of the next tile (after an item's last tile: of the next item's first tile)
//       issue o += p . v of this tile; pass the turn on
//       wait for s; next p = softmax of s, while o += p . v runs
//       wait for o; at the end of an item store its rows, else rescale o if a reference has moved
//
//   q_full, q_empty [w]   the queries of warpgroup w and the item's record have arrived; their last product has ended
//   k_full, k_empty       a tile of keys has arrived; all warpgroups (of both CTAs of a cluster) have read it
//   v_full, v_empty       the same for the values
//   turns                 named barriers: one warpgroup at a time issues its products, so that the softmax of
//                         the others runs at the same time
//
// Steps continue from item to item. The next item's first product runs beside this item's last product. The rows of the
// finished item go from registers through shared memory to memory, while the next tile is multiplied. The partial tile
// of keys comes first; no other tile needs a mask.
//
// An item with k keys takes 4 * rows * k * D flop and reads 4 k D bytes of keys and values. At the tensor cores' peak,
// 128 rows need 32 bytes per clock and SM from the L2 cache, which gives about 24. Pairs of CTAs (clusters) with
// neighbouring tiles of the same head therefore load each tile of keys once, half each, for both. The tensor cores then
// bound the kernel; see docs/kernels/attention-forward.md.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cute/arch/copy_sm80.hpp>
#include <type_traits>

#include "attention/accumulator_rows.cuh"
#include "attention/launch.h"
#include "attention/online_softmax_sm90.cuh"
#include "attention/probabilities.cuh"
#include "attention/tiles_sm90.cuh"
#include "attention/traits.h"
#include "common/barrier_sm90.cuh"
#include "common/dependent_launch.h"
#include "common/dtype.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "common/registers_sm90.cuh"
#include "common/tensor_map.h"
#include "common/variants.h"
#include "common/wgmma.cuh"

namespace illada::attention {
namespace {

// Shared memory of a kernel instance, and its adaptations to a lack of registers or shared memory.
template <int kHeadDim, int kKeys_, int kStagesV_>
struct SharedStorage {
  using Tr = Traits<Arch::kSm90, kHeadDim>;
  static constexpr int kKeys = kKeys_, kSlices = kHeadDim / 64;
  static constexpr int kStagesK = Tr::kForwardKeyStages, kStagesV = kStagesV_;
  static constexpr int kItems = 4;
  static constexpr int kConsumers = Tr::kForwardBlocks;
  static constexpr int kConsumerRegisters = Tr::forward_consumer_registers(kKeys);
  static_assert(2 * kConsumers <= NamedBarrier::kCount);  // turns, and one barrier per warpgroup
  using Registers = RegisterSplit<kConsumers, Tr::forward_producer_registers(kKeys), kConsumerRegisters>;
  static constexpr int kThreads = Registers::kThreads;
  using KeyTile = Tile<kKeys, kHeadDim>;
  using QueryTile = Tile<kBlockRows, kHeadDim>;
  // True if scores, sums, two sets of probabilities and 24 more registers are too many. The next probabilities then
  // stay in the registers of the scores, in fp32, until the product that reads the old probabilities has ended.
  static constexpr bool kPacksLate = kKeys / 2 + kHeadDim / 2 + 2 * (kKeys / 4) + 24 > kConsumerRegisters;
  // True if shared memory has room for the output rows. Otherwise they are stored from registers.
  static constexpr bool kStagesOut =
      (kStagesK + kStagesV) * sizeof(KeyTile) + 2 * kConsumers * sizeof(QueryTile) <= 225 * 1024;
  struct None {};
  QueryTile q[kConsumers];  // queries of each warpgroup
  KeyTile k[kStagesK], v[kStagesV];
  std::conditional_t<kStagesOut, QueryTile, None> out[kConsumers];
  Barrier q_full[kConsumers], q_empty[kConsumers], k_full[kStagesK], k_empty[kStagesK], v_full[kStagesV],
      v_empty[kStagesV];
  // Records of the finished item, of the current one, and of the next one, which may arrive while both are read.
  WorkItem item[kConsumers][kItems], producer_item, next_item;
  int32_t items;  // number of items, for the producer, which has no register for it
};

struct ForwardArguments {
  const int32_t* plan;
  void* out;
  float* lse;
  Slots slots;
  int32_t total_q, num_heads, group, tile_tokens, block_tokens;
  uint32_t group_reciprocal;
  float scale, scale_log2;        // softmax_scale, and softmax_scale times log2(e)
  uint64_t rows_hint, keys_hint;  // hints to the L2 cache
};

// Copies an item in shared memory, one half after the other, which takes four registers instead of eight.
__device__ __forceinline__ void copy_item(WorkItem& target, const WorkItem& source) {
  reinterpret_cast<uint4*>(&target)[0] = reinterpret_cast<const uint4*>(&source)[0];
  ptx::keep_memory_order();
  reinterpret_cast<uint4*>(&target)[1] = reinterpret_cast<const uint4*>(&source)[1];
}

// Index of a cluster's item in a round.
template <int kCluster>
__device__ __forceinline__ int item_index(int round) {
  int block = int(blockIdx.x), grid = int(gridDim.x);
  ptx::hide_value(block);
  ptx::hide_value(grid);
  return serpentine_index(round, block / kCluster, grid / kCluster);
}

// Stores the finished rows of a warpgroup. They go to out, through shared memory and TMA, which ends with the item's
// queries, and to lse. With a key split, they go to the item's slot instead. The warpgroup has the item's queries from
// `first_token` on.
template <typename T, int kHeadDim, typename Shared>
__device__ __forceinline__ void write_rows(float (&o)[kHeadDim / 2], const OnlineSoftmax& rows, const WorkItem& item,
                                           const ForwardArguments& a, const CUtensorMap& out_map, uint32_t staging,
                                           int barrier, int first_token) {
  const int lane = int(threadIdx.x) % 32, row = int(threadIdx.x) % 128 / 32 * 16 + lane / 4;
  const int tokens = min(item.q_count - first_token, a.block_tokens);
  const bool whole = item.splits == 1;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float sum = warp_reduce<4>(rows.sum[i], [](float x, float y) { return x + y; });
    const float inverse = whole ? 1.0f / sum : 1.0f;  // if all scores are -inf, out is NaN
    const int token = int((row + 8 * i) * a.group_reciprocal >> 16), head = row + 8 * i - token * a.group;
    if (!Shared::kStagesOut && whole) {
      const int64_t place = int64_t(item.q_start + first_token + token) * a.num_heads + item.kv_head * a.group + head;
      store_row<T, kHeadDim>(static_cast<T*>(a.out) + place * kHeadDim, o, i, inverse, token < tokens, lane,
                             [&](uint4* at, const uint4& x) { ptx::store_global_v4_hinted(at, x, a.rows_hint); });
    } else {
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        o[4 * j + 2 * i] *= inverse;
        o[4 * j + 2 * i + 1] *= inverse;
      }
    }
    if (token < tokens) {
      if (whole) {
        if (lane % 4 == 0)
          a.lse[int64_t(item.kv_head * a.group + head) * a.total_q + item.q_start + first_token + token] =
              row_lse(rows.reference[i], sum, a.scale);
      } else {
        const int64_t slot_row =
            int64_t(item.first_slot + item.split) * a.slots.rows + (first_token + token) * a.group + head;
        float* values = a.slots.values + slot_row * kHeadDim + 2 * (lane % 4);
#pragma unroll
        for (int j = 0; j < kHeadDim / 8; ++j)
          *reinterpret_cast<float2*>(values + 8 * j) = make_float2(o[4 * j + 2 * i], o[4 * j + 2 * i + 1]);
        if (lane % 4 == 0) a.slots.sums[slot_row] = {rows.reference[i], sum};
      }
    }
  }
  if (Shared::kStagesOut && whole) {
    cute::tma_store_wait<0>();  // the leader's previous stores have left shared memory
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
    fence_view_async_shared();
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
  __syncwarp();  // only some lanes stored; the warp must be converged for the next product
}

// Returns 1 if the kernel divides the plan's items in two, else 0. A plan that was made for pairs has items of two
// tiles. A CTA without a neighbour takes one tile at a time.
template <int kCluster>
__device__ __forceinline__ int halves_items(const int32_t* plan) {
  return kCluster == 1 ? plan_header(plan).cluster - 1 : 0;
}

// Writes the results of items without keys, which are the last ones of the list, from `round` on.
template <typename T, int kHeadDim, typename Shared, int kCluster>
__device__ __forceinline__ void write_empty_items(const ForwardArguments& a, int round, int rank) {
  const int halves = halves_items<kCluster>(a.plan), items = plan_header(a.plan).forward_items << halves;
  for (int index; (index = item_index<kCluster>(round)) < items; ++round) {
    const WorkItem item = forward_items(a.plan)[index >> halves];
    const int first = (kCluster == 1 ? index & halves : rank) * a.tile_tokens;
    const int tokens = min(item.q_count - first, a.tile_tokens);
    for (int row = int(threadIdx.x) / 8; row < tokens * a.group; row += 128 * Shared::kConsumers / 8) {
      const int64_t q = item.q_start + first + row / a.group, h = item.kv_head * a.group + row % a.group;
      uint4* out = reinterpret_cast<uint4*>(static_cast<T*>(a.out) + (q * a.num_heads + h) * kHeadDim);
#pragma unroll
      for (int i = 0; i < kHeadDim / 64; ++i) out[8 * i + threadIdx.x % 8] = make_uint4(0, 0, 0, 0);
      if (threadIdx.x % 8 == 0) a.lse[h * a.total_q + q] = -INFINITY;
    }
  }
}

template <typename T, int kHeadDim, int kKeys, int kStagesV, int kCluster>
__global__ __launch_bounds__(SharedStorage<kHeadDim, kKeys, kStagesV>::kThreads, 1) void illada_attention_forward_sm90(
    const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
    const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap out_map,
    const __grid_constant__ ForwardArguments a, const __grid_constant__ DependentLaunch launch) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Shared = SharedStorage<kHeadDim, kKeys, kStagesV>;
  constexpr int kSlices = Shared::kSlices, kStagesK = Shared::kStagesK;
  constexpr int kConsumers = Shared::kConsumers, kItems = Shared::kItems;
  constexpr uint32_t kTileBytes = sizeof(typename Shared::KeyTile);
  extern __shared__ char raw_shared[];
  Shared& shared = ptx::shared_at<Shared>((ptx::smem_address(raw_shared) + 1023) / 1024 * 1024);
  const int rank = kCluster > 1 ? int(cute::block_rank_in_cluster()) : 0;

  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(&q_map);
    cute::prefetch_tma_descriptor(&k_map);
    cute::prefetch_tma_descriptor(&v_map);
    cute::prefetch_tma_descriptor(&out_map);
    for (int w = 0; w < kConsumers; ++w) {
      shared.q_full[w].init(1);
      shared.q_empty[w].init(1);
    }
    for (int s = 0; s < kStagesK; ++s) {
      shared.k_full[s].init(1);
      shared.k_empty[s].init(kConsumers * kCluster);
    }
    for (int s = 0; s < kStagesV; ++s) {
      shared.v_full[s].init(1);
      shared.v_empty[s].init(kConsumers * kCluster);
    }
    cutlass::arch::fence_barrier_init();
  }
  if (kCluster > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }
  wait_for_previous_kernel(launch);

  if (threadIdx.x >= 128 * kConsumers) {  // ------------------------------------------------------------ producer
    Shared::Registers::as_producer();
    if (threadIdx.x == 128 * kConsumers) {
      const int halves = halves_items<kCluster>(a.plan);
      const int items = plan_header(a.plan).forward_items << halves;
      auto k_state = producer_start<kStagesK>();
      auto v_state = producer_start<kStagesV>();
      // Loads the item's keys from `row` on. The CTAs of a cluster load a part of the tile each, for all of them.
      using KeyTile = typename Shared::KeyTile;
      const auto load = [&](const CUtensorMap* map, KeyTile& tile, Barrier& barrier, const WorkItem& item, int row) {
        // The rank is read again, not kept: registers are few.
        const int part = kCluster > 1 ? int(cute::block_rank_in_cluster()) * (kKeys / kCluster) : 0;
        barrier.arrive_and_expect_tx(kTileBytes);
#pragma unroll
        for (int slice = 0; slice < kSlices; ++slice) {
          char* const target = tile.slice[slice] + part * kRowBytes;
          const int from_end = kRaggedTokens - item.k_count + row + part, end = item.k_start + item.k_count;
          load_box<kCluster>(target, map, barrier, a.keys_hint, 64 * slice, item.kv_head, from_end, end);
        }
      };
      const auto load_k = [&](const WorkItem& item, int row) {
        shared.k_empty[k_state.index()].wait(k_state.phase());
        load(&k_map, shared.k[k_state.index()], shared.k_full[k_state.index()], item, row);
        ++k_state;
      };
      const auto load_v = [&](const WorkItem& item, int row) {
        shared.v_empty[v_state.index()].wait(v_state.phase());
        load(&v_map, shared.v[v_state.index()], shared.v_full[v_state.index()], item, row);
        ++v_state;
      };
      // Loading an item's record takes as long as half a tile. It is loaded one item ahead and waits in shared memory.
      const auto ask_for_item = [&](int round) {
        ptx::keep_memory_order();  // the last record was read before this
        const int index = item_index<kCluster>(round);
        if (index < items) {
          const int32_t* plan = a.plan;
          ptx::hide_value(plan);
          const auto* const source = reinterpret_cast<const uint4*>(forward_items(plan) + (index >> halves));
          auto* const target = reinterpret_cast<uint4*>(&shared.next_item);
          cute::SM80_CP_ASYNC_CACHEGLOBAL<uint4>::copy(source[0], target[0]);
          cute::SM80_CP_ASYNC_CACHEGLOBAL<uint4>::copy(source[1], target[1]);
        } else {
          shared.next_item = WorkItem{};
        }
        cute::cp_async_fence();
      };
      const auto take_next_item = [&](int round) {
        cute::cp_async_wait<0>();
        ptx::keep_memory_order();
        copy_item(shared.producer_item, shared.next_item);
        if (halves) {  // if the item has no second tile, the CTA does one tile of useless work
          const int first = (item_index<kCluster>(round) & 1) * a.tile_tokens;
          shared.producer_item.q_start += first;
          shared.producer_item.q_count -= first;
        }
      };
      const auto hand_over = [&](int w, int round) {  // to warpgroup w
        shared.q_empty[w].wait(uint32_t(round) % 2 ^ 1);
        copy_item(shared.item[w][round % kItems], shared.producer_item);
      };
      ask_for_item(0);
      take_next_item(0);
      const WorkItem& item = shared.producer_item;  // read again for each tile: registers are few
      int round = 0;
      for (; item.k_count > 0; ++round) {
        int row = (item.k_count - 1) / kKeys * kKeys;  // the partial tile comes first; the others need no mask
        load_k(item, row);
#pragma unroll
        for (int w = 0; w < kConsumers; ++w) {
          hand_over(w, round);
          shared.q_full[w].arrive_and_expect_tx(uint32_t(kSlices * a.block_tokens * a.group * kRowBytes));
          load_tile(shared.q[w], &q_map, shared.q_full[w], item.kv_head * a.group, item.q_start, item.q_count,
                    (rank * kConsumers + w) * a.block_tokens, a.rows_hint);
        }
        ask_for_item(round + 1);
#pragma unroll 1
        for (; row >= 0; row -= kKeys) {
          if (row > 0) load_k(item, row - kKeys);
          load_v(item, row);
        }
        take_next_item(round + 1);
      }
#pragma unroll
      for (int w = 0; w < kConsumers; ++w) {  // an item without keys marks the end
        hand_over(w, round);
        shared.q_full[w].arrive();
      }
    }
  } else {  // ------------------------------------------------------------------------------------------- consumers
    Shared::Registers::as_consumer();
    const int warpgroup = __shfl_sync(kFullWarp, int(threadIdx.x) / 128, 0), lane = int(threadIdx.x) % 128;
    const int own_turn = warpgroup, next_turn = (warpgroup + 1) % kConsumers, own_barrier = kConsumers + warpgroup;
    const int first_token = (rank * kConsumers + warpgroup) * a.block_tokens;
    const uint64_t q_descriptor = gmma_descriptor_k(ptx::smem_address(&shared.q[warpgroup]));
    const uint64_t k_descriptor = gmma_descriptor_k(ptx::smem_address(shared.k));
    const uint64_t v_descriptor = gmma_descriptor_mn(ptx::smem_address(shared.v), kKeys * kRowBytes);
    const uint32_t staging = ptx::smem_address(&shared.out[warpgroup]);
    PipelineState<kStagesK> k_state;
    PipelineState<kStagesV> v_state;
    float s[kKeys / 2], o[kHeadDim / 2];
    uint32_t p[kKeys / 16][4], next_p[Shared::kPacksLate ? 1 : kKeys / 16][4];
    OnlineSoftmax rows;
    float rescale[2];

    // Descriptors of a ring's tiles differ only in the low half. The compiler knows the high half, which therefore
    // takes no register.
    const auto descriptor_in_ring = [](uint64_t first, int index) {
      return first >> 32 << 32 | uint32_t(uint32_t(first) + uint32_t(index) * (kTileBytes / 16));
    };
    const auto multiply_k = [&] {  // s = q . k
      const uint64_t b = descriptor_in_ring(k_descriptor, k_state.index());
      multiply_rows<T, typename Shared::QueryTile, typename Shared::KeyTile, kKeys>(s, q_descriptor, b);
      cute::warpgroup_commit_batch();
    };
    const auto multiply_v = [&](bool accumulate, bool hand_over) {  // o (+)= p . v
      const uint64_t b = descriptor_in_ring(v_descriptor, v_state.index());
#pragma unroll
      for (int step = 0; step < kKeys / 16; ++step) {
        // The turn is passed on before the last step is issued, so that no time is lost between the warpgroups.
        if (step == kKeys / 16 - 1 && hand_over) NamedBarrier::arrive(256, next_turn);
        warpgroup_mma_rs<T, kHeadDim>(o, p[step], b + step * (16 * kRowBytes / 16), accumulate || step > 0);
      }
      cute::warpgroup_commit_batch();
    };
    const auto release = [&](Barrier& barrier) {  // one thread arrives for each CTA that loads into the stage
      if constexpr (kCluster > 1) {
        barrier.arrive_if(lane < kCluster, uint32_t(lane));
      } else {
        barrier.arrive_if(lane == 0);
      }
    };

    // The first product of the next key tile runs beside the second product of this tile, also from item to item.
    int round = 0, tiles = 0;  // tiles: tiles of the item of s that are not yet in s
    int valid = 0;             // number of keys in the item's first tile
    const auto open_item = [&] {
      shared.q_full[warpgroup].wait(uint32_t(round) % 2);
      const int count = __shfl_sync(kFullWarp, shared.item[warpgroup][round % kItems].k_count, 0);
      ++round;
      tiles = (count + kKeys - 1) / kKeys;
      valid = count - (tiles - 1) * kKeys;
      return tiles > 0;
    };
    const auto finish_scores = [&](bool is_first) {  // s is complete
      release(shared.k_empty[k_state.index()]);
      ++k_state;
      shared.q_empty[warpgroup].arrive_if(--tiles == 0 && lane == 0);
      if (is_first) {
        if (valid < kKeys) mask_scores(s, valid);
        rows.start(s, a.scale_log2);
      }
      if constexpr (Shared::kPacksLate) {
        return rows.update_in_place(s, a.scale_log2, rescale);
      } else {
        return rows.update<T>(s, a.scale_log2, next_p, rescale);
      }
    };

    const auto take_next_p = [&] {
#pragma unroll
      for (int i = 0; i < kKeys / 4; ++i) {
        if constexpr (Shared::kPacksLate) {
          p[i / 4][i % 4] = pack2<T>(s[2 * i], s[2 * i + 1]);
        } else {
          p[i / 4][i % 4] = next_p[i / 4][i % 4];
        }
      }
    };

    if (open_item()) {
      shared.k_full[k_state.index()].wait(k_state.phase());
      cute::warpgroup_arrive();
      multiply_k();
      cute::warpgroup_wait<0>();
      finish_scores(true);
      if (warpgroup == kConsumers - 1) NamedBarrier::arrive(256, next_turn);

      take_next_p();
      bool is_last = tiles == 0, fresh = true;
      while (true) {
        const bool is_first = is_last;
        if (is_last && !open_item()) break;
        shared.k_full[k_state.index()].wait(k_state.phase());
        NamedBarrier::arrive_and_wait(256, own_turn);
        cute::warpgroup_arrive();
        multiply_k();
        shared.v_full[v_state.index()].wait(v_state.phase());
        cute::warpgroup_arrive();
        multiply_v(!fresh, true);
        cute::warpgroup_wait<1>();
        const OnlineSoftmax finished = rows;
        const bool moved = finish_scores(is_first);
        if constexpr (Shared::kPacksLate)
          ptx::wgmma_compute_before_wait(rows.sum[0], rows.sum[1], a.total_q < 0, staging);
        cute::warpgroup_wait<0>();
        ptx::wgmma_keep_operand(p, a.total_q < 0, staging);
        release(shared.v_empty[v_state.index()]);
        ++v_state;
        if (is_first) {
          write_rows<T, kHeadDim, Shared>(o, finished, shared.item[warpgroup][(round - 2) % kItems], a, out_map,
                                          staging, own_barrier, first_token);
        } else if (moved) {
#pragma unroll
          for (int j = 0; j < kHeadDim / 2; ++j) o[j] *= rescale[j / 2 % 2];
        }
        take_next_p();
        fresh = is_first;
        is_last = tiles == 0;
      }
      if (warpgroup == 0) NamedBarrier::arrive_and_wait(256, own_turn);
      shared.v_full[v_state.index()].wait(v_state.phase());
      cute::warpgroup_arrive();
      multiply_v(!fresh, false);
      cute::warpgroup_wait<0>();
      release(shared.v_empty[v_state.index()]);
      write_rows<T, kHeadDim, Shared>(o, rows, shared.item[warpgroup][(round - 2) % kItems], a, out_map, staging,
                                      own_barrier, first_token);
      ptx::tma_store_wait_written<0>();
    }
    write_empty_items<T, kHeadDim, Shared, kCluster>(a, round - 1, rank);
  }
  // A CTA must not exit while its neighbour may still write to its shared memory or arrive at its barriers.
  __syncwarp();
  if (kCluster > 1) cluster_sync();
#endif
}

template <typename T, int kHeadDim, int kKeys, int kStagesV, int kCluster>
void launch_forward(const ForwardParams& p, const Device& device, const Tiling& tiling) {
  constexpr const char* kOp = "varlen_attention";
  const PackShape& s = p.shape;
  const int group = s.num_heads / s.num_kv_heads;
  using Shared = SharedStorage<kHeadDim, kKeys, kStagesV>;
  const int box_keys = kKeys / kCluster;
  const CUtensorMap q_map = queries_map(kOp, p, p.q, block_tokens(s));
  const PackedView out{p.out, int64_t(s.num_heads) * kHeadDim, kHeadDim};
  const CUtensorMap out_map = queries_map(kOp, p, out, block_tokens(s));
  const CUtensorMap k_map = keys_map(kOp, p, p.k, box_keys);
  const CUtensorMap v_map = keys_map(kOp, p, p.v, box_keys);
  ForwardArguments a{};
  a.plan = p.plan;
  a.out = p.out;
  a.lse = p.lse;
  a.slots = slots_of(p);
  a.total_q = int32_t(s.total_q);
  a.num_heads = s.num_heads;
  a.group = group;
  a.group_reciprocal = group_reciprocal(group);
  a.tile_tokens = tiling.tile_tokens;
  a.block_tokens = block_tokens(s);
  a.scale = p.softmax_scale;
  a.scale_log2 = p.softmax_scale * float(M_LOG2E);
  const bool hints = variant<L2Hints>() == L2Hints::kOn;
  a.rows_hint = l2_policy_if(hints, L2Policy::EVICT_FIRST);
  const bool keys_are_shared = s.total_q > int64_t(s.num_sequences) * tiling.item_tokens();
  a.keys_hint = l2_policy_if(hints && keys_are_shared, L2Policy::EVICT_LAST);
  LaunchShape shape;
  shape.grid = dim3(unsigned(std::min<int64_t>(device.sm_count / kCluster, max_forward_items(s)) * kCluster));
  shape.block = dim3(Shared::kThreads);
  shape.smem_bytes = shared_bytes<Shared>();
  shape.cluster = kCluster;
  shape.dependent = true;
  launch_kernel(kOp, device, p.launch.stream, shape,
                illada_attention_forward_sm90<T, kHeadDim, kKeys, kStagesV, kCluster>, q_map, k_map, v_map, out_map, a);
}

template <typename T, int kHeadDim, int kKeys, int kStagesV>
void launch_forward(const ForwardParams& p, const Device& device, const Tiling& tiling) {
  tiling.cluster == 2 ? launch_forward<T, kHeadDim, kKeys, kStagesV, 2>(p, device, tiling)
                      : launch_forward<T, kHeadDim, kKeys, kStagesV, 1>(p, device, tiling);
}

}  // namespace

template <int kHeadDim, int kKeys, int kStagesV>
void launch_forward_sm90(const ForwardParams& p, const Device& device, const Tiling& tiling) {
  p.dtype == DType::kBFloat16 ? launch_forward<BFloat16, kHeadDim, kKeys, kStagesV>(p, device, tiling)
                              : launch_forward<Half, kHeadDim, kKeys, kStagesV>(p, device, tiling);
}

}  // namespace illada::attention
