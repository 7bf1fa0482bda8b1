// Shared parts of the keys kernel (backward_keys_sm90.cuh): its arguments, the order of its items, its shared memory
// and the barriers there.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention/launch.h"
#include "attention/tiles_sm90.cuh"
#include "attention/traits.h"
#include "common/barrier_sm90.cuh"
#include "common/registers_sm90.cuh"

namespace illada::attention {
namespace {

struct KeysArguments {
  const int32_t* plan;
  int64_t first_item;  // row of the plan with the first backward item
  const RowStatistics* rows;
  uint32_t* arrivals;
  float *dq_sums, *dk_sums, *dv_sums;
  void *dq, *dk, *dv;
  int32_t query_splits;  // query splits per item of the plan; if more than one, dk and dv are summed as dq is
  bool staggered;        // see KeysSteps
  int report_every;      // steps between two reports
  int32_t total_q, num_heads, num_kv_heads, group, tile_tokens;
  int32_t skipped;    // elements between the group's heads of a token and those of the next token, (H - H / G) D
  int32_t waste_row;  // first of the rows of dq_sums that are never read
  uint32_t group_reciprocal;
  float scale, scale_log2;                   // softmax_scale, and softmax_scale times log2(e)
  uint64_t rows_hint, keys_hint, sums_hint;  // hints to the L2 cache
};

constexpr int kIncomplete = -2;  // first_slot of an item whose sums never become complete

// Returns the next item of a CTA from `round` on, and sets `round` to its round. In small packs, the queries of
// items are split; the result is then one query split of an item of the plan. k_count 0 means that no item with queries
// is left.
//
// In ordered mode, the tiles of a sequence come one after another, each with all its heads. Few CTAs then wait for each
// other. The direction is the same in every round. If it alternated, the CTA that waited longest in one round would be
// the CTA that all wait for in the next.
template <bool kOrdered>
__device__ __forceinline__ WorkItem next_keys(const KeysArguments& a, int& round) {
  const int items = plan_header(a.plan).backward_items * a.query_splits, grid = int(gridDim.x);
  for (;; ++round) {
    const int index = kOrdered ? round * grid + int(blockIdx.x) : serpentine_index(round, int(blockIdx.x), grid);
    if (index >= items) return {};
    const int splits = kOrdered ? 2 : a.query_splits;  // in order there are one or two, and few registers for divisions
    int number = kOrdered ? index >> (a.query_splits - 1) : index / splits;
    const int split = index - number * a.query_splits;
    const WorkItem* const list = backward_items(a.plan, a.first_item);
    bool is_whole = true;
    if (kOrdered) {
      const int tiles = list[number].splits, first = number - list[number].kv_head * tiles - list[number].split;
      // Overlapping lengths may have more tiles than the plan has room for. Where tiles are missing, the order is that
      // of the list, and no thread waits for sums that may never be complete.
      is_whole = first + tiles * a.num_kv_heads <= plan_header(a.plan).backward_items;
      const uint32_t place = uint32_t(number - first), tile = place / uint32_t(a.num_kv_heads);
      if (is_whole) number = first + int(place - tile * a.num_kv_heads) * tiles + int(tile);
    }
    WorkItem item = list[number];
    if (item.q_count == 0) return {};
    if (!is_whole) item.first_slot = kIncomplete;
    if (a.query_splits == 1) return item;
    const int tiles = (item.q_count + a.tile_tokens - 1) / a.tile_tokens;
    const int first = tiles * split / splits * a.tile_tokens, end = tiles * (split + 1) / splits * a.tile_tokens;
    item.q_start += first;
    item.q_count = min(end, item.q_count) - first;
    if (item.q_count > 0) return item;
  }
}

// One step of an item: some rows of its queries. The thread that loads the rows writes it.
struct alignas(16) KeysStep {
  int32_t token, tokens;  // first token and number of tokens; a step may have none
  int32_t kv_head;
  uint16_t is_last;  // 1 in the last step of the item
  uint16_t turn;     // ordered mode: number of key tiles that add to these rows before
};

// Steps of an item, in the order in which a CTA takes them: tiles of `tile_tokens` queries from `tile` on, cyclically.
// An item has at least two steps; the second one may have no rows.
struct KeysSteps {
  int left;   // steps that are left
  int tile;   // tile of the next step
  int tiles;  // number of steps

  // With `staggered`, each key tile begins at a different tile of queries. The CTAs of a head then do not all add to
  // the same rows of dq at the same time.
  __device__ __forceinline__ KeysSteps(const KeysArguments& a, const WorkItem& item, bool staggered)
      : left(max((item.q_count + a.tile_tokens - 1) / a.tile_tokens, 2)), tile(0), tiles(left) {
    if (staggered) tile = min(int(float(tiles) * float(item.split) / float(item.splits)), tiles - 1);
  }
  __device__ __forceinline__ void advance() {
    --left;
    if (++tile == tiles) tile = 0;
  }
};

// Rows of one step whose sums are complete: the heads of a group, from row `first` of dq on. 0 rows mark the end.
struct SumsJob {
  int32_t first, rows;
};

template <int kHeadDim>
struct KeysShared {
  using Tr = Traits<Arch::kSm90, kHeadDim>;
  static constexpr int kRows = Tr::kBackwardRows;  // rows per step
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
  Barrier k_full[2], k_empty[2];    // the item and its keys have arrived, one item ahead; have been read
  Barrier v_full, v_empty;          // the same for the item's values
  Barrier q_full[kStages];          // queries and statistics of the rows have arrived (TMA, and 32 lanes with cp.async)
  Barrier dout_full[kStages];       // gradients of the rows have arrived
  Barrier rows_empty[kStages];      // both warpgroups have read all of the stage
  Barrier ds_full[2], ds_empty[2];  // both warpgroups have written ds; have multiplied it
  Barrier job_full[kJobs], job_empty[kJobs];  // a job, complete sums, is in the slot; has been read
  Barrier all_added;                          // the consumers have added all their dq
  Barrier last_jobs_full;                     // last_jobs, the sums that are complete then, are written
  Barrier last_turns;                         // ordered mode: it is this CTA's turn to add the last two dq
  // Ordered mode, for each warpgroup: dq of two steps before may be added; dq of the step before has been added.
  Barrier turn_full[2][kStages], added[2][kStages];
  WorkItem item[2], counted_item;  // items of the tiles; item of the statistics and reports
  SumsJob job[kJobs];
  KeysStep step[kStages];
  // Valid only after the last step.
  __device__ __forceinline__ SumsJob* last_jobs() { return reinterpret_cast<SumsJob*>(offset); }
};

// Initialises the barriers. One thread calls it.
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
