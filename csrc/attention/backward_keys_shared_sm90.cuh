// What the warps of the keys kernel (backward_keys_sm90.cuh) have in common: its arguments, the order of its items, its
// shared memory and the barriers there.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention/launch.h"
#include "attention/tiles_sm90.cuh"
#include "common/barrier_sm90.cuh"
#include "common/registers_sm90.cuh"

namespace illada::attention {
namespace {

struct KeysArguments {
  const int32_t* plan;
  int64_t first_item;  // row of the plan
  const RowStatistics* rows;
  uint32_t* arrivals;
  float *dq_sums, *dk_sums, *dv_sums;
  void *dq, *dk, *dv;
  int32_t pieces;    // of an item of the plan; more than one: dk and dv are summed up as dq is
  bool staggered;    // see KeysSteps
  int report_every;  // steps
  int32_t total_q, num_heads, num_kv_heads, group, tile_tokens;
  int32_t skipped;    // elements between the group's heads of one token and the next, (H - H / G) D
  int32_t waste_row;  // of dq_sums: rows that nobody looks at
  uint32_t group_reciprocal;
  float scale, scale_log2;                   // softmax_scale, and times log2(e)
  uint64_t rows_hint, keys_hint, sums_hint;  // to the L2 cache
};

constexpr int kIncomplete = -2;  // first_slot of an item whose sums are never complete

// The next item of a CTA, from `round` on, which becomes its round: a piece of one of the plan, if packs are so small
// that items are cut into ranges of queries. k_count 0: there is none that has queries.
//
// In order, the tiles of a sequence come after each other, each with all its heads: the CTAs that wait for each other
// are then few. And always forth: back and forth, the one that has waited longest in a round would be the one that all
// wait for in the next.
template <bool kOrdered>
__device__ __forceinline__ WorkItem next_keys(const KeysArguments& a, int& round) {
  const int items = plan_header(a.plan).backward_items * a.pieces, grid = int(gridDim.x);
  for (;; ++round) {
    const int index = kOrdered ? round * grid + int(blockIdx.x) : back_and_forth(round, int(blockIdx.x), grid);
    if (index >= items) return {};
    const int pieces = kOrdered ? 2 : a.pieces;  // in order there are one or two, and few registers for divisions
    int number = kOrdered ? index >> (a.pieces - 1) : index / pieces;
    const int piece = index - number * a.pieces;
    const WorkItem* const list = backward_items(a.plan, a.first_item);
    bool is_whole = true;
    if (kOrdered) {
      const int tiles = list[number].pieces, first = number - list[number].kv_head * tiles - list[number].piece;
      // Lengths that overlap may have more tiles than the plan has room for: where some are missing, list order it is,
      // and no sums are waited for that may never be complete.
      is_whole = first + tiles * a.num_kv_heads <= plan_header(a.plan).backward_items;
      const uint32_t place = uint32_t(number - first), tile = place / uint32_t(a.num_kv_heads);
      if (is_whole) number = first + int(place - tile * a.num_kv_heads) * tiles + int(tile);
    }
    WorkItem item = list[number];
    if (item.q_count == 0) return {};
    if (!is_whole) item.first_slot = kIncomplete;
    if (a.pieces == 1) return item;
    const int tiles = (item.q_count + a.tile_tokens - 1) / a.tile_tokens;
    const int first = tiles * piece / pieces * a.tile_tokens, end = tiles * (piece + 1) / pieces * a.tile_tokens;
    item.q_start += first;
    item.q_count = min(end, item.q_count) - first;
    if (item.q_count > 0) return item;
  }
}

// One step of an item: some rows of its queries. Written by the thread that loads them.
struct alignas(16) KeysStep {
  int32_t token, tokens;  // the first one, and how many there are; a step may have none
  int32_t kv_head;
  uint16_t is_last;  // of its item
  uint16_t turn;     // in order: how many tiles of keys add to these rows before
};

// The steps of an item, in the order in which a CTA takes them: tiles of `tile_tokens` queries from `tile` on, round
// and round. An item has at least two steps; the second one may have no rows.
struct KeysSteps {
  int left;   // of the steps
  int tile;   // the next one's
  int tiles;  // the number of steps

