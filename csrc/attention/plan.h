// Between plan.cu, which writes the work lists of a pack, and the kernels, which walk over them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/host_device.h"
#include "illada/attention.h"

namespace illada::attention {

// One tile of work. Forward: queries q_start .. q_start + q_count - 1 (at most Tiling::item_tokens) of the H / G heads
// of one key-value head, against the keys k_start .. k_start + k_count - 1 (which may be none). Where a sequence's keys
// are split, `pieces` > 1 items have the same queries and each a part of the keys; piece `piece` leaves its result in
// slot first_slot + piece of the workspace. Backward: keys k_start .. (at most kBackwardKeys) against all queries, the
// piece-th of the `pieces` tiles of its sequence's keys.
struct alignas(16) WorkItem {
  int32_t q_start, q_count, k_start, k_count;
  int32_t kv_head, piece, pieces, first_slot;
};

// plan [rows, 4] int32: the header, WorkItems of the forward, of the backward (two rows each, room for as many as the
// shape allows), and from rows - S on the sequences, (query start, query end, key start, key end), longest first.
struct PlanHeader {
  int32_t forward_items, backward_items, sequences;
  int16_t idle;     // kIdleKeys: keys, of total_k, that no sequence uses; kIdleQueries: sequences without keys
  int16_t cluster;  // Tiling::cluster
};

constexpr int kIdleKeys = 1, kIdleQueries = 2;
constexpr int kBlockRows = 64;   // tokens x heads of a group that stay together: whole tokens, so H / G <= 64
constexpr int kLeastBlocks = 2;  // of a CTA's tile
constexpr int kMostBlocks = 3;
constexpr int kBackwardKeys = 128;  // of an item of the backward
constexpr int kSplitItems = 512;    // packs of at most so many tiles may be split over keys
constexpr int kSplitSlots = 320;    // pieces of split tiles

// Sizes that launch.cpp refuses must not divide by 0 here, where nothing has looked at them yet.
inline int group_of(const PackShape& s) { return std::max(s.num_heads / std::max(s.num_kv_heads, 1), 1); }
inline int block_tokens(const PackShape& s) { return std::max(kBlockRows / group_of(s), 1); }
// Rows of a tile are tokens x heads of a group: row / group == row * group_reciprocal >> 16.
inline uint32_t group_reciprocal(int group) { return uint32_t(((1 << 16) + group - 1) / group); }

// How a kernel cuts a pack into forward items.
struct Tiling {
  int tile_tokens = 0;  // query tokens of a CTA: some blocks of 64 rows
  int cluster = 1;      // CTAs that share an item, each with tile_tokens of its queries, and load its keys once
  int key_tile = 0;     // keys of a step of the kernel: splits fall between steps
  bool may_split = false;
  int warps = 0;  // of a CTA that multiply, where a kernel is built for several numbers
  int item_tokens() const { return tile_tokens * cluster; }
};

// The most tiles of queries that a pack can have, whatever its lengths and the kernel are.
inline int64_t max_tiles(const PackShape& s) {
  return s.num_kv_heads * (s.total_q / (int64_t(kLeastBlocks) * block_tokens(s)) + s.num_sequences);
}
// Enough tiles for every multiprocessor, and many to a sequence: pairs of them may share their keys.
inline bool has_pairs(const PackShape& s) {
  return max_tiles(s) >= kSplitItems / 2 && s.total_q >= int64_t(s.num_sequences) * 4 * kLeastBlocks * block_tokens(s);
}
inline bool may_split(const PackShape& s) { return max_tiles(s) <= kSplitItems && !has_pairs(s); }
// With room for pieces in any pack: whoever knows the sizes as symbols alone needs no case distinction. And for queries
// behind the last sequence.
inline int64_t max_forward_items(const PackShape& s) { return max_tiles(s) + s.num_kv_heads + kSplitSlots; }
inline int64_t max_backward_items(const PackShape& s) {
  return s.total_k < 0 ? 0 : s.num_kv_heads * (s.total_k / kBackwardKeys + s.num_sequences);
}

// `blocks` of a CTA's tile, `key_tile` and `clusters` (are they built?) are the kernel's.
inline Tiling tiling(const PackShape& s, int blocks, int key_tile, bool clusters) {
  Tiling t;
  t.tile_tokens = blocks * block_tokens(s);
  t.key_tile = key_tile;
  t.may_split = may_split(s);
  // The second CTA of a sequence's last pair may have nothing to do: only where sequences have several pairs, on
  // average.
  if (clusters && has_pairs(s) && s.total_q >= int64_t(s.num_sequences) * 4 * t.tile_tokens) t.cluster = 2;
  return t;
}

// Rows of a slot of the workspace, for any kernel.
inline int slot_rows(const PackShape& s) {
  return int(std::min(s.total_q, int64_t(kMostBlocks) * block_tokens(s)) * group_of(s));
}

// The workspace: values fp32 [kSplitSlots, rows, D], then sums [kSplitSlots, rows]: of one piece, sum_j p_j v_j and
// sum_j p_j with p_j = exp(scale (s_j - reference)). An lse instead of the sum would round what two pieces' scores
// differ by. Row r of a slot is token r / (H / G) of the item, head r % (H / G) of the group.
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

// The item that the place-th of `places` CTAs (or clusters) takes in a round: back and forth, because the lists are
// sorted by length.
ILLADA_HOST_DEVICE int back_and_forth(int round, int place, int places) {
  return round * places + (round % 2 ? places - 1 - place : place);
}
ILLADA_HOST_DEVICE const WorkItem* backward_items(const int32_t* plan, int64_t first_row) {
  return reinterpret_cast<const WorkItem*>(plan + 4 * first_row);
}
inline int64_t first_backward_row(const PackShape& s) { return 1 + 2 * max_forward_items(s); }

}  // namespace illada::attention
