// Sampling: a token and its confidence from each row of logits.
#pragma once

#include <cstdint>

#include "illada/cuda.h"
#include "illada/dtype.h"

namespace illada::sampling {

// Definition of a row's confidence. The bindings rely on the numeric values.
enum class Measure : int32_t {
  kProbability = 0,  // p of the sampled token
  kMargin = 1,       // p of the most likely id minus p of the second most likely
  kEntropy = 2,      // negative entropy, in nats
  kRandom = 3,       // uniform in [0, 1), from the row's noise key
};

// Arguments of sample_tokens. It computes
//   token[n] = argmax_v (x[v] + temperature * Gumbel(seed, row_id, step, v)), ties to the lowest v,
// where x is row n of `logits` plus its sparse bias. Confidence, logprob, entropy and margin come from softmax(x),
// without noise and without temperature. Rows without a softmax (NaN, +inf, only -inf) get confidence and logprob -inf.
// Noise: Philox4x32-10, key = seed, counter = (v / 4, row_id, step, stream), word v % 4; see docs/ops.md.
//
// Where temperature > 0, filters leave out ids before the argmax, in this order:
//   top_k  keeps the top_k largest x and all ids whose x equals the last of them. 0 and less keep all.
//   top_p  takes softmax(x / temperature) over the ids that top_k left. It keeps the fewest ids whose sum reaches
//          top_p, at least one. The most likely ids come first; of equal ones, the lowest ids. 1 and more, and NaN,
//          keep all.
//
// With confidence_at_temperature, confidence, logprob, entropy and margin come from the filtered distribution:
// softmax(x / temperature) over the kept ids alone. Temperature 0 divides by 1. Rows without a softmax are not
// filtered.
struct SampleTokensParams {
  const void* logits = nullptr;   // [num_rows, vocab_size], dtype
  int64_t logits_row_stride = 0;  // elements between rows of `logits`; the last dimension is contiguous
  int64_t num_rows = 0;
  int64_t vocab_size = 0;               // 1 .. 2^31 - 1
  DType dtype = DType::kFloat32;        // of `logits`; kFloat16 on CUDA only
  float temperature = 0.0f;             // temperature of all rows where `temperatures` is null; 0 means greedy
  int64_t seed = 0;                     // seed of all rows where `seeds` is null
  int32_t step = 0;                     // step of all rows where `steps` is null
  const float* temperatures = nullptr;  // [num_rows] fp32; null means `temperature`
  const int64_t* seeds = nullptr;       // [num_rows] int64; null means `seed`
  const int32_t* steps = nullptr;       // [num_rows] int32; null means `step`
  const int64_t* row_ids = nullptr;     // [num_rows] int64, in [0, 2^32), row number in the noise; null means n
  const int32_t* bias_ids = nullptr;    // [num_rows, bias_count] or [bias_count] int32, ids; -1 means unused
  const float* bias_values = nullptr;   // fp32, same shape as bias_ids, added to the logits of these ids
  int64_t bias_count = 0;               // sparse biases per row
  int64_t bias_row_stride = 0;          // elements between rows of bias_ids and bias_values; 0: one bias for all rows
  Measure measure = Measure::kProbability;  // definition of the confidence
  int32_t top_k = 0;                        // filter of all rows where `top_ks` is null
  float top_p = 1.0f;                       // filter of all rows where `top_ps` is null
  const int32_t* top_ks = nullptr;          // [num_rows] int32; null means `top_k`
  const float* top_ps = nullptr;            // [num_rows] fp32; null means `top_p`
  bool confidence_at_temperature = false;   // confidence of the distribution that is sampled, as in Dream
  int64_t* token = nullptr;                 // output, [num_rows] int64, sampled ids
  float* confidence = nullptr;              // output, [num_rows] fp32
  float* logprob = nullptr;                 // output, [num_rows] fp32, log probability of `token`, in nats
  float* entropy = nullptr;                 // output, [num_rows] fp32, in nats; null means not wanted
  float* margin = nullptr;                  // output, [num_rows] fp32; null means not wanted
  int num_threads = 1;                      // number of CPU threads; CPU only
  CudaLaunch launch;                        // CUDA only
  void* workspace = nullptr;    // 16-byte aligned; contents need no initialisation and need not be kept; CUDA only
  int64_t workspace_bytes = 0;  // at least sample_tokens_workspace(...); CUDA only
};

// True if some row may need a filter or confidence at temperature.
inline bool may_filter(const SampleTokensParams& p) {
  return p.top_ks || p.top_ps || p.top_k > 0 || p.top_p < 1.0f || p.confidence_at_temperature;
}

// Runs sample_tokens on a CPU.
void sample_tokens_cpu(const SampleTokensParams& params);

// Runs sample_tokens on compute capability 8.0 and newer. It does not check values on the device (row_ids, bias ids,
// temperatures). It skips ids outside of the vocabulary.
void sample_tokens_cuda(const SampleTokensParams& params);

// Bytes of workspace that sample_tokens_cuda needs. It is 0 where one CTA handles each row and no row is filtered.
// Pass may_filter(params) as `filtered`.
int64_t sample_tokens_workspace(int64_t num_rows, int64_t vocab_size, int device, bool filtered = false);

// Arguments of linear_sample_tokens: sample_tokens of the logits hidden[rows] @ head_weight^T. The logits are never
// written to memory: the kernel reduces them in the GEMM's accumulators.
struct LinearSampleTokensParams {
  // Everything but the logits. num_rows, vocab_size and dtype (16-bit) describe the logits.
  SampleTokensParams sample;
  const void* hidden = nullptr;   // [num_tokens, width], sample.dtype, 16-byte aligned, hidden states
  int64_t hidden_row_stride = 0;  // elements between rows of `hidden`; a multiple of 8, not less than width
  int64_t num_tokens = 0;
  const int32_t* rows = nullptr;  // [num_rows] int32, selected rows, in [0, num_tokens); null: num_rows == num_tokens
  const void* head_weight = nullptr;   // [vocab_size, width], sample.dtype, 16-byte aligned
  int64_t head_weight_row_stride = 0;  // elements between rows of `head_weight`; a multiple of 8, not less than width
  int64_t width = 0;                   // elements of a hidden state; a multiple of 8
};

// Runs on compute capability 9.0 (sm_90a: wgmma, TMA). Rows outside of `hidden` count as zeros. At most 2^30 rows.
// There are no filters: params for which may_filter(params.sample) is true are refused.
void linear_sample_tokens_cuda(const LinearSampleTokensParams& params);

// Bytes of workspace that linear_sample_tokens_cuda needs. Returns -1 where there is no kernel for these params:
// another GPU, build, dtype or alignment. It ignores the output pointers and the workspace.
int64_t linear_sample_tokens_workspace(const LinearSampleTokensParams& params);

}  // namespace illada::sampling
