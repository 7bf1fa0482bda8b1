// Between launch.cpp, which validates and chooses, and the .cu files, which launch.
#pragma once

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

void launch_sample_tokens(const SampleTokensParams& params, const Device& device, const RowSplit& split);
// Merges the records in params.workspace into the results.
void launch_sample_tokens_combine(const SampleTokensParams& params, const Device& device, const RowRecords& records);

// The tiles of the fused head: each of `row_tiles` row tiles meets the vocabulary in `slots` ranges of `chunks` chunks
// of kChunkIds ids; a CTA takes one range of one row tile.
struct HeadPlan {
  static constexpr int kTileRows = 128, kChunkIds = 32;
  int row_tiles = 1;
  int slots = 1;
  int chunks = 1;
  int cluster = 1;  // CTAs that share the weight's tiles: neighbours in rows
};
HeadPlan plan_head(int64_t num_rows, int64_t vocab_size, int sm_count);
// sample.workspace: these, then the gathered hidden rows where params.rows is given.
ILLADA_HOST_DEVICE RowRecords records_of(const HeadPlan& plan) { return {plan.slots, plan.slots}; }
void launch_linear_sample_tokens_sm90(const LinearSampleTokensParams& params, const Device& device,
                                      const HeadPlan& plan);

void launch_remask(const RemaskParams& params, const Device& device);

}  // namespace illada::remask
