// The queries kernel: dq on sm_90a where the keys kernel does not sum it. It works in a fixed order, without sums in
// memory.
//
// CTAs walk over the forward items of the plan, as the forward does. Two consumer warpgroups have 64 rows (tokens x
// heads of the group) each. A producer warp loads tiles of 128 keys and values for both. Rows are on the M side. The
// scores and their gradients are therefore operands directly from registers, and the statistics take two registers per
// row.
//
//   consumer warpgroup:
//     s = q k^T, dp = do v^T of the first tile; p from s
//     for each tile of all items:
//       ds = p (dp - c)
//       wait for the own turn
//       issue dq += ds k of this tile, then s = q k^T and dp = do v^T of the next tile; pass the turn on
//       p of the next tile from s; at the end of an item, store dq
//
// Who waits for whom (arrows: barriers, from the threads that arrive to those that wait):
//
//   warp 8, thread 256:    q_full[w], k_full[s], v_full[s]
//   loads tiles        ------------------------------------->  warpgroups w = 0 and 1: products; they store dq
//   QueriesProducer    <-------------------------------------  QueriesConsumer
//                          q_empty[w], k_empty[s], v_empty[s]      between the two: turns 0, 1
//
//   q_full, q_empty   the item of warpgroup w, its queries and gradients have arrived; warpgroup w has read them
//   k_full, k_empty   the keys of stage s have arrived; both warpgroups have read them
//   v_full, v_empty   the same for the values of stage s
//   turns             named barriers: a warpgroup issues its three products together, so that the exponentials of the
//                     other warpgroup run at the same time
//
// When they work. In a turn (T), a warpgroup issues dq of tile n, then s and dp of tile n + 1:
//
//   warpgroup 0   |T: dq4 s5 dp5 | p, ds of 5   |T: dq5 s6 dp6 | p, ds of 6   |T: dq6 ...
//   warpgroup 1   | p, ds of 4   |T: dq4 s5 dp5 | p, ds of 5   |T: dq5 s6 dp6 | p ...
//   thread 256                           | k, v of 6                   | k, v of 7 ...
//
//   - Tiles have two stages. Keys of tile n + 2 load when dq of tile n is complete in both warpgroups. Values could
//     load once dp of tile n is complete, but follow the keys.
//   - q and dout of the next item load when dp of the item's last tile is complete. The next item's tiles follow them.
//   - No wait can deadlock. A turn of tile n needs tile n + 1, whose loads wait only for turns of tiles before n, and
//     for q_empty. This is dp of tile n, which both warpgroups issue in their turns of tile n - 1.
//
// The partial tile of keys comes first; no other tile needs a mask. The next item's first products follow this item's
// last products, and this item's dq is stored meanwhile.
//
// 128 rows and 128 keys at D 128 take 3 * 2 * 128^3 flop, 3072 clocks of the tensor cores.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "attention/accumulator_rows.cuh"
#include "attention/launch.h"
#include "attention/probabilities.cuh"
#include "attention/tiles_sm90.cuh"
#include "common/barrier_sm90.cuh"
#include "common/dependent_launch.h"
#include "common/dtype.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "common/registers_sm90.cuh"
#include "common/tensor_map.h"
#include "common/wgmma.cuh"

