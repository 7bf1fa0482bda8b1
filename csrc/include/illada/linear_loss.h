// Linear masked cross-entropy: a head's GEMM, the loss of its logits and both gradients, without the logits in memory.
#pragma once

#include <cstdint>

#include "illada/cuda.h"
#include "illada/dtype.h"

namespace illada::loss {

// Of the tokens i whose weights[i] is not 0 (of those that `rows` lists, where it is given), with
// x_i = hidden_i . weight^T [vocab_size], p_i = softmax(x_i) and g_i = weights[i] * scale / normalizer:
//   nll[i]        = logsumexp(x_i) - x_i[targets[i]]                       in nats; other tokens' is not written
//   hidden_grad_i = g_i (p_i - onehot(targets[i])) . weight                other tokens' is not written
//   weight_grad   = sum_i g_i (p_i - onehot(targets[i]))^T hidden_i        fp32 sums; added to what is there if asked
//   for
// Nothing of other tokens is read but their weights. Sums are in fp32; p_i and g_i hidden_i are kept in bfloat16 (2^-9
// of each value, not of the largest). Calls with the same input give the same bits. A target outside of [0, vocab_size)
// makes nll[i] NaN and leaves the token out of both gradients.
struct LinearMaskedCrossEntropyParams {
  const void* hidden = nullptr;           // [num_tokens, width], hidden_dtype
  DType hidden_dtype = DType::kBFloat16;  // kBFloat16, or kFloat32, which is rounded to bfloat16
  int64_t hidden_row_stride = 0;
  int64_t num_tokens = 0;         // less than 2^31
  const void* weight = nullptr;   // [vocab_size, width], bfloat16, 16-byte aligned
  int64_t weight_row_stride = 0;  // a multiple of 8
  int64_t vocab_size = 0;         // less than 2^31
  int64_t width = 0;              // a multiple of 8
  const void* targets = nullptr;  // [num_tokens], int64 or int32
  bool targets_are_int64 = true;
  const float* weights = nullptr;  // [num_tokens]
  const int32_t* rows = nullptr;   // [num_rows], distinct; others than [0, num_tokens) are ignored
  int64_t num_rows = -1;           // or -1: tokens whose weight is not 0, found on the device
  float scale = 1.0f;
  const float* normalizer = nullptr;  // a scalar on the device, or null: 1
  int64_t chunk_rows = 0;             // tokens whose probabilities exist at a time; 0: kDefaultLogitsBytes of them
  // 0: exact. Else blocks of 256 rows x 256 ids whose every p is below it and which hold no target are left out of the
  // gradients: hidden_grad_i is wrong by less than g_i filter_eps sum_v |weight_v|, weight_grad_v by less than
  // filter_eps sum_i g_i |hidden_i|, sums over what was left out.
  float filter_eps = 0.0f;
  float* nll = nullptr;                       // [num_tokens]
  void* hidden_grad = nullptr;                // [num_tokens, width], contiguous, hidden_dtype; or null
  void* weight_grad = nullptr;                // [vocab_size, width], contiguous, weight_grad_dtype; or null
  DType weight_grad_dtype = DType::kFloat32;  // or kBFloat16, in which chunks are then summed
  bool add_to_weight_grad = false;            // else it is overwritten
  CudaLaunch launch;
  void* workspace = nullptr;  // 16-byte aligned; contents need not be kept or set
  int64_t workspace_bytes = 0;
};

// Probabilities of one chunk, where chunk_rows does not say otherwise.
constexpr int64_t kDefaultLogitsBytes = 1400000000;

// On compute capability 9.0 (sm_90a: wgmma, TMA). Nothing waits for the device; the number of launches depends on
// num_tokens (or num_rows) and chunk_rows alone. At most 2^27 chunk_rows.
void linear_masked_cross_entropy_cuda(const LinearMaskedCrossEntropyParams& params);

// Bytes of workspace that it needs, or -1 where there is no such kernel for these params: another GPU or build, dtype
// or alignment. Pointers of outputs (but for which are null) and the workspace itself are not looked at.
int64_t linear_masked_cross_entropy_workspace(const LinearMaskedCrossEntropyParams& params);

}  // namespace illada::loss
