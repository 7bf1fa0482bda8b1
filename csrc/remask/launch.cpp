// Validates a call, chooses how to carry it out, and enqueues it.
#include "remask/launch.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/check.h"

namespace illada::remask {
namespace {

constexpr int64_t kPieceBytes = 48;  // sizeof(RowPiece), asserted where it is defined

int64_t bytes_of_rows(int64_t rows, int64_t row_stride, int64_t columns, int64_t element) {
  return rows == 0 ? 0 : ((rows - 1) * row_stride + columns) * element;
}

int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// What both samplers share.
void validate_sample(const char* op, const SampleTokensParams& p) {
  ILLADA_CHECK(p.num_rows >= 0, op, "num_rows must not be negative, got ", p.num_rows);
  ILLADA_CHECK(p.vocab_size > 0 && p.vocab_size <= std::numeric_limits<int32_t>::max() - 8, op,
               "vocab_size must be in [1, 2^31 - 9], got ", p.vocab_size);
  ILLADA_CHECK(p.temperatures || (p.temperature >= 0 && std::isfinite(p.temperature)), op,
               "temperature must be finite and >= 0, got ", p.temperature);
  ILLADA_CHECK(p.bias_count >= 0 && p.bias_row_stride >= 0, op, "negative size of logit_bias: ", p.bias_count);
  ILLADA_CHECK(reinterpret_cast<uintptr_t>(p.workspace) % 16 == 0, op, "workspace must be 16-byte aligned");
}

}  // namespace

RowSplit split_rows(int64_t num_rows, int64_t vocab_size, int sm_count) {
  constexpr int64_t kSmallestPiece = 256, kWaves = 8;  // in vectors: one a thread
  const int64_t vectors = (vocab_size + 7) / 8;
  const int64_t wanted = (kWaves * sm_count + num_rows - 1) / std::max<int64_t>(num_rows, 1);
  const int64_t splits = std::clamp<int64_t>(wanted, 1, (vectors + kSmallestPiece - 1) / kSmallestPiece);
  RowSplit split;
  split.vectors = (vectors + splits - 1) / splits;
  split.splits = int((vectors + split.vectors - 1) / split.vectors);
  return split;
}

int64_t sample_tokens_workspace(int64_t num_rows, int64_t vocab_size, int device_index) {
  const RowSplit split = split_rows(num_rows, vocab_size, device("sample_tokens", device_index).sm_count);
  return split.splits == 1 ? 0 : num_rows * split.splits * kPieceBytes;
}

void sample_tokens_cuda(const SampleTokensParams& p) {
  constexpr const char* kOp = "sample_tokens";
  validate_sample(kOp, p);
  ILLADA_CHECK(p.logits_row_stride >= 0, kOp, "logits row stride must not be negative, got ", p.logits_row_stride);
  if (p.num_rows == 0) return;
  const DeviceGuard guard(kOp, p.launch.device);
  const Device& gpu = device(kOp, p.launch.device);
  const RowSplit split = split_rows(p.num_rows, p.vocab_size, gpu.sm_count);
  const int64_t needed = split.splits == 1 ? 0 : p.num_rows * split.splits * kPieceBytes;
  ILLADA_CHECK(p.workspace_bytes >= needed, kOp, "workspace must have ", needed, " bytes, got ", p.workspace_bytes);
  ILLADA_CHECK(p.num_rows * split.splits <= std::numeric_limits<int32_t>::max(), kOp, "too many rows: ", p.num_rows);
  const int64_t n = p.num_rows;
  const int64_t bias = p.bias_count ? bytes_of_rows(p.bias_row_stride ? n : 1, p.bias_row_stride, p.bias_count, 4) : 0;
  check_regions(kOp, p.launch,
                {{"logits", p.logits, bytes_of_rows(n, p.logits_row_stride, p.vocab_size, size_of(p.dtype))},
                 {"temperature", p.temperatures, 4 * n, true},
                 {"seed", p.seeds, 8 * n, true},
                 {"step", p.steps, 4 * n, true},
                 {"row_ids", p.row_ids, 8 * n, true},
                 {"logit_bias ids", p.bias_ids, bias},
                 {"logit_bias values", p.bias_values, bias}},
                {{"token", p.token, 8 * n},
                 {"confidence", p.confidence, 4 * n},
                 {"logprob", p.logprob, 4 * n},
                 {"entropy", p.entropy, 4 * n, true},
                 {"margin", p.margin, 4 * n, true},
                 {"workspace", p.workspace, needed}});
  launch_sample_tokens(p, gpu, split);
}

void remask_cuda(const RemaskParams& p) {
  constexpr const char* kOp = "remask";
  ILLADA_CHECK(p.num_rows >= 0 && p.num_sequences >= 0 && p.num_tokens >= 0, kOp, "negative size: ", p.num_rows,
               " rows, ", p.num_sequences, " sequences, ", p.num_tokens, " tokens");
  ILLADA_CHECK(p.num_rows <= std::numeric_limits<int32_t>::max(), kOp, "too many rows: ", p.num_rows);
  ILLADA_CHECK(p.rule != Rule::kEntropyBound || p.entropy || p.num_rows == 0, kOp,
               "entropy_bound needs a sample with entropies");
  ILLADA_CHECK(p.min_commit >= 0, kOp, "min_commit must not be negative, got ", p.min_commit);
  ILLADA_CHECK(p.num_end_ids >= 0, kOp, "negative number of end_ids: ", p.num_end_ids);
  if (p.num_sequences == 0) return;
  const DeviceGuard guard(kOp, p.launch.device);
  const Device& gpu = device(kOp, p.launch.device);
  const int64_t n = p.num_rows, s = p.num_sequences;
  check_regions(kOp, p.launch,
                {{"rows", p.rows, 4 * n},
                 {"cu_rows", p.cu_rows, 4 * (s + 1)},
                 {"sample.token", p.token, 8 * n},
                 {"sample.confidence", p.confidence, 4 * n},
                 {"sample.entropy", p.entropy, 4 * n, true},
                 {"the rule's limit", p.limits, 4 * s, true},
                 {"end_ids", p.end_ids, 8 * p.num_end_ids}},
                {{"tokens", p.tokens, p.num_tokens * (p.tokens_are_int64 ? 8 : 4), n == 0},
                 {"committed", p.committed, 4 * s},
                 {"remaining", p.remaining, 4 * s, true},
                 {"finished", p.finished, s, true},
                 {"ended", p.ended, s, true}});
  launch_remask(p, gpu);
}

}  // namespace illada::remask
