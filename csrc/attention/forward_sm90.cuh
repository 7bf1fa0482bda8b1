// Attention forward on sm_90a. Two files per head dim include this file: the default tiling, and the variants.
//
//   out = softmax(scale q k^T) v,  lse = log(sum(exp(scale q k^T))),  within each sequence, for each head
//
// CTAs, or clusters of two, walk over the items of the plan. A CTA has one producer thread, which loads by TMA, and two
// consumer warpgroups (three for head dim 64). Each warpgroup has its own block of 64 rows of the item; all of them use
// the same keys. Rows are the tokens x heads of a group: a box of the queries' tensor map is 64 columns x heads of the
// group x tokens, so that grouped queries arrive as one tile of rows. Boxes end where the item's queries and keys end
// (tensor_map_ragged). Elements behind the end read as 0, whatever they belong to, and are not written.
//
//   producer (Producer::run):
//     for each item:
//       load K of the first tile; load Q for each warpgroup, with the item's record; request the next record
//       for each tile: load K of the next tile, if the item has one; load V of this tile
//     hand over an item without keys, which marks the end
//
//   each consumer warpgroup (Consumer::run):
//     s = q . k of the first tile; p = softmax of s
//     for each tile of all items but the very last:
//       wait for the own turn
//       issue s = q . k of the next tile (after an item's last tile: of the next item's first tile)
//       issue o += p . v of this tile; pass the turn on
//       wait for s; next p = softmax of s, while o += p . v runs
//       wait for o; after an item's last tile store its rows, else rescale o if a reference has moved
//     o += p . v of the last tile; store the rows; write zeros for the items without keys
//
// Schedule with two warpgroups: an item of three tiles, and the beginning of the next item ('). Sj: s = q . k of tile
// j; Pj: softmax of these scores; Oj: o += p . v. Turns make the warpgroups alternate: while one has the tensor cores,
// the other computes its softmax. Steps continue from item to item.
//
//                       time ->
// producer              K0 Q   K1 V0   K2 V1   V2 K0'Q'   K1'V0'   ...  (ahead, as far as the rings have empty stages)
// warpgroup 0  wgmma    [ S0]               [ S1][ O0]          [ S2][ O1]          [S0'][ O2]
//              other         [   P0   ]          [    P1    ]        [    P2    ]        [   P0'    ][store ]
// turn goes to                             0         1         0         1         0         1         0
// warpgroup 1  wgmma         [ S0]                    [ S1][ O0]          [ S2][ O1]          [S0'][ O2]
//              other              [   P0   ]               [    P1    ]        [    P2    ]        [   P0'    ][store ]
//
//   S waits for k_full, with an item's first tile also for q_full, and (but for the very first S) for the turn.
//   O waits for v_full. The warpgroup passes the turn on before it issues the last step of O.
//   P waits for S (wait_group 1: O runs on). k_empty is arrived at after S, q_empty after the last S of an item.
//   The next S waits for O (wait_group 0), and for the store or the rescaling of o. v_empty is arrived at after O.
//
//   barrier           who arrives                                                      who waits
//   q_full[w]         the producer, and the bytes of the queries of warpgroup w        warpgroup w
//   q_empty[w]        warpgroup w                                                      the producer, before Q
//   k_full[stage]     the producer, and the bytes from all CTAs of the cluster         all warpgroups of the CTA
//   k_empty[stage]    all warpgroups of all CTAs of the cluster                        the producer, before K
//   v_full, v_empty   as k_full and k_empty                                            (before V)
//   turn(w), named    warpgroup w - 1, and for w = 0 the last one                      warpgroup w, before S
//   rows(w), named    warpgroup w, before and after it writes out to shared memory     warpgroup w
//
// The last warpgroup gives the first turn when its first P has ended. All threads of the cluster synchronise after the
// barriers are initialised, and before they exit.
//
// The rows of the finished item go from registers through shared memory to memory, while the next products run. The
// partial tile of keys comes first; no other tile needs a mask.
//
// An item with k keys takes 4 * rows * k * D flop and reads 4 k D bytes of keys and values. At the tensor cores' peak,
// 128 rows need 32 bytes per clock and SM from the L2 cache, which gives about 24. Pairs of CTAs (clusters) with
// neighbouring tiles of the same head therefore load each tile of keys once, half each, for both. The tensor cores then
// bound the kernel; see docs/kernels/attention-forward.md.
//
//   forward_shared_sm90.cuh     arguments, shared memory, barriers, order of the items
//   forward_epilogue_sm90.cuh   the rows leave the registers
//   online_softmax_sm90.cuh     softmax of the scores
#pragma once

