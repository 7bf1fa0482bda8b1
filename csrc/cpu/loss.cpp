#include "illada/loss.h"

#include <cstring>

#include "cpu/parallel.h"
#include "cpu/row_kernels.h"
#include "illada/error.h"

namespace illada::loss {
namespace {

constexpr const char* kOp = "masked_cross_entropy";

int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

void validate(const MaskedCrossEntropyParams& p) {
  ILLADA_CHECK(p.dtype == DType::kFloat32 || p.dtype == DType::kBFloat16, kOp,
               "logits on a CPU must be float32 or bfloat16, got ", name(p.dtype));
  ILLADA_CHECK(p.num_rows >= 0 && p.num_tokens >= 0, kOp, "negative size: ", p.num_rows, " rows, ", p.num_tokens,
               " tokens");
  ILLADA_CHECK(p.vocab_size > 0, kOp, "vocab_size must be positive, got ", p.vocab_size);
  ILLADA_CHECK(p.num_rows == 0 || (p.logits && p.targets && p.weights && p.nll), kOp,
               "logits, targets, weights and nll must not be null");
  ILLADA_CHECK(p.logits_row_stride >= 0, kOp, "logits row stride must not be negative, got ", p.logits_row_stride);
  ILLADA_CHECK(!p.grad || p.grad_row_stride >= p.vocab_size || p.num_rows <= 1, kOp, "grad row stride ",
               p.grad_row_stride, " is less than vocab_size ", p.vocab_size);
  for (int64_t n = 0; n < p.num_rows; ++n) {
    const int64_t i = p.rows ? p.rows[n] : n;
    ILLADA_CHECK(i >= 0 && i < p.num_tokens, kOp, "rows[", n, "] is ", i, ", outside of [0, ", p.num_tokens, ")");
    ILLADA_CHECK(p.weights[i] == 0 || (p.targets[i] >= 0 && p.targets[i] < p.vocab_size), kOp, "targets[", i, "] is ",
                 p.targets[i], ", outside of [0, ", p.vocab_size, "), and its weight is not zero");
  }
}

// Calls f(n, i, row of logits, row of grad or null) for every row with a weight; the others get zeros.
template <typename F>
void for_rows(const MaskedCrossEntropyParams& p, F&& f) {
  const int64_t size = element_size(p.dtype);
  cpu::parallel_for(p.num_rows, p.num_threads, [&](int64_t n) {
    const int64_t i = p.rows ? p.rows[n] : n;
    const char* x = static_cast<const char*>(p.logits) + n * p.logits_row_stride * size;
    char* grad = p.grad ? static_cast<char*>(p.grad) + n * p.grad_row_stride * size : nullptr;
    if (p.weights[i] != 0) {
      f(n, i, x, grad);
    } else if (grad) {
      std::memset(grad, 0, size_t(p.vocab_size * size));
    }
  });
}

}  // namespace

void masked_cross_entropy_cpu(const MaskedCrossEntropyParams& p) {
  validate(p);
  const cpu::RowKernels& kernels = cpu::row_kernels();
  const bool bf16 = p.dtype == DType::kBFloat16;
  const auto row_lse = bf16 ? kernels.lse_bf16 : kernels.lse_f32;
  const auto softmax_grad = bf16 ? kernels.softmax_grad_bf16 : kernels.softmax_grad_f32;
  const auto logit = bf16 ? kernels.logit_bf16 : kernels.logit_f32;
  for (int64_t n = 0; n < p.num_rows; ++n) {
    p.nll[n] = 0;
    if (p.lse) p.lse[n] = 0;
  }
  for_rows(p, [&](int64_t n, int64_t i, const void* x, void* grad) {
    const float lse = row_lse(x, p.vocab_size);
    p.nll[n] = lse - logit(x, p.targets[i]);
    if (p.lse) p.lse[n] = lse;
    if (grad) softmax_grad(x, grad, p.vocab_size, lse, p.weights[i] * p.scale, p.targets[i]);
  });
}

void masked_cross_entropy_backward_cpu(const MaskedCrossEntropyParams& p) {
  validate(p);
  ILLADA_CHECK(p.num_rows == 0 || (p.grad && p.lse), kOp, "the backward needs grad and lse");
  const cpu::RowKernels& kernels = cpu::row_kernels();
  const auto softmax_grad = p.dtype == DType::kBFloat16 ? kernels.softmax_grad_bf16 : kernels.softmax_grad_f32;
  for_rows(p, [&](int64_t n, int64_t i, const void* x, void* grad) {
    softmax_grad(x, grad, p.vocab_size, p.lse[n], p.weights[i] * p.scale, p.targets[i]);
  });
}

}  // namespace illada::loss