namespace illada::attention {
namespace {

template <int kHeadDim>
struct QueriesShared {
  static constexpr int kKeys = 128, kSlices = kHeadDim / 64, kStages = 2;
  using Registers = RegisterSplit<2, 40, 232>;
  static constexpr int kThreads = Registers::kThreads;
  using KeyTile = Tile<kKeys, kHeadDim>;
  using RowTile = Tile<kBlockRows, kHeadDim>;
  RowTile q[2], dout[2];  // tiles of each warpgroup
  KeyTile k[kStages], v[kStages];
  Barrier q_full[2], q_empty[2], k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
  // For each warpgroup: the item whose dq is stored, the current one, and the next one, which may arrive while both are
  // read.
  static constexpr int kItems = 4;
  WorkItem item[2][kItems];
};

struct QueriesArguments {
  const int32_t* plan;
  const RowStatistics* rows;
  void* dq;
  int32_t total_q, num_heads, group, block_tokens, parts;  // parts: parts of two blocks per forward item
  uint32_t group_reciprocal;
  float scale, scale_log2;        // softmax_scale, and softmax_scale times log2(e)
  uint64_t rows_hint, keys_hint;  // hints to the L2 cache
};

// Returns the next work of a CTA from `round` on, and sets `round` to its round. It is two blocks of queries
// against all of their keys. q_count 0 means that no work is left.
__device__ __forceinline__ WorkItem next_queries(const QueriesArguments& a, int& round) {
  const int items = plan_header(a.plan).forward_items * a.parts, grid = int(gridDim.x);
  for (;; ++round) {
    const int index = serpentine_index(round, int(blockIdx.x), grid);
    if (round * grid >= items) return {};
    if (index >= items) continue;
    const int number = index / a.parts, first = (index - number * a.parts) * 2 * a.block_tokens;
    WorkItem item = forward_items(a.plan)[number];
    item.q_start += first;
    item.q_count = min(item.q_count - first, 2 * a.block_tokens);
    if (item.q_count <= 0 || item.split > 0) continue;
    if (item.splits > 1) {  // the other key splits follow in the list
      const WorkItem last = forward_items(a.plan)[number + item.splits - 1];
      item.k_count = last.k_start + last.k_count - item.k_start;
    }
    return item;
  }
}

// ------------------------------------------------------------------------------------------------------------ producer

// The producer thread. It loads the items of the CTA, in the order in which the consumers read them.
template <int kHeadDim>
struct QueriesProducer {
  using Shared = QueriesShared<kHeadDim>;
  using KeyTile = typename Shared::KeyTile;
  using RowTile = typename Shared::RowTile;

  const QueriesArguments& a;
  Shared& shared;
  const CUtensorMap &q_map, &dout_map, &k_map, &v_map;
  PipelineState<Shared::kStages> state = producer_start<Shared::kStages>();  // stage of the next tile of keys
  int number = 0;                                                            // number of items loaded

  __device__ __forceinline__ void run() {
    int round = 0;
    for (WorkItem item = next_queries(a, round); item.k_count > 0; ++number, ++round, item = next_queries(a, round)) {
#pragma unroll
      for (int w = 0; w < 2; ++w) load_rows(w, item);
      for (int row = (item.k_count - 1) / Shared::kKeys * Shared::kKeys; row >= 0; row -= Shared::kKeys) {
        const int stage = state.index();
        load_keys(k_map, shared.k[stage], shared.k_full[stage], shared.k_empty[stage], item, row);
        load_keys(v_map, shared.v[stage], shared.v_full[stage], shared.v_empty[stage], item, row);
        ++state;
      }
    }
#pragma unroll
    for (int w = 0; w < 2; ++w) send_end(w);
  }

  // Loads the queries and gradients of warpgroup w's block, once the block before it has been read.
  __device__ __forceinline__ void load_rows(int w, const WorkItem& item) {
    shared.q_empty[w].wait(uint32_t(number) % 2 ^ 1);
    shared.item[w][number % Shared::kItems] = item;
    shared.q_full[w].arrive_and_expect_tx(uint32_t(2 * Shared::kSlices * a.block_tokens * a.group * kRowBytes));
    load_block(q_map, shared.q[w], w, item);
    load_block(dout_map, shared.dout[w], w, item);
  }
  __device__ __forceinline__ void load_block(const CUtensorMap& map, RowTile& tile, int w, const WorkItem& item) {
    load_tile(tile, &map, shared.q_full[w], item.kv_head * a.group, item.q_start, item.q_count, w * a.block_tokens,
              a.rows_hint);
  }

  // Loads a tile of keys or values from key `row` of the item on, once both warpgroups have read the stage.
  __device__ __forceinline__ void load_keys(const CUtensorMap& map, KeyTile& tile, Barrier& full, Barrier& empty,
                                            const WorkItem& item, int row) {
    empty.wait(state.phase());
    full.arrive_and_expect_tx(uint32_t(sizeof(KeyTile)));
    load_tile(tile, &map, full, item.kv_head, item.k_start, item.k_count, row, a.keys_hint);
  }

  // Tells warpgroup w that no item is left: an item without keys marks the end.
  __device__ __forceinline__ void send_end(int w) {
    shared.q_empty[w].wait(uint32_t(number) % 2 ^ 1);
    shared.item[w][number % Shared::kItems] = WorkItem{};
    shared.q_full[w].arrive();
  }
};

// ----------------------------------------------------------------------------------------------------------- consumers

// A consumer warpgroup. It computes dq of one block of rows per item.
template <typename T, int kHeadDim>
struct QueriesConsumer {
  using Shared = QueriesShared<kHeadDim>;
  static constexpr int kKeys = Shared::kKeys, kStages = Shared::kStages;
  static constexpr uint32_t kKeyBytes = sizeof(typename Shared::KeyTile);