#include <cuda.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cute/arch/copy_sm80.hpp>

#include "attention/forward_epilogue_sm90.cuh"
#include "attention/forward_shared_sm90.cuh"
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

// ------------------------------------------------------------------------------------------------------------ producer

// The producer: one thread that fills the rings by TMA and hands the items' records to the consumers. It has few
// registers. What it can read or compute again is therefore not kept.
template <typename Shared, int kCluster>
struct Producer {
  static constexpr int kKeys = Shared::kKeys;
  using KeyTile = typename Shared::KeyTile;

  const ForwardArguments& a;
  Shared& shared;
  const CUtensorMap &q_map, &k_map, &v_map;
  const int rank;           // of the CTA in its cluster
  const int halves, items;  // halves_items; number of the kernel's items, 2^halves of them in an item of the plan
  PipelineState<Shared::kStagesK> k_state = producer_start<Shared::kStagesK>();
  PipelineState<Shared::kStagesV> v_state = producer_start<Shared::kStagesV>();

  __device__ __forceinline__ Producer(const ForwardArguments& a, Shared& shared, const CUtensorMap& q_map,
                                      const CUtensorMap& k_map, const CUtensorMap& v_map, int rank)
      : a(a),
        shared(shared),
        q_map(q_map),
        k_map(k_map),
        v_map(v_map),
        rank(rank),
        halves(halves_items<kCluster>(a.plan)),
        items(plan_header(a.plan).forward_items << halves) {}

  // Loads all items.
  __device__ __forceinline__ void run() {
    request_item(0);
    take_item(0);
    const WorkItem& item = shared.producer_item;  // read again for each tile: registers are few
    int round = 0;
    for (; item.k_count > 0; ++round) {
      int row = (item.k_count - 1) / kKeys * kKeys;  // the partial tile comes first; the others need no mask
      load_k(row);
      load_queries(round);
      request_item(round + 1);
#pragma unroll 1
      for (; row >= 0; row -= kKeys) {
        if (row > 0) load_k(row - kKeys);
        load_v(row);
      }
      take_item(round + 1);
    }
    hand_over_end(round);
  }

 private:
  // ---- items

  // Starts the copy of a round's record to shared memory. It takes as long as half a tile, so it runs one item ahead.
  __device__ __forceinline__ void request_item(int round) const {
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
      shared.next_item = WorkItem{};  // without keys: the end
    }
    cute::cp_async_fence();
  }

  // Waits for the requested record and makes it the current item.
  __device__ __forceinline__ void take_item(int round) const {
    cute::cp_async_wait<0>();
    ptx::keep_memory_order();
    copy_item(shared.producer_item, shared.next_item);
    if (halves) {  // if the item has no second tile, the CTA does one tile of useless work
      const int first = (item_index<kCluster>(round) & 1) * a.tile_tokens;
      shared.producer_item.q_start += first;
      shared.producer_item.q_count -= first;
    }
  }

  // Gives warpgroup w the record of the current item, once its last product with the previous queries has ended.
  __device__ __forceinline__ void hand_over_item(int w, int round) const {
    shared.q_empty[w].wait(uint32_t(round) % 2 ^ 1);  // a phase is a round; in the first one it returns at once
    copy_item(shared.item[w][round % Shared::kItems], shared.producer_item);
  }

  // Gives every warpgroup the current item: its record and the warpgroup's block of its queries.
  __device__ __forceinline__ void load_queries(int round) const {
    const WorkItem& item = shared.producer_item;
#pragma unroll
    for (int w = 0; w < Shared::kConsumers; ++w) {
      hand_over_item(w, round);
      shared.q_full[w].arrive_and_expect_tx(uint32_t(Shared::kSlices * a.block_tokens * a.group * kRowBytes));
      load_tile(shared.q[w], &q_map, shared.q_full[w], item.kv_head * a.group, item.q_start, item.q_count,
                (rank * Shared::kConsumers + w) * a.block_tokens, a.rows_hint);
    }
  }

  // Gives every warpgroup an item without keys, which marks the end.
  __device__ __forceinline__ void hand_over_end(int round) const {
#pragma unroll
    for (int w = 0; w < Shared::kConsumers; ++w) {
      hand_over_item(w, round);
      shared.q_full[w].arrive();
    }
  }

  // ---- tiles of keys and values

  // Loads the current item's keys, or values, from `row` on into the next stage of their ring, once it is empty.
  __device__ __forceinline__ void load_k(int row) {
    shared.k_empty[k_state.index()].wait(k_state.phase());
    load_share(&k_map, shared.k[k_state.index()], shared.k_full[k_state.index()], row);
    ++k_state;
  }
  __device__ __forceinline__ void load_v(int row) {
    shared.v_empty[v_state.index()].wait(v_state.phase());
    load_share(&v_map, shared.v[v_state.index()], shared.v_full[v_state.index()], row);
    ++v_state;
  }

  // Loads this CTA's share of a tile, for all CTAs of the cluster. Each of them expects the bytes of the whole tile.
  __device__ __forceinline__ void load_share(const CUtensorMap* map, KeyTile& tile, Barrier& barrier, int row) const {
    const WorkItem& item = shared.producer_item;
    // The rank is read again, not kept: registers are few.
    const int part = kCluster > 1 ? int(cute::block_rank_in_cluster()) * (kKeys / kCluster) : 0;
    barrier.arrive_and_expect_tx(uint32_t(sizeof(KeyTile)));
#pragma unroll
    for (int slice = 0; slice < Shared::kSlices; ++slice) {
      char* const target = tile.slice[slice] + part * kRowBytes;
      const int from_end = kRaggedTokens - item.k_count + row + part, end = item.k_start + item.k_count;
      load_box<kCluster>(target, map, barrier, a.keys_hint, 64 * slice, item.kv_head, from_end, end);
    }
  }
};

