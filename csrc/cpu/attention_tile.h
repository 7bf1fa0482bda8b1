// What csrc/cpu/attention.cpp hands to the loops that were compiled for this processor.
#pragma once

#include <cstdint>

namespace illada::cpu {

constexpr int kMostHeadDim = 256, kMostTileRows = 64;

// `rows` (at most RowKernels::tile_rows) from first_row on of a sequence's rows, which are tokens x heads of a group,
// against all `keys` of the sequence, which may be none. Pointers are to its first query or key of that group.
struct AttentionTile {
  const void *q, *k, *v;
  int64_t q_token_stride, q_head_stride, k_token_stride, v_token_stride;  // elements
  int64_t first_row;                                                      // tokens x heads: may need more than 32 bits
  int rows, group, keys, head_dim;
  float softmax_scale;
  void* out;   // [tokens, num_heads, head_dim]
  float* lse;  // [heads of the group, total_q]
  int64_t num_heads, total_q;
};

}  // namespace illada::cpu
