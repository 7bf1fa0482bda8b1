// Interface between launch.cpp, which validates the params and chooses a kernel, and the .cu files, which launch it.
#pragma once

#include <cstdint>
#include <limits>

#include "common/device.h"
#include "common/host_device.h"
#include "illada/remask.h"

namespace illada::remask {

// Vectors of 8 ids in a piece of a row of logits, and warps of a CTA of the sampling kernel.
constexpr int kPieceVectors = 1024, kSampleWarps = 8;
// Distribution of a row of logits over CTAs. The last piece may have fewer vectors, or up to seven more ids, which do
// not fill a vector.
struct RowSplit {
  int row_pieces = 1;  // pieces of the row
  int pieces = 1;      // pieces per CTA
  int splits = 1;      // CTAs per row
};
RowSplit split_rows(int64_t num_rows, int64_t vocab_size, int sm_count);

// CTAs of the sampling kernel that an SM holds at the same time.
constexpr int kSampleCtas = 2;
// Number of steps of a CTA's logits (16 KB each) that are in shared memory or being loaded to it. The variant
// sample_tokens sets it. 0 means that one step is being loaded to registers.
int shared_sample_steps();

// Numbers of a row's records in the workspace, which holds LeaderRecords [num_rows, leaders], then SoftmaxRecords
// [num_rows, parts].
struct RowRecords {
  int leaders = 0, parts = 0;
  int64_t bytes(int64_t num_rows) const { return num_rows * (32 * int64_t(leaders) + 16 * int64_t(parts)); }
};

// Records of a row. There are none where a single CTA computes the whole row.
ILLADA_HOST_DEVICE RowRecords records_of(const RowSplit& split) {
  return split.splits == 1 ? RowRecords{} : RowRecords{split.splits, split.row_pieces * kSampleWarps};
}

// True if an output or the measure needs the entropy or the margin.
inline bool wants_extras(const SampleTokensParams& p) {
  return p.entropy || p.margin || p.measure == Measure::kMargin || p.measure == Measure::kEntropy;
}

// Result of the filters for a row. Kept are logits above `value`, and of the logits equal to `value` the ids up to
// `last`. With confidence at temperature, the softmax is taken of (x - shift) * scale.
struct alignas(16) RowCut {
  float value = -std::numeric_limits<float>::infinity();
  int32_t last = std::numeric_limits<int32_t>::max();
  float shift = 0.0f, scale = 1.0f;
};

// True if all rows of logits are 16-byte aligned. `element`: bytes of a logit.
inline bool has_aligned_rows(const SampleTokensParams& p, size_t element) {
  return reinterpret_cast<uintptr_t>(p.logits) % 16 == 0 &&
         (p.num_rows == 1 || p.logits_row_stride * int64_t(element) % 16 == 0);
}

// Computes the filters of all rows and writes cuts [num_rows].
void launch_sample_filters(const SampleTokensParams& params, const Device& device, RowCut* cuts);
// Launches the sampling kernel. `cuts`: [num_rows], result of the filters; null if no row asks for a filter.
void launch_sample_tokens(const SampleTokensParams& params, const Device& device, const RowSplit& split,
                          const RowCut* cuts);
// Merges the records in params.workspace into the results.
void launch_sample_tokens_combine(const SampleTokensParams& params, const Device& device, const RowRecords& records);

// Task of one CTA of the fused head: a row tile and a range of the vocabulary.
//
// The fused head divides the vocabulary into `slots` ranges of `chunks` chunks of kChunkIds ids. Each row of the batch
// leaves one record per range. A work item is what a cluster of CTAs takes at a time:
//   - Cluster of 2: two neighbouring row tiles and one range, which they share.
//   - Cluster of 2, odd row tile at the end: this row tile and two neighbouring ranges, one for each CTA.
//   - Cluster of 1, for a single row tile: one range.
// Cluster c walks over the items c, c + clusters, c + 2 clusters, ...
//
// Items are in groups of row tiles, so that what the clusters read at the same time stays in the L2 cache. In a group,
// all rows meet the first range, then the second, and so on. The ranges of the odd row tile are next to the same ranges
// of its group. The head weight therefore comes from memory once for all of them.
struct HeadTask {
  int row_tile;
  int slot;     // range; HeadPlan::slots means that this CTA has no work and only keeps in step with its neighbour
  int tiles;    // number of tiles of kTileChunks chunks that both CTAs of the cluster walk over
  bool shares;  // true: the CTAs of a cluster share the tiles of the head weight
};

// Division of the fused head's work.
struct HeadPlan {
  static constexpr int kTileRows = 128, kChunkIds = 32, kTileChunks = 8;
  // Pairs of row tiles in a group. The last group has 4 to 19; if there is only one group, it may have fewer.
  static constexpr int kGroupPairs = 16;
  int row_tiles = 1;
  int all_chunks = 1;  // chunks of the vocabulary
  int slots = 1;       // ranges of the vocabulary
  int chunks = 1;      // chunks per range
  int cluster = 1;     // CTAs per cluster
  int clusters = 1;    // clusters launched
  int groups = 1;      // groups of row tiles

  // Tiles of a range.
  ILLADA_HOST_DEVICE int tiles(int slot) const {
    const int left = all_chunks - slot * chunks;
    return ((left < chunks ? left : chunks) + kTileChunks - 1) / kTileChunks;
  }
  // Number of items.
  ILLADA_HOST_DEVICE int items() const {
    return cluster == 1 ? slots : (row_tiles * slots + row_tiles % 2 * (slots % 2)) / 2;
  }
  // Task of CTA `rank` of the cluster that takes `item`.
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
// Layout of sample.workspace, offsets in bytes. First come the records of records_of(plan). Then come the gathered
// hidden rows, where params.rows is given. Last comes a lower bound of each row's best score, which the CTAs share.
struct HeadWorkspace {
  int64_t gathered, bounds, bytes;
};
HeadWorkspace head_workspace(const LinearSampleTokensParams& params, const HeadPlan& plan);
void launch_linear_sample_tokens_sm90(const LinearSampleTokensParams& params, const Device& device,
                                      const HeadPlan& plan);

void launch_remask(const RemaskParams& params, const Device& device);

}  // namespace illada::remask