// ----------------------------------------------------------------------------------------------------------- consumers

// A consumer warpgroup: its block of rows, and its places in the rings. All its threads call each method.
//
// Scores are one tile ahead of sums: "this tile" is the tile of p and of the next sums, "the next tile" that of s.
// While this tile is the last of its item, the next tile is the first of the next item, which is then already open.
template <typename T, typename Shared, int kCluster>
struct Consumer {
  static constexpr int kHeadDim = Shared::kHeadDim, kKeys = Shared::kKeys, kConsumers = Shared::kConsumers;
  using QueryTile = typename Shared::QueryTile;
  using KeyTile = typename Shared::KeyTile;

  const ForwardArguments& a;
  Shared& shared;
  const CUtensorMap& out_map;
  const int warpgroup, thread;                              // index of the warpgroup, and of the thread within it
  const int first_token;                                    // of the block, counted from the item's first token
  const uint64_t q_descriptor, k_descriptor, v_descriptor;  // of the queries, and of the first stage of each ring
  const uint32_t staging;                                   // address of the staging rows of out
  PipelineState<Shared::kStagesK> k_state;
  PipelineState<Shared::kStagesV> v_state;
  int round = 0;       // of the item after the open one
  int tiles_left = 0;  // tiles of the open item whose scores are not complete
  int first_keys = 0;  // keys of its first tile

  float s[kKeys / 2];         // scores of the next tile
  float o[kHeadDim / 2];      // sums of p v of this tile's item
  uint32_t p[kKeys / 16][4];  // probabilities of this tile, as the A operand of the product
  // Probabilities of the next tile: the product that is in flight still reads p. With kPacksLate they stay in s.
  uint32_t next_p[Shared::kPacksLate ? 1 : kKeys / 16][4];
  OnlineSoftmax rows;  // statistics of the rows, of the open item
  float rescale[2];    // factor of o, where compute_next_p returns true

  __device__ __forceinline__ Consumer(const ForwardArguments& a, Shared& shared, const CUtensorMap& out_map, int rank)
      : a(a),
        shared(shared),
        out_map(out_map),
        warpgroup(__shfl_sync(kFullWarp, int(threadIdx.x) / 128, 0)),  // uniform, as the compiler can now see
        thread(int(threadIdx.x) % 128),
        first_token((rank * kConsumers + warpgroup) * a.block_tokens),
        q_descriptor(gmma_descriptor_k(ptx::smem_address(&shared.q[warpgroup]))),
        k_descriptor(gmma_descriptor_k(ptx::smem_address(shared.k))),
        v_descriptor(gmma_descriptor_mn(ptx::smem_address(shared.v), kKeys * kRowBytes)),
        staging(ptx::smem_address(&shared.out[warpgroup])) {}

