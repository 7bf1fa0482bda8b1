// How tiles come into the shared memory of the keys kernel (backward_keys_sm90.cuh): by TMA, one thread's work.
//
// An item has two steps at least (the second one may have no rows): its keys are still read in the first step of the
// next item, so that the keys after those can only come in the second one.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "attention/backward_keys_shared_sm90.cuh"
#include "attention/query_sums_add_sm90.cuh"
#include "attention/query_sums_sm90.cuh"

namespace illada::attention {
namespace {

// By all threads, before anything is loaded. Rows of a tile that no token has are never loaded, but they are summed
// over: zeros.
template <int kHeadDim>
__device__ __forceinline__ void clear_missing_rows(const KeysArguments& a, KeysShared<kHeadDim>& shared) {
  using Shared = KeysShared<kHeadDim>;
  constexpr int kSlices = Shared::RowTile::kSlices;
  const int loaded = a.tile_tokens * a.group, missing = Shared::kRows - loaded;
  for (int i = int(threadIdx.x); i < missing * 8 * kSlices * Shared::kStages; i += Shared::kThreads) {
    const int row = loaded + i / 8 % missing, slice = i / 8 / missing % kSlices, stage = i / 8 / missing / kSlices;
    const int offset = row * kRowBytes + i % 8 * 16;
    *reinterpret_cast<uint4*>(shared.q[stage].slice[slice] + offset) = make_uint4(0, 0, 0, 0);
    *reinterpret_cast<uint4*>(shared.dout[stage].slice[slice] + offset) = make_uint4(0, 0, 0, 0);
  }
  fence_view_async_shared();
}

// By thread 0 of the producers: keys, values, queries and gradients; and, in order, the turns of the warpgroups.
template <int kHeadDim, QuerySums kSums, bool kOrdered>
__device__ __forceinline__ void load_tiles(const KeysArguments& a, KeysShared<kHeadDim>& shared,
                                           const CUtensorMap& q_map, const CUtensorMap& dout_map,
                                           const CUtensorMap& k_map, const CUtensorMap& v_map) {
  using Shared = KeysShared<kHeadDim>;
  using KeyTile = typename Shared::KeyTile;
  using RowTile = typename Shared::RowTile;
  constexpr int kStages = kRowStages<kSums, Shared>;
  auto state = producer_start<kStages>();
  const auto load_keys = [&](const CUtensorMap* map, KeyTile& tile, Barrier& barrier, const WorkItem& item) {
    barrier.arrive_and_expect_tx(uint32_t(sizeof(KeyTile)));
    load_tile(tile, map, barrier, item.kv_head, item.k_start, item.k_count, 0, a.keys_hint);
  };
  const auto load_rows = [&](const CUtensorMap* map, RowTile& tile, Barrier& barrier, const WorkItem& item, int token) {
    barrier.arrive_and_expect_tx(uint32_t(RowTile::kSlices * a.tile_tokens * a.group * kRowBytes));
    load_tile(tile, map, barrier, item.kv_head * a.group, item.q_start, item.q_count, token, a.rows_hint);
  };
  const auto wait_for_turn = [&](auto half) {  // to add dq of two steps before
    const KeysStep& step = shared.step[(state.index() + 1) % kStages];
    if (step.turn)
      wait_for_tiles<decltype(half)::value, 40>(a.arrivals + step.token * a.num_kv_heads + step.kv_head, step.turn);
  };
  const auto first = std::integral_constant<int, 0>{};
  const auto second = std::integral_constant<int, 1>{};
  static_assert(!kOrdered || kStages == 3);
  if (kOrdered)
    for (int s = 0; s < kStages; ++s) shared.step[s] = {};
  int round = 0, number = 0;
  for (;; ++number, ++round) {
    const int buffer = number % 2;
    shared.k_empty[buffer].wait(uint32_t(number / 2 % 2 ^ 1));
    shared.item[buffer] = next_keys<kOrdered>(a, round);
    const WorkItem& item = shared.item[buffer];  // read again for each step: registers are few
    if (item.k_count == 0) break;
    load_keys(&k_map, shared.k[buffer], shared.k_full[buffer], item);
    bool is_first = true;
    for (KeysSteps steps(a, item, !kOrdered && a.staggered); steps.left > 0; steps.advance()) {
      const int token = steps.tile * a.tile_tokens;
      shared.rows_empty[state.index()].wait(state.phase());
      KeysStep& step = shared.step[state.index()];  // q_full, on which this thread arrives, makes it visible
      step.token = item.q_start + token;
      step.tokens = max(min(item.q_count - token, a.tile_tokens), 0);
      step.kv_head = item.kv_head;
      step.is_last = steps.left == 1;
      step.turn = kOrdered && token < item.q_count ? item.piece : 0;
      load_rows(&q_map, shared.q[state.index()], shared.q_full[state.index()], item, token);
      if (is_first) {
        shared.v_empty.wait(uint32_t(number % 2 ^ 1));
        load_keys(&v_map, shared.v, shared.v_full, item);
        is_first = false;
      }
      load_rows(&dout_map, shared.dout[state.index()], shared.dout_full[state.index()], item, token);
      if (kOrdered) {
        wait_for_turn(first);
        shared.turn_full[0][state.index()].arrive();
        wait_for_turn(second);
        shared.turn_full[1][state.index()].arrive();
      }
      ++state;
    }
  }
  shared.k_full[number % 2].arrive();  // an item without keys and queries: the end
  if (kOrdered) {
#pragma unroll 1
    for (int i = 0; i < 2; ++i, ++state) {
      wait_for_turn(first);
      wait_for_turn(second);
    }
    shared.last_turns.arrive();
  }
}

}  // namespace
}  // namespace illada::attention