  const QueriesArguments& a;
  Shared& shared;
  const int warpgroup, thread, lane;
  const int row;  // the lane's rows are `row` and row + 8
  // Descriptors of the operands. The stage is added where a product is issued.
  const uint64_t q_rows, dout_rows, k_rows, v_rows, k_columns;

  // The tile whose scores are made: "the next tile" during a turn, "this tile" after it.
  PipelineState<kStages> state;           // stage of the tile whose s is next
  int stage = 0;                          // stage of the tile in s and dp
  bool is_first = true, is_last = false;  // is it the first, the last tile of its item?
  // The item of that tile.
  int number = 0;            // number of items begun
  int tiles = 0, valid = 0;  // tiles of the item that are not yet in s; keys in its first tile
  RowStatistics rows[2];     // statistics of the lane's rows

  float dq[kHeadDim / 2], s[kKeys / 2], dp[kKeys / 2];
  uint32_t ds[kKeys / 16][4];

  __device__ __forceinline__ QueriesConsumer(const QueriesArguments& arguments, Shared& shared_)
      : a(arguments),
        shared(shared_),
        warpgroup(__shfl_sync(kFullWarp, int(threadIdx.x) / 128, 0)),
        thread(int(threadIdx.x) % 128),
        lane(thread % 32),
        row(thread / 32 * 16 + lane / 4),
        q_rows(gmma_descriptor_k(ptx::smem_address(&shared.q[warpgroup]))),
        dout_rows(q_rows + (offsetof(Shared, dout) - offsetof(Shared, q)) / 16),
        k_rows(gmma_descriptor_k(ptx::smem_address(shared.k))),
        v_rows(k_rows + (offsetof(Shared, v) - offsetof(Shared, k)) / 16),
        k_columns(gmma_descriptor_mn(ptx::smem_address(shared.k), kKeys * kRowBytes)) {}

  // Computes dq of all items of the CTA.
  __device__ __forceinline__ void run() {
    if (!open_item()) return;
    if (warpgroup == 1) pass_turn();
    issue_s();
    issue_dp(false);
    finish_scores();
    while (true) {
      // p is in s, in fp32, and dp is complete. No product is in flight.
      const int old_stage = stage;
      compute_ds();
      const bool ends_item = is_last, begins_item = is_first;
      if (ends_item && !open_item()) break;
      wait_for_turn();
      cute::warpgroup_arrive();
      issue_dq(old_stage, !begins_item);
      issue_s();
      warpgroup_wait<1>(dq);
      ptx::wgmma_keep_operand(ds, a.total_q < 0, ptx::smem_address(&shared));
      shared.k_empty[old_stage].arrive_if(thread == 0);
      issue_dp(true);
      is_first = ends_item;
      finish_scores();
      if (ends_item) write_dq();
    }
    if (warpgroup == 0) wait_for_turn();
    cute::warpgroup_arrive();
    issue_dq(stage, !is_first);
    warpgroup_wait<0>(dq);
    write_dq();
  }

  __device__ __forceinline__ void wait_for_turn() const { NamedBarrier::arrive_and_wait(256, warpgroup); }
  __device__ __forceinline__ void pass_turn() const { NamedBarrier::arrive(256, 1 - warpgroup); }

  // Waits for the next item and reads the statistics of its rows. Returns false if there is none.
  __device__ __forceinline__ bool open_item() {
    shared.q_full[warpgroup].wait(uint32_t(number) % 2);
    const WorkItem& item = shared.item[warpgroup][number % Shared::kItems];
    const int count = __shfl_sync(kFullWarp, item.k_count, 0);
    ++number;
    tiles = (count + kKeys - 1) / kKeys;
    valid = count - (tiles - 1) * kKeys;
    if (tiles == 0) return false;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token =
          min(warpgroup * a.block_tokens + int((row + 8 * i) * a.group_reciprocal >> 16), item.q_count - 1);
      const int head = (row + 8 * i) % a.group;
      rows[i] = a.rows[(int64_t(item.kv_head) * a.total_q + item.q_start + token) * a.group + head];
    }
    return true;
  }

