// Validates a call, chooses how to carry it out, and enqueues it.
#include "sampling/launch.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/memory.h"
#include "common/variants.h"
#include "illada/illada.h"

namespace illada::sampling {
namespace {

// Checks that both samplers share.
void validate_sample(const char* op, const SampleTokensParams& p) {
  ILLADA_CHECK(p.num_rows >= 0, op, "num_rows must not be negative, got ", p.num_rows);
  ILLADA_CHECK(p.vocab_size > 0 && p.vocab_size <= std::numeric_limits<int32_t>::max() - 8, op,
               "vocab_size must be in [1, 2^31 - 9], got ", p.vocab_size);
  ILLADA_CHECK(p.temperatures || (p.temperature >= 0 && std::isfinite(p.temperature)), op,
               "temperature must be finite and >= 0, got ", p.temperature);
  ILLADA_CHECK(p.top_ks || p.top_k >= 0, op, "top_k must be at least 0, got ", p.top_k);
  ILLADA_CHECK(p.top_ps || (p.top_p > 0 && p.top_p <= 1), op, "top_p must be in (0, 1], got ", p.top_p);
  ILLADA_CHECK(p.bias_count >= 0 && p.bias_row_stride >= 0, op, "negative size of logit_bias: ", p.bias_count);
  ILLADA_CHECK(is_aligned(p.workspace), op, "workspace must be 16-byte aligned");
}

void check_sample_regions(const char* op, const SampleTokensParams& p, int64_t workspace, std::vector<Region> inputs) {
  const int64_t n = p.num_rows;
  const int64_t bias = p.bias_count ? strided_bytes(p.bias_row_stride ? n : 1, p.bias_row_stride, p.bias_count, 4) : 0;
  inputs.insert(inputs.end(), {{"temperature", p.temperatures, 4 * n, true},
                               {"seed", p.seeds, 8 * n, true},
                               {"step", p.steps, 4 * n, true},
                               {"row_ids", p.row_ids, 8 * n, true},
                               {"top_k", p.top_ks, 4 * n, true},
                               {"top_p", p.top_ps, 4 * n, true},
                               {"logit_bias ids", p.bias_ids, bias},
                               {"logit_bias values", p.bias_values, bias}});
  check_regions(op, p.launch, inputs,
                {{"token", p.token, 8 * n},
                 {"confidence", p.confidence, 4 * n},
                 {"logprob", p.logprob, 4 * n},
                 {"entropy", p.entropy, 4 * n, true},
                 {"margin", p.margin, 4 * n, true},
                 {"workspace", p.workspace, workspace}});
}

}  // namespace

int shared_sample_stages() {
  switch (variant<SampleTokensLoads>()) {
    case SampleTokensLoads::kShared64:
      return 2;
    case SampleTokensLoads::kShared128:
      return 4;
    case SampleTokensLoads::kRegisters:
      break;
  }
  return 0;
}

RowSplit split_rows(int64_t num_rows, int64_t vocab_size, int sm_count) {
  // Chooses the split into whole vocab tiles with the shortest time on the busiest SM, whose CTAs take turns. The
  // beginning and end of a CTA cost about one and a half vocab tiles; so does the kernel that combines splits.
  constexpr double kOverhead = 1.5;
  constexpr int kMaxSplitTiles = 256;  // per CTA: their records are in shared memory
  RowSplit split;
  split.vocab_tiles = int(std::max<int64_t>((vocab_size / 8 + kVocabTileVectors - 1) / kVocabTileVectors, 1));
  const int64_t cta_slots = kSampleCtasPerSm * int64_t(sm_count);
  double best_cost = std::numeric_limits<double>::infinity();
  for (int split_tiles = 1; split_tiles <= std::min(split.vocab_tiles, kMaxSplitTiles); ++split_tiles) {
    const int splits = (split.vocab_tiles + split_tiles - 1) / split_tiles;
    const int64_t waves = (num_rows * splits + cta_slots - 1) / cta_slots;
    const double cost = double(waves) * (split_tiles + kOverhead) + (splits > 1 ? kOverhead : 0.0);
    if (cost < best_cost) {
      best_cost = cost;
      split.split_tiles = split_tiles;
      split.splits = splits;
    }
  }
  return split;
}

int64_t sample_tokens_workspace(int64_t num_rows, int64_t vocab_size, int device_index, bool filtered) {
  const RowSplit split = split_rows(num_rows, vocab_size, device("sample_tokens", device_index).sm_count);
  return row_records(split).bytes(num_rows) + (filtered ? int64_t(sizeof(RowCut)) * num_rows : 0);
}

void sample_tokens_cuda(const SampleTokensParams& p) {
  constexpr const char* kOp = "sample_tokens";
  validate_sample(kOp, p);
  ILLADA_CHECK(p.logits_row_stride >= 0, kOp, "logits row stride must not be negative, got ", p.logits_row_stride);
  if (p.num_rows == 0) return;
  const DeviceGuard guard(kOp, p.launch.device);
  const Device& gpu = device(kOp, p.launch.device);
  const RowSplit split = split_rows(p.num_rows, p.vocab_size, gpu.sm_count);
  const bool filtered = may_filter(p);
  const int64_t records = row_records(split).bytes(p.num_rows);
  const int64_t required_bytes = records + (filtered ? int64_t(sizeof(RowCut)) * p.num_rows : 0);
  ILLADA_CHECK(p.workspace_bytes >= required_bytes, kOp, "workspace must have ", required_bytes, " bytes, got ",
               p.workspace_bytes);
  const int64_t max_rows = std::numeric_limits<int32_t>::max() / split.splits;  // CTAs of a grid
  ILLADA_CHECK(p.num_rows <= max_rows, kOp, "logits of ", p.vocab_size, " ids may have ", max_rows, " rows, got ",
               p.num_rows);
  check_sample_regions(
      kOp, p, required_bytes,
      {{"logits", p.logits, strided_bytes(p.num_rows, p.logits_row_stride, p.vocab_size, element_size(p.dtype))}});
  RowCut* const cuts = filtered ? reinterpret_cast<RowCut*>(static_cast<char*>(p.workspace) + records) : nullptr;
  if (filtered) launch_sample_filters(p, gpu, cuts);
  launch_sample_tokens(p, gpu, split, cuts);
}

HeadPlan plan_head(int64_t num_rows, int64_t vocab_size, int sm_count) {
  // Cost of a work item in addition to its tiles, in tiles of width 4096. At first many logits of a row beat the best
  // so far, and each work item starts from nothing. Predicted 0.16 without noise, 1.1 with noise.
  constexpr double kWorkItemOverhead = 0.3;
  // A second kernel reads and merges the records of a row, 48 bytes each.
  constexpr int64_t kMaxVocabRanges = 160;
  constexpr int kExtraRounds = 48;
  HeadPlan plan;
  plan.row_tiles = int((num_rows + HeadPlan::kTileRows - 1) / HeadPlan::kTileRows);
  const int64_t all = (vocab_size + HeadPlan::kSliceIds - 1) / HeadPlan::kSliceIds;
  const auto divide_vocab = [&](int64_t max_ranges) {  // into ranges of equal size; the last may be smaller
    const int64_t slices = (all + max_ranges - 1) / max_ranges;
    return std::pair<int64_t, int64_t>((all + slices - 1) / slices, slices);
  };
  plan.vocab_slices = int(all);
  int64_t vocab_ranges = 0, range_slices = 0;
  if (plan.row_tiles == 1) {  // memory-bound: the CTAs divide the head weight, to the slice
    std::tie(vocab_ranges, range_slices) = divide_vocab(std::min<int64_t>(std::max(sm_count, 1), all));
    plan.clusters = int(vocab_ranges);
  } else {
    plan.cluster = 2;
    const int64_t clusters = std::max(sm_count / 2, 1), pairs = (plan.row_tiles + 1) / 2;
    plan.groups = int(std::max<int64_t>((pairs + HeadPlan::kGroupPairs - 4) / HeadPlan::kGroupPairs, 1));
    // With several groups, the clusters that run at the same time belong to one or two of them.
    const int64_t whole_tiles = (all + HeadPlan::kTileSlices - 1) / HeadPlan::kTileSlices;
    const int64_t min_ranges =
        plan.groups == 1 ? 1 : std::min((clusters + HeadPlan::kGroupPairs - 1) / HeadPlan::kGroupPairs, whole_tiles);
    const int64_t first = std::max<int64_t>((plan.row_tiles * min_ranges + 2 * clusters - 1) / (2 * clusters), 1);
    double best_cost = std::numeric_limits<double>::infinity();
    for (int64_t rounds = first; rounds < first + kExtraRounds; ++rounds) {
      // Largest number of ranges with which each cluster has at most `rounds` work items.
      const int64_t max_ranges = std::min(2 * rounds * clusters / plan.row_tiles, all);
      const auto [found, size] = divide_vocab(max_ranges);
      if (found > kMaxVocabRanges && range_slices) break;
      const int64_t work_items = (plan.row_tiles * found + 1) / 2;
      const int64_t tiles = (size + HeadPlan::kTileSlices - 1) / HeadPlan::kTileSlices;
      const double cost = double((work_items + clusters - 1) / clusters) * (double(tiles) + kWorkItemOverhead);
      if (cost < best_cost) {
        best_cost = cost;
        vocab_ranges = found;
        range_slices = size;
      }
      if (max_ranges == all) break;
    }
  }
  plan.vocab_ranges = int(vocab_ranges);
  plan.range_slices = int(range_slices);
  if (plan.cluster == 2) plan.clusters = std::min(plan.work_items(), sm_count / 2);
  return plan;
}

namespace {
bool has_fused_head(const LinearSampleTokensParams& p, const Device& gpu) {
  return arch_of(gpu) == Arch::kSm90 && p.sample.dtype != DType::kFloat32 && p.width > 0 && p.width % 8 == 0 &&
         p.hidden_row_stride % 8 == 0 && p.hidden_row_stride >= p.width && p.head_weight_row_stride % 8 == 0 &&
         p.head_weight_row_stride >= p.width && is_aligned(p.hidden, p.head_weight);
}

}  // namespace

HeadWorkspace head_workspace(const LinearSampleTokensParams& p, const HeadPlan& plan) {
  HeadWorkspace it;
  it.gathered = row_records(plan).bytes(p.sample.num_rows);
  it.bounds = it.gathered + (p.rows ? p.sample.num_rows * p.width * 2 : 0);
  it.bytes = it.bounds + 4 * p.sample.num_rows;
  return it;
}

int64_t linear_sample_tokens_workspace(const LinearSampleTokensParams& p) {
  const Device& gpu = device("linear_sample_tokens", p.sample.launch.device);
  if (!has_fused_head(p, gpu) || may_filter(p.sample)) return -1;
  if (p.sample.num_rows <= 0 || p.sample.vocab_size <= 0) return 0;
  return head_workspace(p, plan_head(p.sample.num_rows, p.sample.vocab_size, gpu.sm_count)).bytes;
}

void linear_sample_tokens_cuda(const LinearSampleTokensParams& p) {
  constexpr const char* kOp = "linear_sample_tokens";
  validate_sample(kOp, p.sample);
  if (p.sample.num_rows == 0) return;
  ILLADA_CHECK(p.rows || p.sample.num_rows == p.num_tokens, kOp, "num_rows is ", p.sample.num_rows, " but hidden has ",
               p.num_tokens, " rows and no rows are given");
  // Ids of whole tiles are counted in 32 bits, and so are row tiles of 128 rows x at most 255 ranges of the vocabulary.
  constexpr int64_t kMaxIds = std::numeric_limits<int32_t>::max() - 512, kMaxRows = 1 << 30;
  ILLADA_CHECK(p.sample.num_rows <= kMaxRows, kOp, "num_rows must be at most ", kMaxRows, ", got ", p.sample.num_rows);
  ILLADA_CHECK(p.sample.vocab_size <= kMaxIds, kOp, "vocab_size must be at most ", kMaxIds, ", got ",
               p.sample.vocab_size);
  if (may_filter(p.sample))
    detail::fail<NotSupported>(kOp, "the fused kernel has no filters: sample the logits with top_k, top_p or ",
                               "confidence_at_temperature");
  const DeviceGuard guard(kOp, p.sample.launch.device);
  const Device& gpu = device(kOp, p.sample.launch.device);
  if (!has_fused_head(p, gpu))
    detail::fail<NotSupported>(kOp, "the fused kernel needs compute capability 9.0 and a build with 90a, float16 or ",
                               "bfloat16, 16-byte aligned rows and a width that is a multiple of 8; got ", gpu.name,
                               ", built archs ", build_info().cuda_archs, ", ", name(p.sample.dtype), ", width ",
                               p.width);
  const HeadPlan plan = plan_head(p.sample.num_rows, p.sample.vocab_size, gpu.sm_count);
  const int64_t required_bytes = head_workspace(p, plan).bytes, n = p.sample.num_rows;
  ILLADA_CHECK(p.sample.workspace_bytes >= required_bytes, kOp, "workspace must have ", required_bytes, " bytes, got ",
               p.sample.workspace_bytes);
  check_sample_regions(
      kOp, p.sample, required_bytes,
      {{"hidden", p.hidden, strided_bytes(p.num_tokens, p.hidden_row_stride, p.width, 2)},
       {"weight", p.head_weight, strided_bytes(p.sample.vocab_size, p.head_weight_row_stride, p.width, 2)},
       {"rows", p.rows, 4 * n, true}});
#if defined(ILLADA_BUILT_SM90A)
  launch_linear_sample_tokens_sm90(p, gpu, plan);
#endif
}

}  // namespace illada::sampling
