// Confidence remasking: commit the sampled tokens with the highest confidence.
#pragma once

#include <cstdint>

#include "illada/cuda.h"

namespace illada::remask {

// Rule that chooses the candidates of a sequence to commit. Candidates are ranked by (confidence descending, row
// ascending), or by (entropy ascending, row ascending) for kEntropyBound. The bindings rely on the numeric values.
enum class Rule : int32_t {
  kQuota = 0,         // the first limit[s] candidates
  kThreshold = 1,     // all candidates with confidence >= limit[s]
  kFactor = 2,        // the longest prefix with confidence_(r) > 1 - limit[s] / (r + 1), r = 1, 2, ...
  kEntropyBound = 3,  // the longest prefix whose entropies, without the largest, sum to <= limit[s]
};

// Arguments of remask, which commits (un-masks) tokens. Row n of sequence s (cu_rows[s] <= n < cu_rows[s + 1]) is a
// candidate if
//   - tokens[rows[n]] == mask_id,
//   - its confidence is neither NaN nor -inf, and
//   - for kEntropyBound, its entropy is not NaN.
// Committing a row writes tokens[rows[n]] = token[n]. Other tokens do not change. A token that does not fit int32
// `tokens` is an error on a CPU; on CUDA its row is not a candidate.
struct RemaskParams {
  void* tokens = nullptr;        // [num_tokens], int32 or int64, the canvas, written in place
  bool tokens_are_int64 = true;  // type of `tokens`: true for int64, false for int32
  int64_t num_tokens = 0;
  const int32_t* rows = nullptr;  // [num_rows] int32, positions in `tokens`
  // [num_sequences + 1] int32, offsets of the sequences in `rows`, 0 .. num_rows, ascending.
  const int32_t* cu_rows = nullptr;
  int64_t num_rows = 0;
  int64_t num_sequences = 0;
  const int64_t* token = nullptr;     // [num_rows] int64, sampled ids
  const float* confidence = nullptr;  // [num_rows] fp32
  const float* entropy = nullptr;     // [num_rows] fp32, in nats; needed by kEntropyBound alone
  Rule rule = Rule::kQuota;
  float limit = 0.0f;            // limit of all sequences where `limits` is null; a quota may be infinite
  const void* limits = nullptr;  // [num_sequences], int32 for kQuota, fp32 for the others; null means `limit`
  int64_t mask_id = 0;           // id of the mask token
  int64_t min_commit = 1;        // least number of tokens to commit, if there are as many candidates; not for kQuota
  const int64_t* end_ids = nullptr;  // [num_end_ids] int64, ids that end a sequence
  int64_t num_end_ids = 0;
  int32_t* committed = nullptr;  // output, [num_sequences] int32, number of tokens committed
  int32_t* remaining = nullptr;  // output, [num_sequences] int32, rows that still hold mask_id; null: not wanted
  bool* finished = nullptr;      // output, [num_sequences], remaining == 0; null means not wanted
  bool* ended = nullptr;         // output, [num_sequences], true if one of end_ids was committed; null: not wanted
  CudaLaunch launch;             // CUDA only
};

// Runs remask on a CPU.
void remask_cpu(const RemaskParams& params);

// Runs remask on compute capability 8.0 and newer. It skips rows outside of `tokens`. The rows of a sequence must be
// distinct. Registers hold up to 8192 candidates; with more, each round of the selection reads them again.
void remask_cuda(const RemaskParams& params);

}  // namespace illada::remask