  // d = x y^T of the warpgroup's rows and the tile of keys or values in `stage`.
  __device__ __forceinline__ void issue_scores(float (&d)[kKeys / 2], uint64_t x, uint64_t keys, bool passes_turn) {
    // The compiler must not know that x is the same in every step. It would keep each address derived from x in a
    // register.
    x += uint64_t(stage) * uint64_t(a.total_q < 0);
    const uint64_t y = keys + uint64_t(stage) * (kKeyBytes / 16);
    multiply_rows<T, typename Shared::RowTile, typename Shared::KeyTile, kKeys>(d, x, y);
    if (passes_turn) pass_turn();
    cute::warpgroup_commit_batch();
  }
  // Issues s = q k^T of the next tile.
  __device__ __forceinline__ void issue_s() {
    stage = state.index();
    shared.k_full[stage].wait(state.phase());
    cute::warpgroup_arrive();
    issue_scores(s, q_rows, k_rows, false);
  }
  // Issues dp = do v^T of the same tile.
  __device__ __forceinline__ void issue_dp(bool passes_turn) {
    shared.v_full[stage].wait(state.phase());
    cute::warpgroup_arrive();
    issue_scores(dp, dout_rows, v_rows, passes_turn);
    ++state;
  }
  // Issues dq += ds k of the tile in `of_stage`.
  __device__ __forceinline__ void issue_dq(int of_stage, bool accumulate) {
    const uint64_t y = k_columns + uint64_t(of_stage) * (kKeyBytes / 16);
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i)
      warpgroup_mma_rs<T, kHeadDim>(dq, ds[i], y + i * (16 * kRowBytes / 16), accumulate || i > 0);
    cute::warpgroup_commit_batch();
  }

  // Waits for s and turns it into p, while dp is still in flight. Then waits for dp and frees what was read last.
  __device__ __forceinline__ void finish_scores() {
    const bool far = __any_sync(kFullWarp, is_far(rows[0].offset) || is_far(rows[1].offset));
    warpgroup_wait<1>(s);
    if (is_first && valid < kKeys) mask_scores(s, valid);
    exponentiate(s, a.scale, a.scale_log2, far, [&](int j) { return rows[j / 2 % 2].offset; });
    is_last = --tiles == 0;
    warpgroup_wait<0>(dp);
    shared.v_empty[stage].arrive_if(thread == 0);
    shared.q_empty[warpgroup].arrive_if(thread == 0 && is_last);
  }

  // Computes ds = p (dp - c) in 16 bits, as an operand.
  __device__ __forceinline__ void compute_ds() {
#pragma unroll
    for (int j = 0; j < kKeys / 2; j += 2) {
      const float c = rows[j / 2 % 2].c;
      ds[j / 8][j / 2 % 4] = pack2<T>(s[j] * (dp[j] - c), s[j + 1] * (dp[j + 1] - c));
    }
  }

  // Stores dq of the item before the one that was opened last.
  __device__ __forceinline__ void write_dq() {
    const WorkItem& item = shared.item[warpgroup][(number - 2) % Shared::kItems];
    const int tokens = min(item.q_count - warpgroup * a.block_tokens, a.block_tokens);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = int((row + 8 * i) * a.group_reciprocal >> 16), head = row + 8 * i - token * a.group;
      const int64_t place = int64_t(item.q_start + warpgroup * a.block_tokens + token) * a.num_heads;
      store_row<T, kHeadDim>(static_cast<T*>(a.dq) + (place + item.kv_head * a.group + head) * kHeadDim, dq, i, a.scale,
                             token < tokens, lane);
    }
  }
};

// Writes zeros to dq of queries without keys, which are the last ones of the list. All consumers call it.
template <int kHeadDim>
__device__ __forceinline__ void write_queries_without_keys(const QueriesArguments& a) {
  for (int index = plan_header(a.plan).forward_items - 1 - int(blockIdx.x); index >= 0; index -= int(gridDim.x)) {
    const WorkItem item = forward_items(a.plan)[index];
    if (item.k_count > 0) break;
    constexpr int kWords = kHeadDim / 8;
    for (int i = int(threadIdx.x); i < item.q_count * a.group * kWords; i += 256) {
      const int r = i / kWords;
      const int64_t at = int64_t(item.q_start + r / a.group) * a.num_heads + item.kv_head * a.group + r % a.group;
      static_cast<uint4*>(a.dq)[at * kWords + i % kWords] = make_uint4(0, 0, 0, 0);
    }
  }
}