  // Where tiles of keys are staggered, each begins elsewhere, so that the CTAs of a head do not all add to the same
  // rows of dq at the same time.
  __device__ __forceinline__ KeysSteps(const KeysArguments& a, const WorkItem& item, bool staggered)
      : left(max((item.q_count + a.tile_tokens - 1) / a.tile_tokens, 2)), tile(0), tiles(left) {
    if (staggered) tile = min(int(float(tiles) * float(item.piece) / float(item.pieces)), tiles - 1);
  }
  __device__ __forceinline__ void advance() {
    --left;
    if (++tile == tiles) tile = 0;
  }
};

// Rows of one step whose sums are complete: of the heads of a group, from row `first` of dq on. No rows: the end.
struct SumsJob {
  int32_t first, rows;
};

template <int kHeadDim>
struct KeysShared {
  static constexpr int kRows = kHeadDim == 128 ? 64 : 128;  // of a step
  static constexpr int kStages = 3, kJobs = 4;
  using Registers = RegisterSplit<2, 40, 232>;
  static constexpr int kThreads = Registers::kThreads;
  using KeyTile = Tile<kBackwardKeys, kHeadDim>;
  using RowTile = Tile<kRows, kHeadDim>;
  using ScoreTile = Tile<kBackwardKeys, kRows>;
  KeyTile k[2], v;
  RowTile q[kStages], dout[kStages];
  ScoreTile ds[2];
  alignas(16) float offset[kStages][kRows], c[kStages][kRows];  // RowStatistics of the rows
  Barrier k_full[2], k_empty[2];              // keys of the item and the item itself are there; one ahead
  Barrier v_full, v_empty;                    // values
  Barrier q_full[kStages];                    // queries and statistics of the rows (TMA, and 32 lanes with cp.async)
  Barrier dout_full[kStages];                 // gradients of the rows
  Barrier rows_empty[kStages];                // both warpgroups have read all of the stage
  Barrier ds_full[2], ds_empty[2];            // both warpgroups have written ds; have multiplied it
  Barrier job_full[kJobs], job_empty[kJobs];  // sums that are complete
  Barrier all_added;                          // the consumers have added all their dq
  Barrier last_jobs_full;                     // sums that turned out to be complete then
  Barrier last_turns;                         // in order: it is this CTA's turn to add the last two dq
  // In order, for each warpgroup: dq of two steps before may be added; dq of the step before is.
  Barrier turn_full[2][kStages], added[2][kStages];
  WorkItem item[2], counted_item;  // of the tiles; of the statistics and reports
  SumsJob job[kJobs];
  KeysStep step[kStages];
  __device__ __forceinline__ SumsJob* last_jobs() { return reinterpret_cast<SumsJob*>(offset); }  // when all is over
};

// By one thread.
template <bool kOrdered, int kHeadDim>
__device__ __forceinline__ void init_barriers(KeysShared<kHeadDim>& shared) {
  using Shared = KeysShared<kHeadDim>;
  for (int i = 0; i < 2; ++i) {
    shared.k_full[i].init(1);
    shared.k_empty[i].init(8);
    shared.ds_full[i].init(8);
    shared.ds_empty[i].init(2);
  }
  shared.all_added.init(8);
  shared.last_jobs_full.init(32);
  if (kOrdered) shared.last_turns.init(1);
  shared.v_full.init(1);
  shared.v_empty.init(2);
  for (int s = 0; s < Shared::kStages; ++s) {
    shared.q_full[s].init(1 + 32);
    shared.dout_full[s].init(1);
    shared.rows_empty[s].init(8);
    for (int i = 0; kOrdered && i < 2; ++i) {
      shared.turn_full[i][s].init(1);
      shared.added[i][s].init(4);
    }
  }
  for (int i = 0; i < Shared::kJobs; ++i) {
    shared.job_full[i].init(1);
    shared.job_empty[i].init(1);
  }
  cutlass::arch::fence_barrier_init();
}

}  // namespace
}  // namespace illada::attention
