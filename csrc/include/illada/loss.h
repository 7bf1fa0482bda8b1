// Masked, weighted cross-entropy over rows of logits, whole or a shard of the vocabulary, and its gradient.
#pragma once

#include <cstdint>

#include "illada/cuda.h"
#include "illada/dtype.h"

namespace illada::loss {

// For each n in [0, num_rows), with x = row n of `logits`, i = rows ? rows[n] : n, y = targets[i] - vocab_start,
// w = weights[i], and the factor f = scale / normalizer * dloss:
//   lse[n]          = log sum_v exp(x[v])                natural log, accumulated in fp32
//   lse_parts[n]    = max_v x[v], lse[n] less that          apart, as lse beside x of 1e4 has no digits for x - lse
//   target_logit[n] = x[y]                               0 where y is outside of [0, vocab_size)
//   nll[n]          = lse[n] - x[y]                      NaN where y is outside, on a CPU an error
//   grad[n]         = (w f + dlse[n]) softmax(x) - w f onehot(y)      no onehot where y is outside
// All of them are 0 where w == 0: such rows are never read, whatever their target. `targets` and `weights` are indexed
// by the packed token i, everything else by n. The caller allocates everything; strides are in elements, the last
// dimension is contiguous.
//
// A shard of the vocabulary has vocab_start > 0 or ids after its own: ask it for lse_parts and target_logit, not for
// nll; log sum exp of the shards' lse is the row's, the sum of their target_logit the target's, and the backward of
// each shard with the row's lse_parts gives its part of the gradient. Their sum is the row's lse: the first is at or
// near the row's maximum, the second the small logarithm of the sum relative to it. CUDA takes exponentials of both.
struct MaskedCrossEntropyParams {
  const void* logits = nullptr;  // [num_rows, vocab_size], dtype
  int64_t logits_row_stride = 0;
  const int32_t* rows = nullptr;   // [num_rows], or null: i = n. Outside of [0, num_tokens): w = 0, on a CPU an error
  const void* targets = nullptr;   // [num_tokens], int64 or int32
  bool targets_are_int64 = true;   // false on CUDA only
  const float* weights = nullptr;  // [num_tokens]
  float* nll = nullptr;            // [num_rows], or null
  float* lse = nullptr;            // [num_rows], or null
  float* lse_parts = nullptr;      // [num_rows, 2], 8-byte aligned, or null; the backward reads it
  float* target_logit = nullptr;   // [num_rows], or null
  void* grad = nullptr;            // [num_rows, vocab_size], dtype, or null; may be `logits` itself
  int64_t grad_row_stride = 0;
  const float* dlse = nullptr;        // [num_rows], or null: 0. Gradient of some loss (a z-loss) in the lse
  const float* normalizer = nullptr;  // a number (on CUDA on the device) that divides, or null: 1
  const float* dloss = nullptr;       // a number (the same) that multiplies, or null: 1
  int64_t num_rows = 0;
  int64_t num_tokens = 0;
  int64_t vocab_size = 0;  // of the shard; at most 2^31 - 1 on CUDA
  int64_t vocab_start = 0;
  float scale = 1.0f;
  DType dtype = DType::kFloat32;  // kFloat16 on CUDA only
  int num_threads = 1;            // CPU
  CudaLaunch launch;              // CUDA, as are the next two
  void* workspace = nullptr;      // 16-byte aligned; contents need not be kept or set
  int64_t workspace_bytes = 0;    // at least masked_cross_entropy_workspace(...)
};

// lse, lse_parts, nll and target_logit in one pass over each row, a second one over the (cached) row for grad. Throws
// illada::Error.
void masked_cross_entropy_cpu(const MaskedCrossEntropyParams& params);

// The backward alone, from the lse_parts of an earlier call: grad as above, nothing else is written.
void masked_cross_entropy_backward_cpu(const MaskedCrossEntropyParams& params);

// The same on compute capability 8.0 and newer. With grad: one read and one write of the row where it fits the
// registers of a CTA or (sm_90 and newer) of a cluster, 163,840 ids; else a forward and a backward. Results are the
// same bits in every run and do not depend on other rows.
void masked_cross_entropy_cuda(const MaskedCrossEntropyParams& params);
void masked_cross_entropy_backward_cuda(const MaskedCrossEntropyParams& params);  // needs no workspace

// Bytes of workspace that masked_cross_entropy_cuda needs for so many rows, 0 where no row is cut into pieces.
int64_t masked_cross_entropy_workspace(int64_t num_rows, int64_t vocab_size);

// loss[0] = scale / normalizer * sum_n weights[n] nll[n] over the n with weights[n] != 0; summed in double precision
// and in the same order every time.
struct WeightedSumParams {
  const float* nll = nullptr;         // [num_rows]
  const float* weights = nullptr;     // [num_rows]
  const float* normalizer = nullptr;  // a number on the device, or null: 1
  float* loss = nullptr;              // [1]
  int64_t num_rows = 0;
  float scale = 1.0f;
  CudaLaunch launch;
};
void weighted_sum_cuda(const WeightedSumParams& params);

// data[i] *= factor[0]. Where the factor is 1, as it is when a loss is differentiated by itself, nothing is read.
struct ScaleParams {
  void* data = nullptr;  // [count], dtype
  int64_t count = 0;
  DType dtype = DType::kFloat32;
  const float* factor = nullptr;  // a number on the device
  CudaLaunch launch;
};
void scale_cuda(const ScaleParams& params);

}  // namespace illada::loss
