#include "illada/loss.h"

#include <cstring>

#include "cpu/dtypes.h"
#include "cpu/parallel.h"
#include "cpu/row_kernels.h"
#include "illada/error.h"

namespace illada::loss {
namespace {

constexpr const char* kOp = "masked_cross_entropy";

// Returns the target of token i in this shard, or -1.
int64_t target_of(const MaskedCrossEntropyParams& p, int64_t i) {
  const int64_t id = static_cast<const int64_t*>(p.targets)[i];
  return id >= p.vocab_start && id - p.vocab_start < p.vocab_size ? id - p.vocab_start : -1;
}

void validate(const MaskedCrossEntropyParams& p) {
  cpu::check_logits_dtype(kOp, p.dtype);
  ILLADA_CHECK(p.num_rows >= 0 && p.num_tokens >= 0, kOp, "negative size: ", p.num_rows, " rows, ", p.num_tokens,
               " tokens");
  ILLADA_CHECK(p.vocab_size > 0, kOp, "vocab_size must be positive, got ", p.vocab_size);
  ILLADA_CHECK(p.num_rows == 0 || (p.logits && p.targets && p.token_weights), kOp,
               "logits, targets and token_weights must not be null");
  ILLADA_CHECK(p.targets_are_int64, kOp, "targets on a CPU must be int64");
  ILLADA_CHECK(p.vocab_start >= 0, kOp, "vocab_start must not be negative, got ", p.vocab_start);
  ILLADA_CHECK(p.logits_row_stride >= 0, kOp, "logits row stride must not be negative, got ", p.logits_row_stride);
  ILLADA_CHECK(!p.grad || p.grad_row_stride >= p.vocab_size || p.num_rows <= 1, kOp, "grad row stride ",
               p.grad_row_stride, " is less than vocab_size ", p.vocab_size);
  for (int64_t n = 0; n < p.num_rows; ++n) {
    const int64_t i = p.rows ? p.rows[n] : n;
    ILLADA_CHECK(i >= 0 && i < p.num_tokens, kOp, "rows[", n, "] is ", i, ", outside of [0, ", p.num_tokens, ")");
    ILLADA_CHECK(!p.nll || p.token_weights[i] == 0 || target_of(p, i) >= 0, kOp, "targets[", i, "] is ",
                 static_cast<const int64_t*>(p.targets)[i], ", outside of [", p.vocab_start, ", ",
                 p.vocab_start + p.vocab_size, "), and its weight is not zero");
  }
}

float loss_factor(const MaskedCrossEntropyParams& p) {
  return p.scale / (p.normalizer ? *p.normalizer : 1.0f) * (p.dloss ? *p.dloss : 1.0f);
}

// Calls f(n, i, row of logits, row of grad or null) for every row with a nonzero token weight. Writes zeros to the
// gradient of the others.
template <typename F>
void for_rows(const MaskedCrossEntropyParams& p, F&& f) {
  const int64_t size = element_size(p.dtype);
  const int threads = cpu::threads_for(p.num_rows * p.vocab_size, p.num_threads);
  cpu::parallel_for(p.num_rows, threads, [&](int64_t n) {
    const int64_t i = p.rows ? p.rows[n] : n;
    const char* x = static_cast<const char*>(p.logits) + n * p.logits_row_stride * size;
    char* grad = p.grad ? static_cast<char*>(p.grad) + n * p.grad_row_stride * size : nullptr;
    if (p.token_weights[i] != 0) {
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
  const float factor = loss_factor(p);
  for (int64_t n = 0; n < p.num_rows; ++n) {
    if (p.nll) p.nll[n] = 0;
    if (p.target_logit) p.target_logit[n] = 0;
    if (p.lse) p.lse[n] = 0;
    if (p.lse_parts) p.lse_parts[2 * n] = p.lse_parts[2 * n + 1] = 0;
  }
  for_rows(p, [&](int64_t n, int64_t i, const void* x, void* grad) {
    const cpu::RowLse lse = row_lse(x, p.vocab_size);
    const int64_t target = target_of(p, i);
    const float target_logit = target >= 0 ? logit(x, target) : 0.0f;
    if (p.nll) p.nll[n] = lse.maximum - target_logit + lse.log_sum;
    if (p.lse) p.lse[n] = lse.maximum + lse.log_sum;
    if (p.lse_parts) {
      p.lse_parts[2 * n] = lse.maximum;
      p.lse_parts[2 * n + 1] = lse.log_sum;
    }
    if (p.target_logit) p.target_logit[n] = target_logit;
    if (grad) softmax_grad(x, grad, p.vocab_size, lse, p.token_weights[i] * factor, 0.0f, target);
  });
}

void masked_cross_entropy_backward_cpu(const MaskedCrossEntropyParams& p) {
  validate(p);
  ILLADA_CHECK(p.num_rows == 0 || (p.grad && p.lse_parts), kOp, "the backward needs grad and lse_parts");
  const cpu::RowKernels& kernels = cpu::row_kernels();
  const auto softmax_grad = p.dtype == DType::kBFloat16 ? kernels.softmax_grad_bf16 : kernels.softmax_grad_f32;
  const float factor = loss_factor(p);
  for_rows(p, [&](int64_t n, int64_t i, const void* x, void* grad) {
    const cpu::RowLse lse{p.lse_parts[2 * n], p.lse_parts[2 * n + 1]};
    softmax_grad(x, grad, p.vocab_size, lse, p.token_weights[i] * factor, p.dlse ? p.dlse[n] : 0.0f, target_of(p, i));
  });
}

void weighted_sum_cpu(const WeightedSumParams& p) {
  ILLADA_CHECK(p.num_rows >= 0, kOp, "negative number of rows: ", p.num_rows);
  ILLADA_CHECK(p.loss && (p.num_rows == 0 || (p.nll && p.token_weights)), kOp,
               "loss, nll and token_weights must not be null");
  double sum = 0;
  for (int64_t n = 0; n < p.num_rows; ++n) {
    if (p.token_weights[n] != 0) sum += double(p.token_weights[n]) * double(p.nll[n]);
  }
  *p.loss = float(sum * (p.normalizer ? p.scale / double(*p.normalizer) : p.scale));
}

}  // namespace illada::loss
