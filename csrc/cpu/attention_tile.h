// Arguments that csrc/cpu/attention.cpp passes to the loops compiled for this processor's instruction set.
#pragma once

#include <cstdint>

namespace illada::cpu {

constexpr int kMaxHeadDim = 256;  // largest D of the CPU kernels; Python reads it as MAX_HEAD_DIM_CPU
constexpr int kMaxTileRows = 64;

// Arguments of the forward of one tile. A sequence's rows are tokens x heads of a group. A tile is `rows` rows from
// first_row on (at most RowKernels::tile_rows), against all `keys` of the sequence. There may be no keys. Pointers are
// to the sequence's first query or key of that group.
struct AttentionTile {
  const void *q, *k, *v;
  int64_t q_token_stride, q_head_stride, k_token_stride, v_token_stride;  // in elements
  int64_t first_row;  // in tokens x heads; may need more than 32 bits
  int rows, group, keys, head_dim;
  float softmax_scale;
  void* out;   // [tokens, num_heads, head_dim]
  float* lse;  // [heads of the group, total_q]
  int64_t num_heads, total_q;
};

// Arguments of the backward of some rows and keys of a sequence: rows first_row .. first_row + rows - 1, numbered as
// above, and keys first_key .. first_key + keys - 1. It computes the gradients of the queries (dq), of the keys (dk,
// dv), or both. For dq, the keys must be all keys of the sequence. For dk and dv, the rows must be all its rows. There
// is at least one row and one key.
struct AttentionGradient {
  const void *dout, *q, *k, *v;
  int64_t dout_token_stride, dout_head_stride, q_token_stride, q_head_stride, k_token_stride, v_token_stride;
  const void* out;          // [tokens, num_heads, head_dim]
  const float *lse, *dlse;  // [heads of the group, total_q]; dlse may be null
  int64_t first_row, rows;
  int first_key, keys, all_keys, group, head_dim;
  float softmax_scale;
  void* dq;        // [tokens, num_heads, head_dim], or null
  void *dk, *dv;   // [keys of the sequence, num_kv_heads, head_dim], or null
  float* scratch;  // gradient_scratch() floats, 64-byte aligned
  int64_t num_heads, num_kv_heads, total_q;
};

constexpr int kGradientRows = 64, kGradientKeys = 64;  // rows and keys of a block

// Row stride of a scratch matrix, in floats. It is an odd number of 64-byte lines, so that a column does not fall into
// only a few sets of the cache.
constexpr int64_t gradient_pitch(int head_dim) { return int64_t((head_dim + 15) / 16 | 1) * 16; }

// Size of the scratch memory, in floats; see Scratch in attention_backward_impl.h. `keys`: number of keys of a call
// that computes dk and dv.
constexpr int64_t gradient_scratch(int head_dim, int64_t keys) {
  return gradient_pitch(head_dim) * (3 * kGradientRows + 2 * kGradientKeys + 2 * keys) +
         int64_t(kGradientRows) * (2 * head_dim + 2 * kGradientKeys + 4);
}

}  // namespace illada::cpu
