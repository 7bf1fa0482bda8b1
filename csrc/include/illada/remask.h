// Confidence remasking: sample a token and its confidence from each row of logits, commit the surest of them.
#pragma once

#include <cstdint>

#include "illada/cuda.h"
#include "illada/dtype.h"

namespace illada::remask {

// How a row's confidence is measured. Values are part of the binary interface with the bindings.
enum class Measure : int32_t {
  kProbability = 0,  // p(token)
  kMargin = 1,       // p of the most likely id minus p of the next
  kEntropy = 2,      // minus the entropy, in nats
  kRandom = 3,       // uniform in [0, 1), from the row's noise key
};

// token[n] = argmax_v (x[v] + temperature * Gumbel(seed, row_id, step, v)), ties to the lowest v, where x is row n
// of `logits` plus its sparse bias. Confidence, logprob, entropy and margin come from softmax(x): no noise, no
// temperature. Rows without a softmax (NaN, +inf, only -inf) get confidence and logprob -inf.
// Noise: Philox4x32-10, key = seed, counter = (v / 4, row_id, step, stream), word v % 4; see docs/ops.md.
//
// Where temperature > 0, filters leave out ids before the argmax, in this order:
//   top_k  keeps the top_k largest x and all that equal the last of them; 0 and less keep all.
//   top_p  keeps, of softmax(x / temperature) over what top_k left, the fewest ids whose sum reaches top_p, the most
//          likely first, of equal ones the lowest ids, at least one; 1 and more, and NaN, keep all.
// With confidence_at_temperature, confidence, logprob, entropy and margin come from the distribution that the filters
// leave: softmax(x / temperature), of kept ids alone; temperature 0 divides by 1. Rows without a softmax are not
// filtered.
struct SampleTokensParams {
  const void* logits = nullptr;   // [num_rows, vocab_size], dtype
  int64_t logits_row_stride = 0;  // in elements; the last dimension is contiguous
  int64_t num_rows = 0;
  int64_t vocab_size = 0;         // 1 .. 2^31 - 1
  DType dtype = DType::kFloat32;  // kFloat16 on CUDA only
  float temperature = 0.0f;       // used where `temperatures` is null
  int64_t seed = 0;
  int32_t step = 0;
  const float* temperatures = nullptr;  // [num_rows] or null
  const int64_t* seeds = nullptr;       // [num_rows] or null
  const int32_t* steps = nullptr;       // [num_rows] or null
  const int64_t* row_ids = nullptr;     // [num_rows], in [0, 2^32), or null: row_id = n
  const int32_t* bias_ids = nullptr;    // [num_rows, bias_count] or [bias_count]; -1 = unused
  const float* bias_values = nullptr;   // same shape
  int64_t bias_count = 0;
  int64_t bias_row_stride = 0;  // 0: one bias for all rows
  Measure measure = Measure::kProbability;
  int32_t top_k = 0;                       // used where `top_ks` is null
  float top_p = 1.0f;                      // used where `top_ps` is null
  const int32_t* top_ks = nullptr;         // [num_rows] or null
  const float* top_ps = nullptr;           // [num_rows] or null
  bool confidence_at_temperature = false;  // confidence of what is sampled, as in Dream
  int64_t* token = nullptr;                // [num_rows]
  float* confidence = nullptr;             // [num_rows]
  float* logprob = nullptr;                // [num_rows]
  float* entropy = nullptr;                // [num_rows] or null
  float* margin = nullptr;                 // [num_rows] or null
  int num_threads = 1;                     // CPU
  CudaLaunch launch;                       // CUDA, as are the next two
  void* workspace = nullptr;               // 16-byte aligned; contents need not be kept or set
  int64_t workspace_bytes = 0;             // at least sample_tokens_workspace(...)
};

// May a row ask for filters, or for confidence at temperature?
inline bool may_filter(const SampleTokensParams& p) {
  return p.top_ks || p.top_ps || p.top_k > 0 || p.top_p < 1.0f || p.confidence_at_temperature;
}

void sample_tokens_cpu(const SampleTokensParams& params);

// On compute capability 8.0 and newer. Values on the device (row_ids, bias ids, temperatures) are not checked; ids
// outside of the vocabulary are skipped.
void sample_tokens_cuda(const SampleTokensParams& params);

// Bytes of workspace that sample_tokens_cuda needs, 0 where every row is one CTA's and none is filtered.
// filtered: may_filter(params).
int64_t sample_tokens_workspace(int64_t num_rows, int64_t vocab_size, int device, bool filtered = false);

// sample_tokens of the logits hidden[rows] @ weight^T, which are never written: the reductions happen where the GEMM's
// accumulators are.
struct LinearSampleTokensParams {
  SampleTokensParams sample;      // without logits; num_rows, vocab_size and dtype (16-bit) are those of the logits
  const void* hidden = nullptr;   // [num_tokens, width], dtype, 16-byte aligned
  int64_t hidden_row_stride = 0;  // a multiple of 8, not less than width
  int64_t num_tokens = 0;
  const int32_t* rows = nullptr;  // [num_rows], in [0, num_tokens), or null: num_rows == num_tokens
  const void* weight = nullptr;   // [vocab_size, width], dtype, 16-byte aligned
  int64_t weight_row_stride = 0;  // a multiple of 8, not less than width
  int64_t width = 0;              // a multiple of 8
};

// On compute capability 9.0 (sm_90a: wgmma, TMA). Rows outside of hidden are taken as zeros. At most 2^30 rows. No
// filters: may_filter(params.sample) is refused.
void linear_sample_tokens_cuda(const LinearSampleTokensParams& params);

// Bytes of workspace that it needs, or -1 where there is no such kernel for these params: another GPU or build, dtype
// or alignment. Pointers of outputs and the workspace itself are not looked at.
int64_t linear_sample_tokens_workspace(const LinearSampleTokensParams& params);

// Which candidates of a sequence are committed, ranked by (confidence descending, row ascending), or by (entropy
// ascending, row ascending) for kEntropyBound. Values are part of the binary interface with the bindings.
enum class Rule : int32_t {
  kQuota = 0,         // the first limit[s]
  kThreshold = 1,     // all with confidence >= limit[s]
  kFactor = 2,        // the longest prefix with confidence_(r) > 1 - limit[s] / (r + 1), r = 1, 2, ...
  kEntropyBound = 3,  // the longest prefix whose entropies sum to <= limit[s] without the largest
};

// Row n of sequence s (cu_rows[s] <= n < cu_rows[s + 1]) is a candidate where tokens[rows[n]] == mask_id, its
// confidence is neither NaN nor -inf and, for kEntropyBound, its entropy is not NaN. Committing writes
// tokens[rows[n]] = token[n]; other tokens stay as they are. A token that does not fit int32 `tokens` is an error on a
// CPU; on CUDA its row is no candidate.
struct RemaskParams {
  void* tokens = nullptr;  // [num_tokens], int32 or int64, written in place
  bool tokens_are_int64 = true;
  int64_t num_tokens = 0;
  const int32_t* rows = nullptr;     // [num_rows], positions in `tokens`
  const int32_t* cu_rows = nullptr;  // [num_sequences + 1], 0 .. num_rows, ascending
  int64_t num_rows = 0;
  int64_t num_sequences = 0;
  const int64_t* token = nullptr;     // [num_rows]
  const float* confidence = nullptr;  // [num_rows]
  const float* entropy = nullptr;     // [num_rows]; needed by kEntropyBound alone
  Rule rule = Rule::kQuota;
  float limit = 0.0f;            // used where `limits` is null; a quota may be infinite
  const void* limits = nullptr;  // [num_sequences] or null; int32 for kQuota, float for the others
  int64_t mask_id = 0;
  int64_t min_commit = 1;            // at least so many, if there are that many candidates; not for kQuota
  const int64_t* end_ids = nullptr;  // [num_end_ids], tokens that end a sequence
  int64_t num_end_ids = 0;
  int32_t* committed = nullptr;  // [num_sequences], how many were committed
  int32_t* remaining = nullptr;  // [num_sequences] or null: how many of the rows still hold mask_id
  bool* finished = nullptr;      // [num_sequences] or null: remaining == 0
  bool* ended = nullptr;         // [num_sequences] or null: was one of end_ids committed?
  CudaLaunch launch;             // CUDA only
};

void remask_cpu(const RemaskParams& params);

// On compute capability 8.0 and newer. Rows outside of `tokens` are skipped; the rows of a sequence must be distinct.
// Candidates are kept in registers up to 8192 of them; more are read again in each round of the selection.
void remask_cuda(const RemaskParams& params);

}  // namespace illada::remask
