// Masked, weighted cross-entropy over rows of logits (the row loop of `linear_masked_cross_entropy`).
#pragma once

#include <cstdint>

#include "illada/dtype.h"

namespace illada::loss {

// For each n in [0, num_rows), with x = row n of `logits`, i = rows ? rows[n] : n, y = targets[i], w = weights[i]:
//   lse[n]   = log sum_v exp(x[v])                    natural log, accumulated in fp32
//   nll[n]   = lse[n] - x[y]                          0 where w == 0
//   grad[n]  = w * scale * (softmax(x) - onehot(y))   0 where w == 0
// `targets` and `weights` are indexed by the packed token i, `logits`, `grad`, `lse` and `nll` by n.
// The caller allocates everything; strides are in elements, the last dimension is contiguous.
struct MaskedCrossEntropyParams {
  const void* logits = nullptr;  // [num_rows, vocab_size], dtype
  int64_t logits_row_stride = 0;
  const int32_t* rows = nullptr;     // [num_rows], or null: i = n
  const int64_t* targets = nullptr;  // [num_tokens]; must be in [0, vocab_size) where w != 0
  const float* weights = nullptr;    // [num_tokens]
  float* nll = nullptr;              // [num_rows]
  float* lse = nullptr;              // [num_rows], or null
  void* grad = nullptr;              // [num_rows, vocab_size], dtype, or null; may be `logits` itself
  int64_t grad_row_stride = 0;
  int64_t num_rows = 0;
  int64_t num_tokens = 0;
  int64_t vocab_size = 0;
  float scale = 1.0f;             // 1 / normalizer, times the upstream gradient where there is one
  DType dtype = DType::kFloat32;  // kFloat32 or kBFloat16
  int num_threads = 1;
};

// One pass over each row for nll and lse, a second one over the (cached) row for grad. Throws illada::Error.
void masked_cross_entropy_cpu(const MaskedCrossEntropyParams& params);

// The backward alone, from the lse of an earlier call: grad as above, nothing else is written.
void masked_cross_entropy_backward_cpu(const MaskedCrossEntropyParams& params);

}  // namespace illada::loss
