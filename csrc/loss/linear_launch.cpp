// Validates a call of the fused head's loss, plans its row chunks, and enqueues them.
#include <algorithm>
#include <cmath>
#include <limits>

#include "common/check.h"
#include "common/memory.h"
#include "common/variants.h"
#include "illada/illada.h"
#include "loss/linear.h"
#include "loss/tile_order.h"

namespace illada::loss {
namespace {

constexpr const char* kOp = "linear_masked_cross_entropy";

int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

bool has_kernel(const LinearMaskedCrossEntropyParams& p, const Device& gpu) {
  const int vector = p.hidden_dtype == DType::kFloat32 ? 4 : 8;
  return arch_of(gpu) == Arch::kSm90 && p.hidden_dtype != DType::kFloat16 && p.width > 0 && p.width % 8 == 0 &&
         p.hidden_row_stride % vector == 0 && p.hidden_row_stride >= p.width && p.head_weight_row_stride % 8 == 0 &&
         p.head_weight_row_stride >= p.width && is_aligned(p.hidden, p.head_weight);
}

void validate(const LinearMaskedCrossEntropyParams& p) {
  constexpr int64_t kMaxSize = std::numeric_limits<int32_t>::max() - kPairRows;
  ILLADA_CHECK(p.num_tokens >= 0 && p.num_tokens <= kMaxSize, kOp, "num_tokens must be in [0, 2^31 - 257], got ",
               p.num_tokens);
  ILLADA_CHECK(p.vocab_size > 0 && p.vocab_size <= kMaxSize, kOp, "vocab_size must be in [1, 2^31 - 257], got ",
               p.vocab_size);
  ILLADA_CHECK(p.width <= kMaxSize, kOp, "width must be less than 2^31 - 256, got ", p.width);
  ILLADA_CHECK(p.num_rows >= -1 && p.num_rows <= kMaxSize, kOp, "num_rows must be in [-1, 2^31 - 257], got ",
               p.num_rows);
  ILLADA_CHECK(std::isfinite(p.scale), kOp, "scale must be finite, got ", p.scale);
  ILLADA_CHECK(p.filter_eps >= 0 && p.filter_eps < 1, kOp, "filter_eps must be in [0, 1), got ", p.filter_eps);
  ILLADA_CHECK(p.chunk_rows >= 0, kOp, "chunk_rows must not be negative, got ", p.chunk_rows);
  ILLADA_CHECK(p.weight_grad_dtype != DType::kFloat16, kOp, "the weight's gradient must be float32 or bfloat16");
  ILLADA_CHECK(is_aligned(p.workspace), kOp, "workspace must be 16-byte aligned");
  ILLADA_CHECK(is_aligned(p.weight_grad, p.hidden_grad), kOp, "gradients must be 16-byte aligned");
}

}  // namespace

LinearPlan plan_linear(const LinearMaskedCrossEntropyParams& p, const Device& gpu) {
  const bool gradients = p.hidden_grad || p.weight_grad;
  LinearPlan plan;
  plan.tokens = p.num_rows < 0 ? p.num_tokens : p.num_rows;
  plan.vocab_tiles = int((p.vocab_size + kVocabTileIds - 1) / kVocabTileIds);
  plan.prob_stride = int64_t(plan.vocab_tiles) * kVocabTileIds;
  // Without gradients no logits are kept, so rows need almost no memory.
  const int64_t all = std::max<int64_t>(round_up(plan.tokens, kPairRows), kPairRows);
  int64_t rows = 16384;
  if (p.chunk_rows > 0) {
    rows = round_up(std::min(p.chunk_rows, all), kPairRows);
  } else if (gradients) {
    rows = std::max<int64_t>(kDefaultLogitsBytes / (2 * plan.prob_stride) / kPairRows, 1) * kPairRows;
  }
  rows = std::min(rows, all);
  plan.chunk_rows = int(rows);
  plan.row_chunks = int((plan.tokens + rows - 1) / rows);

  const auto allocate = [&](int64_t bytes) {
    const int64_t at = plan.bytes;
    plan.bytes += round_up(bytes, 256);
    return at;
  };
  if (p.num_rows < 0) {
    plan.list = allocate(4 * p.num_tokens);
    plan.count = allocate(4);
  }
  plan.hidden = allocate(rows * p.width * 2);
  plan.sums = allocate(plan.vocab_tiles * rows * 4);
  plan.maxima = allocate(plan.vocab_tiles * rows * 4);
  plan.targets = allocate(4 * rows);
  plan.target_logits = allocate(4 * rows);
  plan.references = allocate(4 * rows);
  plan.factors = allocate(4 * rows);
  plan.recompute = allocate(4 * rows / kPairRows);
  if (gradients && p.filter_eps > 0) {
    plan.lse = allocate(4 * rows);
    plan.live = allocate(rows / kPairRows * plan.vocab_tiles);
  }
  if (gradients) plan.probs = allocate(rows * plan.prob_stride * 2);
  if (p.hidden_grad) {
    // Where the rows fill only some clusters, the others take splits of the vocabulary.
    const int64_t columns = (p.width + 255) / 256, spare = std::max<int64_t>(gpu.sm_count / 2 / columns, 1);
    plan.slab_rows = int(
        std::max<int64_t>(plan.chunk_rows, std::min<int64_t>(spare, kMaxVocabSplits * rows / kPairRows) * kPairRows));
    plan.slabs = allocate(int64_t(plan.slab_rows) * p.width * 4);
  }
  return plan;
}

int64_t linear_masked_cross_entropy_workspace(const LinearMaskedCrossEntropyParams& p) {
  const Device& gpu = device(kOp, p.launch.device);
  if (!has_kernel(p, gpu)) return -1;
  if (p.vocab_size <= 0 || p.num_tokens < 0) return 0;
  return plan_linear(p, gpu).bytes;
}

LinearPlan plan_linear(const LinearMaskedCrossEntropyParams& p) { return plan_linear(p, device(kOp, p.launch.device)); }

namespace {

// Kernels count tiles and rows of all splits in 32 bits, and estimate the steps of a CTA there.
void check_counts(const LinearMaskedCrossEntropyParams& p, const LinearPlan& plan) {
  // The CTAs' tile numbers run past the last tile by up to a grid.
  constexpr int64_t kMaxTiles = std::numeric_limits<int32_t>::max() - (1 << 16);
  constexpr int64_t kMaxChunkRows = 1 << 27;
  ILLADA_CHECK(plan.chunk_rows <= kMaxChunkRows, kOp, "chunk_rows must be at most ", kMaxChunkRows, ", got ",
               p.chunk_rows);
  const int64_t pairs = plan.chunk_rows / kPairRows, columns = (p.width + 255) / 256;
  ILLADA_CHECK(pairs * plan.vocab_tiles <= kMaxTiles, kOp, "chunk_rows x vocab_size must be at most ",
               kMaxTiles * kPairRows * kVocabTileIds, ", got ", plan.chunk_rows, " x ", p.vocab_size);
  ILLADA_CHECK(columns * plan.vocab_tiles <= kMaxTiles, kOp, "width x vocab_size must be at most ",
               kMaxTiles * 256 * kVocabTileIds, ", got ", p.width, " x ", p.vocab_size);
  ILLADA_CHECK(pairs * columns <= kMaxTiles / (4 * int64_t(plan.vocab_tiles) + 128), kOp,
               "chunk_rows x width x vocab_size is too large: ", plan.chunk_rows, " x ", p.width, " x ", p.vocab_size);
}

// Validates a call and plans it. The caller holds a DeviceGuard.
LinearPlan checked_plan(const LinearMaskedCrossEntropyParams& p, const Device& gpu) {
  if (!has_kernel(p, gpu))
    detail::fail<NotSupported>(kOp, "the fused kernels need compute capability 9.0 and a build with 90a, bfloat16 ",
                               "weights, 16-byte aligned rows and a width that is a multiple of 8; got ", gpu.name,
                               ", built archs ", build_info().cuda_archs, ", hidden in ", name(p.hidden_dtype),
                               ", width ", p.width);
  const LinearPlan plan = plan_linear(p, gpu);
  check_counts(p, plan);
  ILLADA_CHECK(p.workspace_bytes >= plan.bytes, kOp, "workspace must have ", plan.bytes, " bytes, got ",
               p.workspace_bytes);
  const int64_t t = p.num_tokens, element = element_size(p.hidden_dtype);
  const int64_t weight_grad_bytes = p.vocab_size * p.width * element_size(p.weight_grad_dtype);
  check_regions(kOp, p.launch,
                {{"hidden", p.hidden, strided_bytes(t, p.hidden_row_stride, p.width, element)},
                 {"weight", p.head_weight, strided_bytes(p.vocab_size, p.head_weight_row_stride, p.width, 2)},
                 {"targets", p.targets, t * (p.targets_are_int64 ? 8 : 4)},
                 {"token_weights", p.token_weights, 4 * t},
                 {"rows", p.rows, 4 * std::max<int64_t>(p.num_rows, 0)},
                 {"normalizer", p.normalizer, 4, true}},
                {{"nll", p.nll, 4 * t},
                 {"hidden_grad", p.hidden_grad, t * p.width * element, true},
                 {"weight_grad", p.weight_grad, weight_grad_bytes, true},
                 {"workspace", p.workspace, plan.bytes}});
  return plan;
}

#if defined(ILLADA_BUILT_SM90A)
LinearRowChunk row_chunk(const LinearMaskedCrossEntropyParams& p, const LinearPlan& plan, int index) {
  char* const base = static_cast<char*>(p.workspace);
  const auto floats = [&](int64_t offset) { return reinterpret_cast<float*>(base + offset); };
  LinearRowChunk chunk{};
  chunk.first = int(int64_t(index) * plan.chunk_rows);
  chunk.list = p.num_rows >= 0 ? p.rows : reinterpret_cast<int32_t*>(base + plan.list);
  chunk.count = p.num_rows >= 0 ? nullptr : reinterpret_cast<int32_t*>(base + plan.count);
  chunk.listed = int(plan.tokens);
  chunk.rows = plan.chunk_rows;
  chunk.vocab_size = int(p.vocab_size);
  chunk.width = int(p.width);
  chunk.vocab_tiles = plan.vocab_tiles;
  chunk.hidden = reinterpret_cast<uint16_t*>(base + plan.hidden);
  chunk.probs = reinterpret_cast<uint16_t*>(base + plan.probs);
  chunk.prob_stride = plan.prob_stride;
  chunk.sums = floats(plan.sums);
  chunk.maxima = floats(plan.maxima);
  chunk.targets = reinterpret_cast<int32_t*>(base + plan.targets);
  chunk.target_logits = floats(plan.target_logits);
  chunk.references = floats(plan.references);
  chunk.factors = floats(plan.factors);
  chunk.recompute = reinterpret_cast<int32_t*>(base + plan.recompute);
  if (plan.live) {
    chunk.lse = floats(plan.lse);
    chunk.live = reinterpret_cast<uint8_t*>(base + plan.live);
  }
  chunk.slabs = floats(plan.slabs);
  chunk.slab_rows = plan.slab_rows;
  chunk.max_group_tiles = max_group_tiles();
  return chunk;
}

void launch_probabilities(const LinearMaskedCrossEntropyParams& p, const Device& gpu, const LinearPlan& plan,
                          const LinearRowChunk& chunk) {
  if (p.num_rows < 0 && chunk.first == 0) {
    char* const base = static_cast<char*>(p.workspace);
    launch_linear_select(p, gpu, reinterpret_cast<int32_t*>(base + plan.list),
                         reinterpret_cast<int32_t*>(base + plan.count));
  }
  launch_linear_gather(p, gpu, chunk);
  launch_linear_logits_sm90(p, gpu, chunk, false);
  launch_linear_statistics(p, gpu, chunk, false);
  launch_linear_logits_sm90(p, gpu, chunk, true);
  launch_linear_statistics(p, gpu, chunk, true);
}
#endif

}  // namespace

void linear_masked_cross_entropy_cuda(const LinearMaskedCrossEntropyParams& p) {
  validate(p);
  const DeviceGuard guard(kOp, p.launch.device);
  const Device& gpu = device(kOp, p.launch.device);
  [[maybe_unused]] const LinearPlan plan = checked_plan(p, gpu);
#if defined(ILLADA_BUILT_SM90A)
  const bool weight_first = variant<LossOrder>() == LossOrder::kWeightFirst;
  if (plan.row_chunks == 0 && p.weight_grad && !p.add_to_weight_grad)  // a sum over no tokens
    fill_zeros(kOp, p.launch, p.weight_grad, p.vocab_size * p.width * element_size(p.weight_grad_dtype));
  for (int i = 0; i < plan.row_chunks; ++i) {
    const LinearRowChunk chunk = row_chunk(p, plan, i);
    launch_probabilities(p, gpu, plan, chunk);
    if (p.weight_grad && weight_first) launch_linear_weight_grad_sm90(p, gpu, chunk);
    if (p.hidden_grad) {
      launch_linear_hidden_grad_sm90(p, gpu, chunk);
      launch_linear_scatter(p, gpu, chunk, false);
    }
    if (p.weight_grad && !weight_first) launch_linear_weight_grad_sm90(p, gpu, chunk);
  }
#endif
}

void linear_probabilities_cuda(const LinearMaskedCrossEntropyParams& p, int index) {
  validate(p);
  const DeviceGuard guard(kOp, p.launch.device);
  const Device& gpu = device(kOp, p.launch.device);
  const LinearPlan plan = checked_plan(p, gpu);
  ILLADA_CHECK(index >= 0 && index < plan.row_chunks, kOp, "chunk must be in [0, ", plan.row_chunks, "), got ", index);
#if defined(ILLADA_BUILT_SM90A)
  const LinearRowChunk chunk = row_chunk(p, plan, index);
  launch_probabilities(p, gpu, plan, chunk);
  if (p.weight_grad) launch_linear_clear(p, gpu, chunk);
#endif
}

void linear_scatter_cuda(const LinearMaskedCrossEntropyParams& p, int index) {
  validate(p);
  const DeviceGuard guard(kOp, p.launch.device);
  const Device& gpu = device(kOp, p.launch.device);
  const LinearPlan plan = checked_plan(p, gpu);
  ILLADA_CHECK(index >= 0 && index < plan.row_chunks, kOp, "chunk must be in [0, ", plan.row_chunks, "), got ", index);
#if defined(ILLADA_BUILT_SM90A)
  launch_linear_scatter(p, gpu, row_chunk(p, plan, index), true);
#endif
}

}  // namespace illada::loss