// -------------------------------------------------------------------------------------------------------------- kernel

// Initialises the barriers. One thread calls it.
template <int kHeadDim>
__device__ __forceinline__ void init_barriers(QueriesShared<kHeadDim>& shared) {
  for (int i = 0; i < 2; ++i) {
    shared.q_full[i].init(1);
    shared.q_empty[i].init(1);
  }
  for (int s = 0; s < QueriesShared<kHeadDim>::kStages; ++s) {
    shared.k_full[s].init(1);
    shared.k_empty[s].init(2);
    shared.v_full[s].init(1);
    shared.v_empty[s].init(2);
  }
  cutlass::arch::fence_barrier_init();
}

template <typename T, int kHeadDim>
__global__ __launch_bounds__(QueriesShared<kHeadDim>::kThreads, 1) void illada_attention_backward_queries_sm90(
    const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap dout_map,
    const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map,
    const __grid_constant__ QueriesArguments a, const __grid_constant__ DependentLaunch launch) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Shared = QueriesShared<kHeadDim>;
  extern __shared__ char raw_shared[];
  const uint32_t shared_start = ptx::smem_address(raw_shared), aligned_start = (shared_start + 1023) / 1024 * 1024;
  Shared& shared = *reinterpret_cast<Shared*>(raw_shared + (aligned_start - shared_start));

  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(&q_map);
    cute::prefetch_tma_descriptor(&dout_map);
    cute::prefetch_tma_descriptor(&k_map);
    cute::prefetch_tma_descriptor(&v_map);
    init_barriers(shared);
  }
  __syncthreads();
  wait_for_previous_kernel(launch);

  if (threadIdx.x >= 256) {
    Shared::Registers::as_producer();
    if (threadIdx.x == 256) QueriesProducer<kHeadDim>{a, shared, q_map, dout_map, k_map, v_map}.run();
  } else {
    Shared::Registers::as_consumer();
    QueriesConsumer<T, kHeadDim>(a, shared).run();
    write_queries_without_keys<kHeadDim>(a);
  }
#endif
}

template <typename T, int kHeadDim>
void launch_backward_queries(const BackwardParams& p, const Device& device, const Tiling& tiling) {
  constexpr const char* kOp = "varlen_attention_backward";
  using Shared = QueriesShared<kHeadDim>;
  const PackShape& s = p.shape;
  const int group = s.num_heads / s.num_kv_heads;
  const CUtensorMap q_map = queries_map(kOp, p, p.q, block_tokens(s));
  const CUtensorMap dout_map = queries_map(kOp, p, p.dout, block_tokens(s));
  const CUtensorMap k_map = keys_map(kOp, p, p.k, Shared::kKeys);
  const CUtensorMap v_map = keys_map(kOp, p, p.v, Shared::kKeys);
  QueriesArguments a{};
  a.plan = p.plan;
  a.rows = scratch_of(p, {}).rows;
  a.dq = p.dq;
  a.total_q = int32_t(s.total_q);
  a.num_heads = s.num_heads;
  a.group = group;
  a.block_tokens = block_tokens(s);
  a.parts = (tiling.item_tokens() / block_tokens(s) + 1) / 2;
  a.group_reciprocal = group_reciprocal(group);
  const bool hints = variant<L2Hints>() == L2Hints::kOn;
  a.rows_hint = l2_policy_if(hints, L2Policy::EVICT_FIRST);
  a.keys_hint = l2_policy_if(hints, L2Policy::EVICT_LAST);
  a.scale = p.softmax_scale;
  a.scale_log2 = p.softmax_scale * float(M_LOG2E);
  LaunchShape shape;
  shape.grid = dim3(unsigned(std::min<int64_t>(device.sm_count, max_forward_items(s) * a.parts)));
  shape.block = dim3(Shared::kThreads);
  shape.smem_bytes = shared_bytes<Shared>();
  shape.dependent = true;
  launch_kernel(kOp, device, p.launch.stream, shape, illada_attention_backward_queries_sm90<T, kHeadDim>, q_map,
                dout_map, k_map, v_map, a);
}

}  // namespace
}  // namespace illada::attention
