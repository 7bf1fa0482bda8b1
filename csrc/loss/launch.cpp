// Validates a call, chooses how to carry it out, and enqueues it.
#include "loss/launch.h"

#include <limits>

#include "common/memory.h"

namespace illada::loss {
namespace {

constexpr const char* kOp = "masked_cross_entropy";

void validate(const MaskedCrossEntropyParams& p) {
  // Kernels count ids and CTAs in 32 bits. Their loops pass the last id by up to a vocab tile.
  constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max(), kMaxIds = kMaxInt32 - kVocabTileVectors * 8;
  ILLADA_CHECK(p.dtype == DType::kFloat32 || p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16, kOp,
               "unknown dtype ", int(p.dtype));
  ILLADA_CHECK(p.num_rows >= 0 && p.num_tokens >= 0, kOp, "negative size: ", p.num_rows, " rows, ", p.num_tokens,
               " tokens");
  ILLADA_CHECK(p.rows || p.num_rows <= p.num_tokens, kOp, "logits have ", p.num_rows, " rows, but there are ",
               p.num_tokens, " tokens and no rows are given");
  ILLADA_CHECK(p.vocab_size > 0 && p.vocab_size <= kMaxIds, kOp, "vocab_size must be positive and at most ", kMaxIds,
               ", got ", p.vocab_size);
  ILLADA_CHECK(p.vocab_start >= 0, kOp, "vocab_start must not be negative, got ", p.vocab_start);
  ILLADA_CHECK(p.logits_row_stride >= 0, kOp, "logits row stride must not be negative, got ", p.logits_row_stride);
  ILLADA_CHECK(!p.grad || p.grad_row_stride >= p.vocab_size || p.num_rows <= 1, kOp, "grad row stride ",
               p.grad_row_stride, " is less than vocab_size ", p.vocab_size);
  ILLADA_CHECK(p.grad != p.logits || p.grad_row_stride == p.logits_row_stride || p.num_rows <= 1, kOp,
               "grad is logits, but its row stride is ", p.grad_row_stride, " and not ", p.logits_row_stride);
  ILLADA_CHECK(reinterpret_cast<uintptr_t>(p.lse_parts) % 8 == 0, kOp, "lse_parts must be 8-byte aligned");
  const int64_t max_rows = kMaxInt32 / (int64_t(vocab_tile_count(p.vocab_size)) + 8);
  ILLADA_CHECK(p.num_rows <= max_rows, kOp, "logits of ", p.vocab_size, " ids may have ", max_rows, " rows, got ",
               p.num_rows);
}

void check_memory(const MaskedCrossEntropyParams& p, bool backward, int64_t workspace) {
  const int64_t n = p.num_rows, element = element_size(p.dtype);
  const bool in_place = p.grad == p.logits;
  const Region logits{"logits", p.logits, strided_bytes(n, p.logits_row_stride, p.vocab_size, element)};
  const Region grad{"grad", p.grad, strided_bytes(n, p.grad_row_stride, p.vocab_size, element), !backward};
  std::vector<Region> inputs = {{"rows", p.rows, 4 * n, true},
                                {"targets", p.targets, p.num_tokens * (p.targets_are_int64 ? 8 : 4)},
                                {"token_weights", p.token_weights, 4 * p.num_tokens},
                                {"dlse", p.dlse, 4 * n, true},
                                {"normalizer", p.normalizer, 4, true},
                                {"dloss", p.dloss, 4, true}};
  std::vector<Region> outputs = {grad};
  if (!in_place) inputs.push_back(logits);
  if (backward) {
    inputs.push_back({"lse_parts", p.lse_parts, 8 * n});
  } else {
    outputs.insert(outputs.end(), {{"nll", p.nll, 4 * n, true},
                                   {"lse", p.lse, 4 * n, true},
                                   {"lse_parts", p.lse_parts, 8 * n, true},
                                   {"target_logit", p.target_logit, 4 * n, true},
                                   {"workspace", p.workspace, workspace}});
  }
  check_regions(kOp, p.launch, inputs, outputs);
}

}  // namespace

int64_t masked_cross_entropy_workspace(int64_t num_rows, int64_t vocab_size) {
  const int vocab_tiles = vocab_tile_count(vocab_size);
  return vocab_tiles == 1 ? 0 : num_rows * vocab_tiles * int64_t(sizeof(float2));
}

void masked_cross_entropy_cuda(const MaskedCrossEntropyParams& p) {
  validate(p);
  ILLADA_CHECK(!p.dlse || p.num_rows == 0, kOp, "dlse is an argument of the backward alone");
  if (p.num_rows == 0) return;
  const DeviceGuard guard(kOp, p.launch.device);
  const Device& gpu = device(kOp, p.launch.device);
  const FusedShape fused = p.grad ? fused_shape(p.vocab_size, gpu) : FusedShape{};
  const int64_t workspace = fused.vectors ? 0 : masked_cross_entropy_workspace(p.num_rows, p.vocab_size);
  ILLADA_CHECK(p.workspace_bytes >= workspace, kOp, "workspace must have ", workspace, " bytes, got ",
               p.workspace_bytes);
  ILLADA_CHECK(is_aligned(p.workspace), kOp, "workspace must be 16-byte aligned");
  ILLADA_CHECK(!p.grad || fused.vectors || p.lse_parts, kOp, "a gradient of ", p.vocab_size,
               " ids takes a forward and a backward, which needs lse_parts");
  check_memory(p, false, workspace);
  if (fused.vectors) return launch_fused(p, gpu, fused);
  launch_forward(p, gpu);
  if (p.grad) launch_backward(p, gpu);
}

void masked_cross_entropy_backward_cuda(const MaskedCrossEntropyParams& p) {
  validate(p);
  if (p.num_rows == 0) return;
  const DeviceGuard guard(kOp, p.launch.device);
  check_memory(p, true, 0);
  launch_backward(p, device(kOp, p.launch.device));
}

void weighted_sum_cuda(const WeightedSumParams& p) {
  ILLADA_CHECK(p.num_rows >= 0, kOp, "negative number of rows: ", p.num_rows);
  const DeviceGuard guard(kOp, p.launch.device);
  check_regions(kOp, p.launch,
                {{"nll", p.nll, 4 * p.num_rows},
                 {"token_weights", p.token_weights, 4 * p.num_rows},
                 {"normalizer", p.normalizer, 4, true}},
                {{"loss", p.loss, 4}});
  launch_weighted_sum(p, device(kOp, p.launch.device));
}

void scale_cuda(const ScaleParams& p) {
  ILLADA_CHECK(p.count >= 0, kOp, "negative number of elements: ", p.count);
  if (p.count == 0) return;
  const DeviceGuard guard(kOp, p.launch.device);
  check_regions(kOp, p.launch, {{"factor", p.factor, 4}}, {{"data", p.data, p.count * element_size(p.dtype)}});
  launch_scale(p, device(kOp, p.launch.device));
}

}  // namespace illada::loss