  // Multiplies the items that have keys, and stores their rows. Returns the round of the first item without keys.
  __device__ __forceinline__ int run() {
    if (!open_item()) return 0;
    wait_for_k();
    issue_scores();
    wait_for_scores<0>();
    compute_next_p(true);
    start_turns();
    take_next_p();

    bool is_first = true, is_last = tiles_left == 0;  // of this tile, within its item
    while (!is_last || open_item()) {
      wait_for_k();  // before the turn, which must not be spent on waiting for keys
      wait_for_turn();
      issue_scores();
      issue_sums<true>(!is_first);

      wait_for_scores<1>();
      const OnlineSoftmax finished = rows;         // of this tile's item; a new item overwrites them
      const bool moved = compute_next_p(is_last);  // runs beside the sums
      keep_next_p_before_wait();

      wait_for_sums();
      if (is_last) {
        write_rows(finished);
      } else if (moved) {
        rescale_sums();
      }
      take_next_p();
      is_first = is_last;
      is_last = tiles_left == 0;
    }

    end_turns();
    issue_sums<false>(!is_first);
    wait_for_sums();
    write_rows(rows);
    ptx::tma_store_wait_written<0>();  // the CTA must outlive its stores of out, which read shared memory
    return round - 1;
  }

 private:
  // Opens the next item once its queries have arrived. Returns false if it is the end.
  __device__ __forceinline__ bool open_item() {
    shared.q_full[warpgroup].wait(uint32_t(round) % 2);
    const int keys = __shfl_sync(kFullWarp, shared.item[warpgroup][round % Shared::kItems].k_count, 0);
    ++round;
    tiles_left = (keys + kKeys - 1) / kKeys;
    first_keys = keys - (tiles_left - 1) * kKeys;
    return tiles_left > 0;
  }

  // ---- turns

  // The last warpgroup gives warpgroup 0 the first turn, after its first softmax.
  __device__ __forceinline__ void start_turns() const {
    if (warpgroup == kConsumers - 1) pass_turn();
  }
  __device__ __forceinline__ void wait_for_turn() const { NamedBarrier::arrive_and_wait(256, Shared::turn(warpgroup)); }
  __device__ __forceinline__ void pass_turn() const {
    NamedBarrier::arrive(256, Shared::turn((warpgroup + 1) % kConsumers));
  }
  // The last turn of the last warpgroup went to warpgroup 0, which must take it: no barrier may end half full.
  __device__ __forceinline__ void end_turns() const {
    if (warpgroup == 0) wait_for_turn();
  }

  // ---- products

  // Waits for the keys of the next tile.
  __device__ __forceinline__ void wait_for_k() const { shared.k_full[k_state.index()].wait(k_state.phase()); }

  // Issues s = q . k of the next tile.
  __device__ __forceinline__ void issue_scores() {
    const uint64_t b = descriptor_in_ring(k_descriptor, k_state.index());
    cute::warpgroup_arrive();
    multiply_rows<T, QueryTile, KeyTile, kKeys>(s, q_descriptor, b);
    cute::warpgroup_commit_batch();
  }

