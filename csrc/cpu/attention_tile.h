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

// Gradients of rows first_row .. first_row + rows - 1 of a sequence, numbered as above, against its keys first_key ..
// first_key + keys - 1: of the queries (dq), of the keys (dk, dv), or both. What is asked for must be given all keys,
// or all rows, of the sequence. There is at least one of both.
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
  float* scratch;  // gradient_scratch() floats, aligned to 64 bytes
  int64_t num_heads, num_kv_heads, total_q;
};

constexpr int kGradientRows = 64, kGradientKeys = 64;  // of a block

// From one row of a matrix to the next, in floats: an odd number of 64-byte lines, so that a column of them is not in a
// few sets of the cache.
constexpr int64_t gradient_pitch(int head_dim) { return int64_t((head_dim + 15) / 16 | 1) * 16; }

// See Scratch in attention_backward_impl.h; `keys` are those of a call that asks for dk and dv.
constexpr int64_t gradient_scratch(int head_dim, int64_t keys) {
  return gradient_pitch(head_dim) * (3 * kGradientRows + 2 * kGradientKeys + 2 * keys) +
         int64_t(kGradientRows) * (2 * head_dim + 2 * kGradientKeys + 4);
}

}  // namespace illada::cpu
