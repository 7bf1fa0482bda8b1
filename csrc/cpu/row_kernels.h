// Loops over one row of logits and over a tile of attention's rows. There is one copy per instruction set (see vec.h),
// called through a table of function pointers.
#pragma once

#include <cstdint>

#include "common/constants.h"
#include "cpu/attention_tile.h"

namespace illada::cpu {

// Arguments of sample_tokens for one row.
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

// Result of sample_tokens for one row; logprob and entropy are in nats. `valid` is false if the row has no softmax.
// Then entropy and margin are NaN.
struct SampleRowResult {
  int64_t token;
  float logprob, entropy, margin;
  bool valid;
};

// log sum exp of a row, natural log, as a sum of two terms. A single float would have no digits left for log_sum beside
// a large maximum.
struct RowLse {
  float maximum, log_sum;
};

// Table of the kernels of one instruction set.
struct RowKernels {
  const char* isa;
  SampleRowResult (*sample_f32)(const SampleRow&);
  SampleRowResult (*sample_bf16)(const SampleRow&);
  RowLse (*lse_f32)(const void* logits, int64_t vocab_size);
  RowLse (*lse_bf16)(const void* logits, int64_t vocab_size);
  float (*logit_f32)(const void* logits, int64_t index);
  float (*logit_bf16)(const void* logits, int64_t index);
  // grad = (onehot_factor + dlse) softmax(x) - onehot_factor onehot(target). grad may be x itself; target -1 means no
  // target.
  void (*softmax_grad_f32)(const void* logits, void* grad, int64_t vocab_size, RowLse lse, float onehot_factor,
                           float dlse, int64_t target);
  void (*softmax_grad_bf16)(const void* logits, void* grad, int64_t vocab_size, RowLse lse, float onehot_factor,
                            float dlse, int64_t target);
  int tile_rows;  // most rows of a tile of `attend`
  void (*attend_f32)(const AttentionTile&);
  void (*attend_bf16)(const AttentionTile&);
  void (*differentiate_f32)(const AttentionGradient&);
  void (*differentiate_bf16)(const AttentionGradient&);
};

// Returns the best table for this processor, chosen once. ILLADA_CPU_ISA=baseline|avx2|avx512 can lower the choice.
const RowKernels& row_kernels();

// Returns true if the processor has instructions for bfloat16 products. On processors other than x86 that is not known:
// they may have them.
bool multiplies_bfloat16();

#if defined(ILLADA_X86)
extern const RowKernels kRowKernelsAvx512;
extern const RowKernels kRowKernelsAvx2;
#endif
extern const RowKernels kRowKernelsBaseline;

}  // namespace illada::cpu
