// How tiles come into the shared memory of the keys kernel (backward_keys_sm90.cuh): by TMA, one thread's work.
//
// An item has two steps at least (the second one may have no rows): its keys are still read in the first step of the
// next item, so that the keys after those can only come in the second one.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <type_traits>

#include "attention/backward_keys_shared_sm90.cuh"
#include "attention/query_sums_add_sm90.cuh"
#include "attention/query_sums_sm90.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "common/ring.cuh"

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
  ptx::fence_proxy_async();
}

// By thread 0 of the producers: keys, values, queries and gradients; and, in order, the turns of the warpgroups.
template <int kHeadDim, QuerySums kSums, bool kOrdered>
__device__ __forceinline__ void load_tiles(const KeysArguments& a, KeysShared<kHeadDim>& shared,
                                           const KeysAddresses<kHeadDim>& at, const CUtensorMap& q_map,
                                           const CUtensorMap& dout_map, const CUtensorMap& k_map,
                                           const CUtensorMap& v_map) {
  using Shared = KeysShared<kHeadDim>;
  using KeyTile = typename Shared::KeyTile;
  using RowTile = typename Shared::RowTile;
  constexpr int kStages = kRowStages<kSums, Shared>;
  Ring<kStages> ring;
  const auto load_keys = [&](const CUtensorMap* map, uint32_t tile, uint32_t barrier, const WorkItem& item) {
    ptx::mbarrier_arrive_expect_tx(barrier, uint32_t(sizeof(KeyTile)));
    load_tile<KeyTile>(tile, map, barrier, item.kv_head, item.k_start, item.k_count, 0, a.keys_policy);
  };
  const auto load_rows = [&](const CUtensorMap* map, uint32_t tile, uint32_t barrier, const WorkItem& item, int token) {
    ptx::mbarrier_arrive_expect_tx(barrier, uint32_t(RowTile::kSlices * a.tile_tokens * a.group * kRowBytes));
    load_tile<RowTile>(tile, map, barrier, item.kv_head * a.group, item.q_start, item.q_count, token, a.rows_policy);
  };
  const auto wait_for_turn = [&](auto half) {  // to add dq of two steps before
    const KeysStep& step = shared.step[(ring.stage + 1) % kStages];
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
    ptx::mbarrier_wait(at.k_empty(buffer), uint32_t(number / 2 % 2 ^ 1));
    shared.item[buffer] = next_keys<kOrdered>(a, round);
    const WorkItem& item = shared.item[buffer];  // read again for each step: registers are few
    if (item.k_count == 0) break;
    load_keys(&k_map, at.k(buffer), at.k_full(buffer), item);
    bool is_first = true;
    for (KeysSteps steps(a, item, !kOrdered && a.staggered); steps.left > 0; steps.advance()) {
      const int token = steps.tile * a.tile_tokens;
      ptx::mbarrier_wait(at.rows_empty(ring.stage), ring.parity ^ 1);
      KeysStep& step = shared.step[ring.stage];  // q_full, on which this thread arrives, makes it visible
      step.token = item.q_start + token;
      step.tokens = max(min(item.q_count - token, a.tile_tokens), 0);
      step.kv_head = item.kv_head;
      step.is_last = steps.left == 1;
      step.turn = kOrdered && token < item.q_count ? item.piece : 0;
      load_rows(&q_map, at.q(ring.stage), at.q_full(ring.stage), item, token);
      if (is_first) {
        ptx::mbarrier_wait(at.v_empty(), uint32_t(number % 2 ^ 1));
        load_keys(&v_map, at.v(), at.v_full(), item);
        is_first = false;
      }
      load_rows(&dout_map, at.dout(ring.stage), at.dout_full(ring.stage), item, token);
      if (kOrdered) {
        wait_for_turn(first);
        ptx::mbarrier_arrive(at.turn_full(0, ring.stage));
        wait_for_turn(second);
        ptx::mbarrier_arrive(at.turn_full(1, ring.stage));
      }
      ring.advance();
    }
  }
  ptx::mbarrier_arrive(at.k_full(number % 2));  // an item without keys and queries: the end
  if (kOrdered) {
#pragma unroll 1
    for (int i = 0; i < 2; ++i, ring.advance()) {
      wait_for_turn(first);
      wait_for_turn(second);
    }
    ptx::mbarrier_arrive(at.last_turns());
  }
}

}  // namespace
}  // namespace illada::attention
