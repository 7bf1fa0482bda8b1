// Linear masked cross-entropy: the head's GEMM, the loss of its logits and both gradients, without the logits in
// memory.
#pragma once

#include <cstdint>

#include "illada/cuda.h"
#include "illada/dtype.h"

namespace illada::loss {

// Arguments of the linear masked cross-entropy. The selected tokens i have token_weights[i] != 0 and, where `rows` is
// given, are listed there. With x_i = hidden_i . head_weight^T [vocab_size], p_i = softmax(x_i) and
// g_i = token_weights[i] * scale / normalizer:
//   nll[i]        = logsumexp(x_i) - x_i[targets[i]]                       in nats; not written for other tokens
//   hidden_grad_i = g_i (p_i - onehot(targets[i])) . head_weight           not written for other tokens
//   weight_grad   = sum_i g_i (p_i - onehot(targets[i]))^T hidden_i        fp32 sums; overwrites or adds
//
// Of other tokens, the kernels read only the token weights. Sums are in fp32. p_i and g_i hidden_i are kept in bfloat16
// (an error of 2^-9 of each value, not of the largest). Calls with the same input give the same bits. A target outside
// of [0, vocab_size) makes nll[i] NaN, and the token adds to neither gradient.
struct LinearMaskedCrossEntropyParams {
  const void* hidden = nullptr;           // [num_tokens, width], hidden_dtype, hidden states
  DType hidden_dtype = DType::kBFloat16;  // kBFloat16 or kFloat32; kFloat32 is rounded to bfloat16
  int64_t hidden_row_stride = 0;          // elements between rows of `hidden`
  int64_t num_tokens = 0;                 // at most 2^31 - 257
  const void* head_weight = nullptr;      // [vocab_size, width], bfloat16, 16-byte aligned
  int64_t head_weight_row_stride = 0;     // elements between rows of `head_weight`; a multiple of 8
  int64_t vocab_size = 0;                 // at most 2^31 - 257
  int64_t width = 0;                      // elements of a hidden state; a multiple of 8
  const void* targets = nullptr;          // [num_tokens], int64 or int32, target ids
  bool targets_are_int64 = true;          // type of `targets`: true for int64, false for int32
  const float* token_weights = nullptr;   // [num_tokens] fp32
  // [num_rows] int32, distinct indices of tokens; entries outside of [0, num_tokens) are ignored.
  const int32_t* rows = nullptr;
  int64_t num_rows = -1;  // length of `rows`; -1 means the device finds the tokens whose token weight is not 0
  float scale = 1.0f;     // factor of the loss, finite
  const float* normalizer = nullptr;  // Scalar divisor of the loss, a device pointer; null means 1
  // Rows of a row chunk, whose probabilities exist at the same time; 0 means as many as kDefaultLogitsBytes hold.
  int64_t chunk_rows = 0;
  // In [0, 1). 0 means exact gradients. Otherwise the gradients leave out blocks of 256 rows x 256 ids in which every p
  // is below filter_eps and which hold no target. With sums over what was left out, the errors are less than
  //   g_i filter_eps sum_v |head_weight_v|  in hidden_grad_i
  //   filter_eps sum_i g_i |hidden_i|       in weight_grad_v
  float filter_eps = 0.0f;
  float* nll = nullptr;  // output, [num_tokens] fp32
  // Gradients are contiguous and 16-byte aligned; null means not wanted.
  void* hidden_grad = nullptr;                // output, [num_tokens, width], hidden_dtype
  void* weight_grad = nullptr;                // gradient of head_weight: output, or sum to add to; weight_grad_dtype
  DType weight_grad_dtype = DType::kFloat32;  // kFloat32 or kBFloat16; kBFloat16 also sums the row chunks in bfloat16
  bool add_to_weight_grad = false;            // true: adds to weight_grad; false: overwrites it
  CudaLaunch launch;
  void* workspace = nullptr;    // 16-byte aligned; contents need no initialisation and need not be kept
  int64_t workspace_bytes = 0;  // at least linear_masked_cross_entropy_workspace(...)
};

// Bytes of the probabilities of one row chunk where chunk_rows is 0.
constexpr int64_t kDefaultLogitsBytes = 1400000000;

// Runs on compute capability 9.0 (sm_90a: wgmma, TMA). It never waits for the device. The number of launches depends
// only on num_tokens (or num_rows) and chunk_rows. A row chunk has at most 2^27 rows.
void linear_masked_cross_entropy_cuda(const LinearMaskedCrossEntropyParams& params);

// Bytes of workspace that linear_masked_cross_entropy_cuda needs. Returns -1 where there is no kernel for these params:
// another GPU, build, dtype or alignment. Of output pointers it looks only at which are null. It ignores the workspace.
int64_t linear_masked_cross_entropy_workspace(const LinearMaskedCrossEntropyParams& params);

}  // namespace illada::loss
