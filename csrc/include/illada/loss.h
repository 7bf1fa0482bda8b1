// Masked, weighted cross-entropy over rows of logits and its gradient. A row holds the whole vocabulary or a shard of
// it.
#pragma once

#include <cstdint>

#include "illada/cuda.h"
#include "illada/dtype.h"

namespace illada::loss {

// Arguments of the masked cross-entropy. For each n in [0, num_rows), with x = row n of `logits`,
// i = rows ? rows[n] : n, y = targets[i] - vocab_start, w = token_weights[i] and the factor f = scale / normalizer *
// dloss:
//   lse[n]          = log sum_v exp(x[v])                natural log, accumulated in fp32
//   lse_parts[n]    = max_v x[v] and lse[n] minus that maximum, two values
//   target_logit[n] = x[y]                               0 where y is outside of [0, vocab_size)
//   nll[n]          = lse[n] - x[y]                      in nats; NaN where y is outside, on a CPU an error
//   grad[n]         = (w f + dlse[n]) softmax(x) - w f onehot(y)      no onehot where y is outside
//
// All of them are 0 where w == 0: the kernels never read such rows, whatever their target. `targets` and
// `token_weights` are indexed by the packed token i, everything else by n. The caller allocates everything. Strides are
// in elements; the last dimension is contiguous.
//
// lse_parts has two values because fp32 cannot hold their sum precisely. With x of 1e4, lse has no digits left for
// x - lse. The first value is at or near the row's maximum. The second is the small logarithm of the sum relative to
// it. The row's lse is the sum of the two. CUDA takes exponentials of both.
//
// A shard of the vocabulary has vocab_start > 0 or is followed by more ids. For a shard, ask for lse_parts and
// target_logit, not for nll:
//   - The row's lse is the log sum exp of the shards' lse.
//   - The target's logit is the sum of the shards' target_logit.
//   - The backward of a shard, given the row's lse_parts, computes the shard's part of the gradient.
struct MaskedCrossEntropyParams {
  const void* logits = nullptr;   // [num_rows, vocab_size], dtype
  int64_t logits_row_stride = 0;  // elements between rows of `logits`
  // [num_rows] int32, packed token of each row; null means i = n. A token outside of [0, num_tokens) has w = 0; on a
  // CPU it is an error.
  const int32_t* rows = nullptr;
  const void* targets = nullptr;         // [num_tokens], int64 or int32, target ids in the whole vocabulary
  bool targets_are_int64 = true;         // type of `targets`: true for int64, false for int32; int32 on CUDA only
  const float* token_weights = nullptr;  // [num_tokens] fp32
  float* nll = nullptr;                  // output, [num_rows] fp32; null means not wanted
  float* lse = nullptr;                  // output, [num_rows] fp32; null means not wanted
  float* lse_parts = nullptr;     // [num_rows, 2] fp32, 8-byte aligned; null means not wanted. Input of the backward
  float* target_logit = nullptr;  // output, [num_rows] fp32; null means not wanted
  void* grad = nullptr;         // output, [num_rows, vocab_size], dtype; null means not wanted. May be `logits` itself
  int64_t grad_row_stride = 0;  // elements between rows of `grad`
  const float* dlse = nullptr;  // [num_rows] fp32, gradient of another loss (a z-loss) in lse; null means 0
  const float* normalizer = nullptr;  // Scalar divisor of the loss, a device pointer on CUDA; null means 1
  const float* dloss = nullptr;       // Scalar gradient of the loss, a device pointer on CUDA; null means 1
  int64_t num_rows = 0;
  int64_t num_tokens = 0;
  int64_t vocab_size = 0;         // number of ids in the shard; at most 2^31 - 1 on CUDA
  int64_t vocab_start = 0;        // first id of the shard
  float scale = 1.0f;             // factor of the loss
  DType dtype = DType::kFloat32;  // of `logits` and `grad`; kFloat16 on CUDA only
  int num_threads = 1;            // number of CPU threads; CPU only
  CudaLaunch launch;              // CUDA only
  void* workspace = nullptr;      // 16-byte aligned; contents need no initialisation and need not be kept; CUDA only
  int64_t workspace_bytes = 0;    // at least masked_cross_entropy_workspace(...); CUDA only
};

// Computes lse, lse_parts, nll and target_logit in one pass over each row. A second pass over the (cached) row computes
// grad. Throws illada::Error.
void masked_cross_entropy_cpu(const MaskedCrossEntropyParams& params);

// Computes the gradient alone, from the lse_parts of an earlier call. Writes grad as above and nothing else.
void masked_cross_entropy_backward_cpu(const MaskedCrossEntropyParams& params);

// Does the same as masked_cross_entropy_cpu on compute capability 8.0 and newer. With grad, it reads and writes a row
// once, where the row fits the registers of a CTA (20,480 ids) or, on sm_90 and newer, of a cluster (163,840). Longer
// rows take a forward and a backward. Results are the same bits in every run and do not depend on other rows.
void masked_cross_entropy_cuda(const MaskedCrossEntropyParams& params);
// Computes the gradient alone, as masked_cross_entropy_backward_cpu does. Needs no workspace.
void masked_cross_entropy_backward_cuda(const MaskedCrossEntropyParams& params);

// Bytes of workspace that masked_cross_entropy_cuda needs for num_rows rows. It is 0 where a row has one vocab tile.
int64_t masked_cross_entropy_workspace(int64_t num_rows, int64_t vocab_size);

// Arguments of the weighted sum: loss[0] = scale / normalizer * sum_n token_weights[n] nll[n] over the n with
// token_weights[n] != 0. The sum is in double precision and always in the same order.
struct WeightedSumParams {
  const float* nll = nullptr;            // [num_rows] fp32, in nats
  const float* token_weights = nullptr;  // [num_rows] fp32
  const float* normalizer = nullptr;     // Scalar divisor of the loss, a device pointer on CUDA; null means 1
  float* loss = nullptr;                 // output, [1] fp32
  int64_t num_rows = 0;
  double scale = 1.0;  // factor of the loss; CUDA rounds it to fp32
  CudaLaunch launch;   // CUDA only
};
// Computes the weighted sum on a CPU, in one thread.
void weighted_sum_cpu(const WeightedSumParams& params);
// Computes the weighted sum on compute capability 8.0 and newer.
void weighted_sum_cuda(const WeightedSumParams& params);

// Arguments of the scaling: data[i] *= factor[0]. Where the factor is 1, the kernel does not read `data`. The factor is
// 1 when a loss is differentiated with respect to itself.
struct ScaleParams {
  void* data = nullptr;           // [count], dtype, scaled in place
  int64_t count = 0;              // number of elements
  DType dtype = DType::kFloat32;  // of `data`
  const float* factor = nullptr;  // Scalar fp32 factor, a device pointer
  CudaLaunch launch;
};
void scale_cuda(const ScaleParams& params);

}  // namespace illada::loss
