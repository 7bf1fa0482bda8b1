// Between launch.cpp, which validates and chooses, and the .cu files, which launch.
#pragma once

#include "common/device.h"
#include "illada/remask.h"

namespace illada::remask {

// A row is walked over in `splits` pieces of `vectors` times 8 neighbours each; the last one also takes the ids after
// the last complete vector.
struct RowSplit {
  int splits = 1;
  int vectors = 0;
};
RowSplit split_rows(int64_t num_rows, int64_t vocab_size, int sm_count);

// Does somebody want the entropy or the margin?
inline bool wants_extras(const SampleTokensParams& p) {
  return p.entropy || p.margin || p.measure == Measure::kMargin || p.measure == Measure::kEntropy;
}

void launch_sample_tokens(const SampleTokensParams& params, const Device& device, const RowSplit& split);
// Merges `pieces` RowPieces of each row, from params.workspace.
void launch_sample_tokens_combine(const SampleTokensParams& params, const Device& device, int pieces);

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
// sample.workspace: RowPieces [num_rows, slots], then the gathered hidden rows where params.rows is given.
int64_t head_pieces_bytes(const HeadPlan& plan, int64_t num_rows);
void launch_linear_sample_tokens_sm90(const LinearSampleTokensParams& params, const Device& device,
                                      const HeadPlan& plan);

void launch_remask(const RemaskParams& params, const Device& device);

}  // namespace illada::remask
