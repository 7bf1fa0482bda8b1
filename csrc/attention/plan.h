// Layout of a plan: plan.cu writes the work lists of a pack, the attention kernels walk over them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/host_device.h"
#include "illada/attention.h"

namespace illada::attention {

// Work item: one tile of work.
//
// Forward: the queries q_start .. q_start + q_count - 1 (at most Tiling::item_tokens) of the H / G heads of one
// key-value head, against the keys k_start .. k_start + k_count - 1. There may be no keys. Where a sequence's keys are
// split, `splits` > 1 items have the same queries, and each has one key split. Key split `split` leaves its result in
// slot first_slot + split of the workspace.
//
// Backward: the keys from k_start on (at most kBackwardKeys) against all queries. Each key tile of the sequence is
// one key split: `splits` is their number, and `split` the index of this tile.
struct alignas(16) WorkItem {
  int32_t q_start, q_count, k_start, k_count;
  int32_t kv_head, split, splits, first_slot;
};

// First row of a plan. A plan is [rows, 4] int32 and holds, in this order:
//   - the header, 1 row
//   - WorkItems of the forward, 2 rows each, room for as many as the shape allows
//   - WorkItems of the backward, 2 rows each, room for as many as the shape allows
//   - from row rows - S on, the sequences (query start, query end, key start, key end), longest first
struct PlanHeader {
  int32_t forward_items, backward_items, sequences;  // numbers of them in the plan
  // Flags. kIdleKeys: no sequence uses some of the total_k keys. kIdleQueries: some sequences have no keys.
  int16_t idle;
  int16_t cluster;  // Tiling::cluster
};

constexpr int kIdleKeys = 1, kIdleQueries = 2;
constexpr int kBlockRows = 64;      // tokens x heads of a group in a block; a block has whole tokens, so H / G <= 64
constexpr int kMinBlocks = 2;       // fewest blocks of a CTA's tile
constexpr int kMaxBlocks = 3;       // most blocks of a CTA's tile
constexpr int kBackwardKeys = 128;  // most keys of a backward item
constexpr int kSplitItems = 512;    // most tiles of a pack that may have key splits
constexpr int kSplitSlots = 320;    // slots of the workspace, one for each key split of a tile

// These functions run before launch.cpp checks the sizes. They must not divide by 0, even for sizes that it refuses.
inline int group_of(const PackShape& s) { return std::max(s.num_heads / std::max(s.num_kv_heads, 1), 1); }
inline int block_tokens(const PackShape& s) { return std::max(kBlockRows / group_of(s), 1); }
// Reciprocal for division by the group: row / group == row * group_reciprocal >> 16, where the rows of a tile are
// tokens x heads of a group.
inline uint32_t group_reciprocal(int group) { return uint32_t(((1 << 16) + group - 1) / group); }

// How a kernel divides a pack into forward items.
struct Tiling {
  int tile_tokens = 0;     // query tokens per CTA, a number of blocks of 64 rows
  int cluster = 1;         // CTAs that share an item and load its keys once; each has tile_tokens of its queries
  int key_tile = 0;        // keys per step of the kernel; key splits fall between steps
  bool may_split = false;  // true: the plan may contain key splits
  int warps = 0;           // warps per CTA that multiply, where a kernel is built for several numbers; else 0
  // Query tokens of an item.
  int item_tokens() const { return tile_tokens * cluster; }
};

// Upper bound of the query tiles of a pack, for any lengths and any kernel.
inline int64_t max_tiles(const PackShape& s) {
  return s.num_kv_heads * (s.total_q / (int64_t(kMinBlocks) * block_tokens(s)) + s.num_sequences);
}
// True if a pack has enough tiles for all SMs and many tiles per sequence. Pairs of tiles may then share their keys.
inline bool has_pairs(const PackShape& s) {
  return max_tiles(s) >= kSplitItems / 2 && s.total_q >= int64_t(s.num_sequences) * 4 * kMinBlocks * block_tokens(s);
}
inline bool may_split(const PackShape& s) { return max_tiles(s) <= kSplitItems && !has_pairs(s); }
// Room for forward items. It includes room for queries behind the last sequence. It always includes room for key
// splits, so that code that knows the sizes only as symbols needs no case distinction.
inline int64_t max_forward_items(const PackShape& s) { return max_tiles(s) + s.num_kv_heads + kSplitSlots; }
inline int64_t max_backward_items(const PackShape& s) {
  return s.total_k < 0 ? 0 : s.num_kv_heads * (s.total_k / kBackwardKeys + s.num_sequences);
}

// Tiling of a pack for a kernel that has `blocks` blocks per CTA tile and `key_tile` keys per step. `clusters`: the
// kernel is built for clusters.
inline Tiling make_tiling(const PackShape& s, int blocks, int key_tile, bool clusters) {
  Tiling t;
  t.tile_tokens = blocks * block_tokens(s);
  t.key_tile = key_tile;
  t.may_split = may_split(s);
  // The second CTA of a sequence's last pair may have no work. Clusters are therefore used only where sequences have
  // several pairs on average.
  if (clusters && has_pairs(s) && s.total_q >= int64_t(s.num_sequences) * 4 * t.tile_tokens) t.cluster = 2;
  return t;
}

// Rows of a workspace slot, enough for any kernel.
inline int slot_rows(const PackShape& s) {
  return int(std::min(s.total_q, int64_t(kMaxBlocks) * block_tokens(s)) * group_of(s));
}

// The workspace of the forward: values fp32 [kSplitSlots, rows, D], then sums [kSplitSlots, rows]. A slot belongs to
// one key split: its values are sum_j p_j v_j and its sums sum_j p_j, with p_j = exp(scale (s_j - reference)). An lse
// instead of the sum would round away the difference between two splits' scores. Row r of a slot is token r / (H / G)
// of the item, head r % (H / G) of the group.
struct alignas(8) SlotSum {
  float reference, sum;
};
struct Slots {
  float* values;
  SlotSum* sums;
  int32_t rows;
};
inline Slots slots_of(const ForwardParams& p) {
  float* const values = static_cast<float*>(p.workspace);
  const int rows = slot_rows(p.shape);
  return {values, reinterpret_cast<SlotSum*>(values + int64_t(kSplitSlots) * rows * p.shape.head_dim), rows};
}

ILLADA_HOST_DEVICE const PlanHeader& plan_header(const int32_t* plan) {
  return *reinterpret_cast<const PlanHeader*>(plan);
}
ILLADA_HOST_DEVICE const WorkItem* forward_items(const int32_t* plan) {
  return reinterpret_cast<const WorkItem*>(plan + 4);
}

// Index of the item that the place-th of `places` CTAs (or clusters) takes in a round. The direction alternates between
// rounds, because the lists are sorted by length.
ILLADA_HOST_DEVICE int serpentine_index(int round, int place, int places) {
  return round * places + (round % 2 ? places - 1 - place : place);
}
ILLADA_HOST_DEVICE const WorkItem* backward_items(const int32_t* plan, int64_t first_row) {
  return reinterpret_cast<const WorkItem*>(plan + 4 * first_row);
}
// Row of the plan at which the backward items begin.
inline int64_t first_backward_row(const PackShape& s) { return 1 + 2 * max_forward_items(s); }

}  // namespace illada::attention
