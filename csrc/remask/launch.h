// Between launch.cpp, which validates and chooses, and the .cu files, which launch.
#pragma once

#include <cstdint>
#include <limits>

#include "common/device.h"
#include "common/host_device.h"
#include "illada/remask.h"

namespace illada::remask {

// A row of logits consists of `row_pieces` pieces of kPieceVectors vectors of 8 ids (the last one with less, or with
// the up to seven ids more that make no vector); each of `splits` CTAs takes `pieces` of them.
constexpr int kPieceVectors = 1024, kSampleWarps = 8;
struct RowSplit {
  int row_pieces = 1;
  int pieces = 1;
  int splits = 1;
};
RowSplit split_rows(int64_t num_rows, int64_t vocab_size, int sm_count);

// CTAs of an SM at a time. What the choice sample_tokens says: how many steps of a CTA's logits (16 KB) wait in shared
// memory or are on their way there; 0: one, on its way to registers.
constexpr int kSampleCtas = 2;
int shared_sample_steps();

// What a row has in the workspace: LeaderRecords [num_rows, leaders], then SoftmaxRecords [num_rows, parts].
struct RowRecords {
  int leaders = 0, parts = 0;
  int64_t bytes(int64_t num_rows) const { return num_rows * (32 * int64_t(leaders) + 16 * int64_t(parts)); }
};

// None where the CTA that has a row finishes it.
ILLADA_HOST_DEVICE RowRecords records_of(const RowSplit& split) {
  return split.splits == 1 ? RowRecords{} : RowRecords{split.splits, split.row_pieces * kSampleWarps};
}

// Does somebody want the entropy or the margin?
inline bool wants_extras(const SampleTokensParams& p) {
  return p.entropy || p.margin || p.measure == Measure::kMargin || p.measure == Measure::kEntropy;
}

// What filters leave of a row: logits above `value`, and of those that equal it the ids up to `last`. With confidence
// at temperature, (x - shift) * scale is what its softmax is taken of.
struct alignas(16) RowCut {
  float value = -std::numeric_limits<float>::infinity();
  int32_t last = std::numeric_limits<int32_t>::max();
  float shift = 0.0f, scale = 1.0f;
};

inline bool has_aligned_rows(const SampleTokensParams& p, size_t element) {
  return reinterpret_cast<uintptr_t>(p.logits) % 16 == 0 &&
         (p.num_rows == 1 || p.logits_row_stride * int64_t(element) % 16 == 0);
}

// Fills cuts [num_rows].
void launch_sample_filters(const SampleTokensParams& params, const Device& device, RowCut* cuts);
// `cuts`: of each row, or null where none asks for a filter.
void launch_sample_tokens(const SampleTokensParams& params, const Device& device, const RowSplit& split,
                          const RowCut* cuts);
// Merges the records in params.workspace into the results.
void launch_sample_tokens_combine(const SampleTokensParams& params, const Device& device, const RowRecords& records);

// The fused head cuts the vocabulary into `slots` ranges of `chunks` chunks of kChunkIds ids; each row of the batch
// leaves a record of each range. An item is what a cluster of CTAs takes at a time. Cluster of 2: two neighbouring row
// tiles and one range, which they share, or the odd row tile at the end and two neighbouring ranges, one for each CTA.
// Cluster of 1, for a single row tile: one range. Cluster c walks over the items c, c + clusters, c + 2 clusters, ...
//
// Items are in groups of row tiles, so that what the clusters read at the same time stays in the L2 cache: a group's
// rows against the first range, against the second one, and so on. The ranges of the odd row tile stand next to the
// same ranges of its group: the weight comes from memory once for all of them.
struct HeadTask {
  int row_tile;
  int slot;     // HeadPlan::slots: this CTA has nothing to do but to keep in step with its neighbour
  int tiles;    // of kTileChunks chunks, that both CTAs of the cluster walk over
  bool shares;  // the CTAs of a cluster share the weight's tiles
};

struct HeadPlan {
  static constexpr int kTileRows = 128, kChunkIds = 32, kTileChunks = 8;
  static constexpr int kGroupPairs = 16;  // of row tiles in a group; the last group has 4 to 19, an only one less
  int row_tiles = 1;
  int all_chunks = 1;  // of the vocabulary
  int slots = 1;
  int chunks = 1;
  int cluster = 1;
  int clusters = 1;  // that are launched
  int groups = 1;

  ILLADA_HOST_DEVICE int tiles(int slot) const {
    const int left = all_chunks - slot * chunks;
    return ((left < chunks ? left : chunks) + kTileChunks - 1) / kTileChunks;
  }
  ILLADA_HOST_DEVICE int items() const {
    return cluster == 1 ? slots : (row_tiles * slots + row_tiles % 2 * (slots % 2)) / 2;
  }
  ILLADA_HOST_DEVICE HeadTask task(int item, int rank) const {
    if (cluster == 1) return {0, item, tiles(item), false};
    const int of_group = kGroupPairs * slots;
    const int group = item / of_group < groups ? item / of_group : groups - 1, first_pair = group * kGroupPairs;
    const bool is_last = group == groups - 1;
    const int pairs = is_last ? row_tiles / 2 - first_pair : kGroupPairs;
    item -= group * of_group;
    int slot = item / pairs, pair = item % pairs;
    if (is_last && row_tiles % 2) {  // two ranges of each pair, then the same ranges of the odd row tile
      const int two = item / (2 * pairs + 1) * 2, at = item % (2 * pairs + 1);
      if (at == (two + 1 < slots ? 2 * pairs : pairs)) return {row_tiles - 1, two + rank, tiles(two), false};
      slot = two + at / pairs;
      pair = at % pairs;
    }
    return {2 * (first_pair + pair) + rank, slot, tiles(slot), true};
  }
};
HeadPlan plan_head(int64_t num_rows, int64_t vocab_size, int sm_count);
ILLADA_HOST_DEVICE RowRecords records_of(const HeadPlan& plan) { return {plan.slots, plan.slots}; }
// What lies where in sample.workspace, in bytes: records_of(plan) first, then the gathered hidden rows where
// params.rows is given, then a score for each row that it reaches for sure, which the CTAs tell each other.
struct HeadWorkspace {
  int64_t gathered, bounds, bytes;
};
HeadWorkspace head_workspace(const LinearSampleTokensParams& params, const HeadPlan& plan);
void launch_linear_sample_tokens_sm90(const LinearSampleTokensParams& params, const Device& device,
                                      const HeadPlan& plan);

void launch_remask(const RemaskParams& params, const Device& device);

}  // namespace illada::remask
