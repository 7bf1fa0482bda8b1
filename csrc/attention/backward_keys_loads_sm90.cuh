// Loads of tiles into the shared memory of the keys kernel (backward_keys_sm90.cuh). One thread loads them by TMA:
//
//   for each item:
//     load K of the item, into the other of two buffers
//     for each step: load q; in the first step load V; load dout; in order: wait for the turns to add dq of two steps
//                    before
//   hand over an item without keys, which marks the end; in order: wait for the turns to add the last two dq
//
// An item has at least two steps; the second one may have no rows. The first step of the next item still reads the keys
// of this item. The keys of the item after the next can therefore arrive only from the next item's second step on.
// Why no wait here can deadlock: dq_accumulation_sm90.cuh.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "attention/backward_keys_shared_sm90.cuh"
#include "attention/dq_accumulation_add_sm90.cuh"
#include "attention/dq_accumulation_sm90.cuh"

namespace illada::attention {
namespace {

// Writes zeros to the rows of a tile that have no token. They are never loaded, but the products sum over them. All
// threads call it, before anything is loaded.
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

// Loads keys, values, queries and gradients. In ordered mode it also gives the warpgroups their turns. Thread 0 of the
// producers calls it.
template <int kHeadDim, DqAccumulation kAccumulation, bool kOrdered>
__device__ __forceinline__ void load_tiles(const KeysArguments& a, KeysShared<kHeadDim>& shared,
                                           const CUtensorMap& q_map, const CUtensorMap& dout_map,
                                           const CUtensorMap& k_map, const CUtensorMap& v_map) {
  using Shared = KeysShared<kHeadDim>;
  using KeyTile = typename Shared::KeyTile;
  using RowTile = typename Shared::RowTile;
  constexpr int kStages = kRowStages<kAccumulation, Shared>;
  auto state = producer_start<kStages>();
  const auto load_keys = [&](const CUtensorMap* map, KeyTile& tile, Barrier& barrier, const WorkItem& item) {
    barrier.arrive_and_expect_tx(uint32_t(sizeof(KeyTile)));
    load_tile(tile, map, barrier, item.kv_head, item.k_start, item.k_count, 0, a.keys_hint);
  };
  const auto load_rows = [&](const CUtensorMap* map, RowTile& tile, Barrier& barrier, const WorkItem& item, int token) {
    barrier.arrive_and_expect_tx(uint32_t(RowTile::kSlices * a.tile_tokens * a.group * kRowBytes));
    load_tile(tile, map, barrier, item.kv_head * a.group, item.q_start, item.q_count, token, a.rows_hint);
  };
  const auto wait_to_add_dq = [&](auto half) {  // until dq of two steps before may be added
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
      KeysStep& step = shared.step[state.index()];  // this thread's arrival on q_full makes it visible
      step.token = item.q_start + token;
      step.tokens = max(min(item.q_count - token, a.tile_tokens), 0);
      step.kv_head = item.kv_head;
      step.is_last = steps.left == 1;
      step.turn = kOrdered && token < item.q_count ? item.split : 0;
      load_rows(&q_map, shared.q[state.index()], shared.q_full[state.index()], item, token);
      if (is_first) {
        shared.v_empty.wait(uint32_t(number % 2 ^ 1));
        load_keys(&v_map, shared.v, shared.v_full, item);
        is_first = false;
      }
      load_rows(&dout_map, shared.dout[state.index()], shared.dout_full[state.index()], item, token);
      if (kOrdered) {
        wait_to_add_dq(first);
        shared.turn_full[0][state.index()].arrive();
        wait_to_add_dq(second);
        shared.turn_full[1][state.index()].arrive();
      }
      ++state;
    }
  }
  shared.k_full[number % 2].arrive();  // an item without keys and queries marks the end
  if (kOrdered) {
#pragma unroll 1
    for (int i = 0; i < 2; ++i, ++state) {
      wait_to_add_dq(first);
      wait_to_add_dq(second);
    }
    shared.last_turns.arrive();
  }
}

}  // namespace
}  // namespace illada::attention
