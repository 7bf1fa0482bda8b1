// Between launch.cpp, which validates and chooses, and the .cu files, which launch.
#pragma once

#include "common/device.h"
#include "illada/remask.h"

namespace illada::remask {

// A row is walked over in `splits` pieces of `vectors` times 8 neighbours each.
struct RowSplit {
  int splits = 1;
  int64_t vectors = 0;
};
RowSplit split_rows(int64_t num_rows, int64_t vocab_size, int sm_count);

void launch_sample_tokens(const SampleTokensParams& params, const Device& device, const RowSplit& split);
// Merges `pieces` RowPieces of each row, from params.workspace.
void launch_sample_tokens_combine(const SampleTokensParams& params, const Device& device, int pieces);
void launch_remask(const RemaskParams& params, const Device& device);

}  // namespace illada::remask