  // Issues o += p . v of this tile, or o = p . v, once the values have arrived. The turn is passed on before the last
  // step is issued, so that the tensor cores do not idle between the warpgroups.
  template <bool kPassesTurn>
  __device__ __forceinline__ void issue_sums(bool accumulate) {
    shared.v_full[v_state.index()].wait(v_state.phase());
    const uint64_t b = descriptor_in_ring(v_descriptor, v_state.index());
    cute::warpgroup_arrive();
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      if (kPassesTurn && step == kKeys / 16 - 1) pass_turn();
      warpgroup_mma_rs<T, kHeadDim>(o, p[step], b + step * (16 * kRowBytes / 16), accumulate || step > 0);
    }
    cute::warpgroup_commit_batch();
  }

  // Waits until s is complete, while kInFlight later products run on. Releases what it was computed from: the keys and,
  // after the item's last tile, the queries.
  template <int kInFlight>
  __device__ __forceinline__ void wait_for_scores() {
    cute::warpgroup_wait<kInFlight>();
    release(shared.k_empty[k_state.index()]);
    ++k_state;
    shared.q_empty[warpgroup].arrive_if(--tiles_left == 0 && thread == 0);
  }

  // Waits until o is complete and releases the values.
  __device__ __forceinline__ void wait_for_sums() {
    cute::warpgroup_wait<0>();
    ptx::wgmma_keep_operand(p, a.total_q < 0, staging);  // ptxas would give p's registers to the next probabilities
    release(shared.v_empty[v_state.index()]);
    ++v_state;
  }

  // ---- softmax

  // Computes the next tile's probabilities from s. Returns true if a row's reference has moved within its item; o must
  // then be rescaled. A new item starts new rows.
  __device__ __forceinline__ bool compute_next_p(bool is_new_item) {
    if (is_new_item) {
      if (first_keys < kKeys) mask_scores(s, first_keys);
      rows.start(s, a.scale_log2);
    }
    if constexpr (Shared::kPacksLate) {
      return rows.update_in_place(s, a.scale_log2, rescale);
    } else {
      return rows.update<T>(s, a.scale_log2, next_p, rescale);
    }
  }
  // With kPacksLate, ptxas would move all exponentials behind the wait for the sums, which they should run beside.
  __device__ __forceinline__ void keep_next_p_before_wait() const {
    if constexpr (Shared::kPacksLate) ptx::wgmma_compute_before_wait(rows.sum[0], rows.sum[1], a.total_q < 0, staging);
  }

  // Makes the next tile this tile. No product may still read p.
  __device__ __forceinline__ void take_next_p() {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) {
      if constexpr (Shared::kPacksLate) {
        p[i / 4][i % 4] = pack2<T>(s[2 * i], s[2 * i + 1]);
      } else {
        p[i / 4][i % 4] = next_p[i / 4][i % 4];
      }
    }
  }

  // ---- sums

  __device__ __forceinline__ void rescale_sums() {
#pragma unroll
    for (int j = 0; j < kHeadDim / 2; ++j) o[j] *= rescale[j / 2 % 2];
  }

  // Stores the rows of the item before the open one.
  __device__ __forceinline__ void write_rows(const OnlineSoftmax& finished) {
    const WorkItem& item = shared.item[warpgroup][(round - 2) % Shared::kItems];
    Epilogue<T, Shared>{a, item, first_token}.write(o, finished, out_map, staging, Shared::rows(warpgroup));
  }

  // ---- stages of the rings

  // Descriptors of a ring's tiles differ only in the low half. The compiler knows the high half, which therefore takes
  // no register.
  static __device__ __forceinline__ uint64_t descriptor_in_ring(uint64_t first, int index) {
    return first >> 32 << 32 | uint32_t(uint32_t(first) + uint32_t(index) * uint32_t(sizeof(KeyTile) / 16));
  }

  // Releases a stage of keys or values: one thread arrives for each CTA that loads into it.
  __device__ __forceinline__ void release(Barrier& barrier) const {
    if constexpr (kCluster > 1) {
      barrier.arrive_if(thread < kCluster, uint32_t(thread));
    } else {
      barrier.arrive_if(thread == 0);
    }
  }
};

// -------------------------------------------------------------------------------------------------------------- kernel

template <typename T, int kHeadDim, int kKeys, int kStagesV, int kCluster>
__global__ __launch_bounds__(SharedStorage<kHeadDim, kKeys, kStagesV>::kThreads, 1) void illada_attention_forward_sm90(
    const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
    const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap out_map,
    const __grid_constant__ ForwardArguments a, const __grid_constant__ DependentLaunch launch) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Shared = SharedStorage<kHeadDim, kKeys, kStagesV>;
  constexpr int kConsumers = Shared::kConsumers;
  extern __shared__ char raw_shared[];
  Shared& shared = ptx::shared_at<Shared>((ptx::smem_address(raw_shared) + 1023) / 1024 * 1024);
  const int rank = kCluster > 1 ? int(cute::block_rank_in_cluster()) : 0;

  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(&q_map);
    cute::prefetch_tma_descriptor(&k_map);
    cute::prefetch_tma_descriptor(&v_map);
    cute::prefetch_tma_descriptor(&out_map);
    init_barriers<kCluster>(shared);
  }
  if (kCluster > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }
  wait_for_previous_kernel(launch);

  if (threadIdx.x >= 128 * kConsumers) {
    Shared::Registers::as_producer();
    if (threadIdx.x == 128 * kConsumers) Producer<Shared, kCluster>(a, shared, q_map, k_map, v_map, rank).run();
  } else {
    Shared::Registers::as_consumer();
    const int round = Consumer<T, Shared, kCluster>(a, shared, out_map, rank).run();
    write_empty_items<T, Shared, kCluster>(a, round, rank);
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
