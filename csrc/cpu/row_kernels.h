// The loops over one row of logits, and over a tile of attention's rows, one copy per instruction set (see vec.h),
// reached through a table of pointers.
#pragma once

#include <cstdint>

#include "cpu/attention_tile.h"

namespace illada::cpu {

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

// One row of sample_tokens: what to draw.
struct SampleRow {
  const void* logits;  // [vocab_size]
  int64_t vocab_size;
  float temperature;  // 0: greedy
  uint64_t seed;
  uint32_t row_id, step;
  const int32_t* bias_ids;  // [bias_count]; ids below 0 are unused slots
  const float* bias_values;
  int64_t bias_count;
  bool want_entropy, want_margin;
};

// ... and what was found, in nats; valid is false where the softmax has no value (entropy and margin are then NaN).
struct SampleRowResult {
  int64_t token;
  float logprob, entropy, margin;
  bool valid;
};

// log sum exp of a row, natural log: the sum of the two. Their sum has no digits left beside a large maximum.
struct RowLse {
  float maximum, log_sum;
};

struct RowKernels {
  const char* isa;
  SampleRowResult (*sample_f32)(const SampleRow&);
  SampleRowResult (*sample_bf16)(const SampleRow&);
  RowLse (*lse_f32)(const void* logits, int64_t vocab_size);
  RowLse (*lse_bf16)(const void* logits, int64_t vocab_size);
  float (*logit_f32)(const void* logits, int64_t index);
  float (*logit_bf16)(const void* logits, int64_t index);
  // grad = (onehot_factor + dlse) softmax(x) - onehot_factor onehot(target); grad may be x itself, target -1: none.
  void (*softmax_grad_f32)(const void* logits, void* grad, int64_t vocab_size, RowLse lse, float onehot_factor,
                           float dlse, int64_t target);
  void (*softmax_grad_bf16)(const void* logits, void* grad, int64_t vocab_size, RowLse lse, float onehot_factor,
                            float dlse, int64_t target);
  int tile_rows;  // of `attend`
  void (*attend_f32)(const AttentionTile&);
  void (*attend_bf16)(const AttentionTile&);
  void (*differentiate_f32)(const AttentionGradient&);
  void (*differentiate_bf16)(const AttentionGradient&);
};

// The best table for the processor this runs on, chosen once. ILLADA_CPU_ISA=baseline|avx2|avx512 lowers the choice.
const RowKernels& row_kernels();

// Has the processor instructions for products in bfloat16? Not known of others than x86: they may.
bool multiplies_bfloat16();

#if defined(ILLADA_X86)
extern const RowKernels kRowKernelsAvx512;
extern const RowKernels kRowKernelsAvx2;
#endif
extern const RowKernels kRowKernelsBaseline;

}  // namespace illada::cpu
