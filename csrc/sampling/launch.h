// Interface between launch.cpp, which validates the params and chooses a kernel, and the .cu files, which launch it.
#pragma once

#include <cstdint>
#include <limits>

#include "common/device.h"
#include "common/host_device.h"
#include "common/memory.h"
#include "illada/sampling.h"

namespace illada::sampling {

// Vectors of 8 ids in a vocab tile, and warps per CTA, of the sampling kernel.
constexpr int kVocabTileVectors = 1024, kSampleWarps = 8;
// Distribution of a row of logits over CTAs. The last vocab tile may have fewer vectors, or up to seven more ids, which
// do not fill a vector.
struct RowSplit {
  int vocab_tiles = 1;  // vocab tiles of the row
  int split_tiles = 1;  // vocab tiles per CTA
  int splits = 1;       // CTAs per row
};
RowSplit split_rows(int64_t num_rows, int64_t vocab_size, int sm_count);

// CTAs of the sampling kernel that an SM holds at the same time.
constexpr int kSampleCtasPerSm = 2;
// Stages of a CTA's ring in shared memory. A stage holds the logits of a loop step (16 KB). The variant sample_tokens
// sets it. 0 means no ring: one loop step is being loaded to registers.
int shared_sample_stages();

// Numbers of a row's records in the workspace, which holds LeaderRecords [num_rows, leaders], then SoftmaxRecords
// [num_rows, softmaxes].
struct RowRecords {
  int leaders = 0, softmaxes = 0;
  int64_t bytes(int64_t num_rows) const { return num_rows * (32 * int64_t(leaders) + 16 * int64_t(softmaxes)); }
};

// Records of a row. There are none where a single CTA computes the whole row.
ILLADA_HOST_DEVICE RowRecords row_records(const RowSplit& split) {
  return split.splits == 1 ? RowRecords{} : RowRecords{split.splits, split.vocab_tiles * kSampleWarps};
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
  return is_aligned(p.logits) && (p.num_rows == 1 || p.logits_row_stride * int64_t(element) % 16 == 0);
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
// The fused head divides the vocabulary into `vocab_ranges` ranges of `range_slices` slices of kSliceIds ids. Each row
// of the batch leaves one record per range. A work item is what a cluster of CTAs processes at a time:
//   - Cluster of 2: two neighbouring row tiles and one range, which they share.
//   - Cluster of 2, odd row tile at the end: this row tile and two neighbouring ranges, one for each CTA.
//   - Cluster of 1, for a single row tile: one range.
// Cluster c processes the work items c, c + clusters, c + 2 clusters, ...
//
// Work items are in groups of row tiles, so that what the clusters read at the same time stays in the L2 cache. In a
// group, all rows meet the first range, then the second, and so on. The ranges of the odd row tile are next to the same
// ranges of its group. The head weight therefore comes from memory once for all of them.
struct HeadTask {
  int row_tile;
  int vocab_range;  // HeadPlan::vocab_ranges means none: this CTA only takes as many stages as its neighbour
  int tiles;        // number of vocab tiles (kTileSlices slices) that both CTAs of the cluster walk over
  bool shares_ids;  // true: the CTAs of a cluster share the tiles of the head weight
};

// Division of the fused head's work. A vocab tile has kTileSlices slices of kSliceIds ids.
struct HeadPlan {
  static constexpr int kTileRows = 128, kSliceIds = 32, kTileSlices = 8;
  // Pairs of row tiles in a group. The last group has 4 to 19; if there is only one group, it may have fewer.
  static constexpr int kGroupPairs = 16;
  int row_tiles = 1;
  int vocab_slices = 1;  // slices of the vocabulary
  int vocab_ranges = 1;  // ranges of the vocabulary
  int range_slices = 1;  // slices per range
  int cluster = 1;       // CTAs per cluster
  int clusters = 1;      // clusters launched
  int groups = 1;        // groups of row tiles

  // Number of vocab tiles of a range.
  ILLADA_HOST_DEVICE int range_tiles(int vocab_range) const {
    const int left = vocab_slices - vocab_range * range_slices;
    return ((left < range_slices ? left : range_slices) + kTileSlices - 1) / kTileSlices;
  }
  // Number of work items.
  ILLADA_HOST_DEVICE int work_items() const {
    return cluster == 1 ? vocab_ranges : (row_tiles * vocab_ranges + row_tiles % 2 * (vocab_ranges % 2)) / 2;
  }
  // Task of CTA `rank` of the cluster that processes `work_item`.
  ILLADA_HOST_DEVICE HeadTask task(int work_item, int rank) const {
    if (cluster == 1) return {0, work_item, range_tiles(work_item), false};
    const int group_items = kGroupPairs * vocab_ranges;
    const int group = work_item / group_items < groups ? work_item / group_items : groups - 1;
    const int first_pair = group * kGroupPairs;
    const bool is_last = group == groups - 1;
    const int pairs = is_last ? row_tiles / 2 - first_pair : kGroupPairs;
    work_item -= group * group_items;
    int vocab_range = work_item / pairs, pair = work_item % pairs;
    if (is_last && row_tiles % 2) {  // two ranges of each pair, then the same ranges of the odd row tile
      const int two = work_item / (2 * pairs + 1) * 2, at = work_item % (2 * pairs + 1);
      if (at == (two + 1 < vocab_ranges ? 2 * pairs : pairs))
        return {row_tiles - 1, two + rank, range_tiles(two), false};
      vocab_range = two + at / pairs;
      pair = at % pairs;
    }
    return {2 * (first_pair + pair) + rank, vocab_range, range_tiles(vocab_range), true};
  }
};
HeadPlan plan_head(int64_t num_rows, int64_t vocab_size, int sm_count);
ILLADA_HOST_DEVICE RowRecords row_records(const HeadPlan& plan) { return {plan.vocab_ranges, plan.vocab_ranges}; }
// Layout of sample.workspace, offsets in bytes. First come the records of row_records(plan). Then come the gathered
// hidden rows, where params.rows is given. Last comes a lower bound of each row's best score, which the CTAs share.
struct HeadWorkspace {
  int64_t gathered, bounds, bytes;
};
HeadWorkspace head_workspace(const LinearSampleTokensParams& params, const HeadPlan& plan);
void launch_linear_sample_tokens_sm90(const LinearSampleTokensParams& params, const Device& device,
                                      const HeadPlan& plan);

}  // namespace illada::sampling
