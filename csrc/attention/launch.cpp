// Validates a call, chooses how to carry it out, and enqueues it.
#include "attention/launch.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <string>
#include <utility>

#include "attention/traits.h"
#include "common/check.h"
#include "common/memory.h"
#include "common/ragged.h"
#include "common/variants.h"
#include "illada/illada.h"

namespace illada::attention {
namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
// Registers are few, so kernels count in 32 bits: heads, elements of all heads of a token, rows (tokens x heads), and
// query splits of a plan's items. They step behind the last row by a tile, which has at most 384 tokens of all heads,
// and an item has at most 8 query splits.
constexpr int64_t kMaxHeads = 1 << 16;
constexpr int64_t kMaxRows = (int64_t(1) << 31) - (1 << 25);
constexpr int64_t kMaxPlanRows = 1 << 29;

// Returns the kernels that serve a device and head dim.
Arch choose_arch(const Device& gpu, int head_dim) {
  return has_head_dim<Arch::kSm90>(head_dim) ? arch_of(gpu) : Arch::kSm80;
}

// Returns f(Traits of the kernels that serve a device and head dim). Throws NotSupported for a head dim that is not
// built.
template <typename F>
auto dispatch(const char* op, [[maybe_unused]] const Device& gpu, int head_dim, const F& f) {
#if defined(ILLADA_BUILT_SM90A)
  if (choose_arch(gpu, head_dim) == Arch::kSm90) return dispatch_head_dim<Arch::kSm90>(op, head_dim, f);
#endif
  return dispatch_head_dim<Arch::kSm80>(op, head_dim, f);
}

// Tile of the sm_80 forward: the first one if an SM has shared memory for eight warps of it, else the last one.
template <typename Tr>
ForwardTileSm80 forward_tile_sm80(const Device& gpu) {
  const ForwardTileSm80 first = *std::begin(Tr::kForwardTiles), last = *std::rbegin(Tr::kForwardTiles);
  const auto choice = variant<ForwardWarps>();
  if (choice == ForwardWarps::kEight) return last;
  const int cta = forward_smem_sm80<Tr>(first) + gpu.reserved_smem_bytes + 1024;
  const int ctas = choice == ForwardWarps::kFour ? 1 : 8 / first.warps;  // the choice yields only where no CTA fits
  return ctas * cta <= gpu.sm_smem_bytes ? first : last;
}

// Returns how the forward that serves a device divides a pack; on sm_90a in pairs of tiles if `pairs`. total_k has no
// part in it: a plan need not know it.
Tiling choose_tiling(const char* op, const PackShape& s, const Device& gpu, bool pairs) {
  return dispatch(op, gpu, s.head_dim, [&](auto traits) {
    using Tr = decltype(traits);
    if constexpr (Tr::kArch == Arch::kSm90) {
      const ForwardTile tile = Tr::kForwardTiles[int(variant<typename Tr::ForwardChoice>())];
      return make_tiling(s, Tr::kForwardBlocks, tile.keys, pairs);
    } else {
      const ForwardTileSm80 tile = forward_tile_sm80<Tr>(gpu);
      Tiling tiling = make_tiling(s, Tr::kForwardBlocks, tile.keys, false);
      tiling.warps = tile.warps;
      return tiling;
    }
  });
}
Tiling choose_tiling(const char* op, const PackShape& s, const Device& gpu) {
  return choose_tiling(op, s, gpu, variant<AttentionCluster>() == AttentionCluster::kAuto);
}
// The longest items that a plan may have, whatever was chosen when it was made.
Tiling longest_tiling(const char* op, const PackShape& s, const Device& gpu) { return choose_tiling(op, s, gpu, true); }

// Launches the instance of the forward whose tile is the variant in use.
template <typename Tr, size_t... kChoices>
void launch_forward_tile(const ForwardParams& p, const Device& gpu, const Tiling& tiling,
                         std::index_sequence<kChoices...>) {
  const auto choice = size_t(variant<typename Tr::ForwardChoice>());
  const auto launch = [&](auto number) {
    constexpr ForwardTile kTile = Tr::kForwardTiles[number];
    if (choice == number) launch_forward_sm90<Tr::kHeadDim, kTile.keys, kTile.value_stages>(p, gpu, tiling);
  };
  (launch(std::integral_constant<size_t, kChoices>()), ...);
}

// "64, 96, 128 and 256"
template <int... kHeadDims>
std::string head_dims_text(std::integer_sequence<int, kHeadDims...>) {
  std::string text;
  size_t left = sizeof...(kHeadDims);
  ((text += std::to_string(kHeadDims) + (--left > 1 ? ", " : left == 1 ? " and " : "")), ...);
  return text;
}

void validate_shape(const char* op, const PackShape& s, const Device& gpu, bool knows_keys) {
  ILLADA_CHECK(s.total_q >= 0 && s.total_q <= kMaxInt32, op, "total_q must be in [0, 2^31), got ", s.total_q);
  ILLADA_CHECK(s.total_k >= (knows_keys ? 0 : -1) && s.total_k <= kMaxInt32, op, "total_k must be in [0, 2^31), got ",
               s.total_k);
  if (choose_arch(gpu, s.head_dim) == Arch::kSm90 && std::max(s.total_q, s.total_k) > kRaggedTokens)
    detail::fail<NotSupported>(op, "kernels of ", gpu.name, " take at most ", kRaggedTokens, " tokens; got ", s.total_q,
                               " queries, ", s.total_k, " keys");
  ILLADA_CHECK(s.num_sequences >= 0, op, "negative number of sequences: ", s.num_sequences);
  ILLADA_CHECK(s.num_kv_heads > 0 && s.num_heads > 0 && s.num_heads % s.num_kv_heads == 0, op, "num_heads ",
               s.num_heads, " must be a multiple of num_kv_heads ", s.num_kv_heads);
  ILLADA_CHECK(s.num_heads <= kMaxHeads, op, "num_heads must be at most ", kMaxHeads, ", got ", s.num_heads);
  if (!has_head_dim<Arch::kSm80>(s.head_dim) || s.num_heads / s.num_kv_heads > kBlockRows)
    detail::fail<NotSupported>(op, "kernels were built for head dims ", head_dims_text(head_dims<Arch::kSm80>()),
                               " and up to ", kBlockRows, " query heads of a key-value head; got head dim ", s.head_dim,
                               " and ", s.num_heads / s.num_kv_heads, " heads on ", gpu.name, ", built archs ",
                               build_info().cuda_archs);
  ILLADA_CHECK(s.total_q * s.num_heads <= kMaxRows, op, "total_q x num_heads must be at most ", kMaxRows, ", got ",
               s.total_q, " x ", s.num_heads);
  ILLADA_CHECK(s.total_k * s.num_kv_heads <= kMaxRows, op, "total_k x num_kv_heads must be at most ", kMaxRows,
               ", got ", s.total_k, " x ", s.num_kv_heads);
  ILLADA_CHECK(plan_rows(s) <= kMaxPlanRows, op, "num_sequences x num_kv_heads is too large: a plan may have ",
               kMaxPlanRows, " rows, and ", s.num_sequences, " sequences x ", s.num_kv_heads, " heads of ", s.total_q,
               " queries and ", s.total_k, " keys need ", plan_rows(s));
}

// The bytes that a packed tensor spans. Strides of dimensions of size 1 become legal ones, since nobody uses them.
int64_t normalize_strides(const char* op, const char* name, PackedView& x, int64_t tokens, int64_t heads,
                          int head_dim) {
  if (heads <= 1) x.head_stride = head_dim;
  if (tokens <= 1) x.token_stride = heads * x.head_stride;
  if (tokens == 0) return 0;
  if (x.token_stride <= 0 || x.head_stride <= 0 || x.token_stride % 8 || x.head_stride % 8 || !is_aligned(x.data))
    detail::fail<NotSupported>(op, name, " must have positive strides that are multiples of 8 elements, and 16-byte ",
                               "aligned data; got token stride ", x.token_stride, ", head stride ", x.head_stride,
                               "; pass a contiguous copy");
  return ((tokens - 1) * x.token_stride + (heads - 1) * x.head_stride + head_dim) * 2;
}

void validate_call(const char* op, DType dtype, float softmax_scale, const Device& gpu) {
  if (dtype != DType::kBFloat16 && dtype != DType::kFloat16)
    detail::fail<NotSupported>(op, "kernels were built for bfloat16 and float16; got ", name(dtype), " on ", gpu.name,
                               ", built archs ", build_info().cuda_archs);
  ILLADA_CHECK(softmax_scale > 0 && std::isfinite(softmax_scale), op, "softmax_scale must be finite and > 0, got ",
               softmax_scale);
}

int64_t rows_bytes(const PackShape& s) {
  return (s.total_q * s.num_heads * int64_t(sizeof(RowStatistics)) + 15) / 16 * 16;
}

// Chooses how dq is summed, by the variants: only measurements on a GPU tell which method is fast. Ordered mode has one
// method.
void choose_accumulation(const PackShape& s, BackwardMethod& method) {
  const bool kept = variant<L2Hints>() == L2Hints::kOn && !method.ordered;
  method.accumulation = kept ? DqAccumulation::kRed2Kept : DqAccumulation::kRed2;
  if (method.ordered) return;
  const auto choice = variant<AttentionBackwardSums>();
  const int group = group_of(s);
  if (choice == AttentionBackwardSums::kRed4)
    method.accumulation = kept ? DqAccumulation::kRed4Kept : DqAccumulation::kRed4;
  // A warp's 16 rows must be whole tokens, or heads of one.
  if (choice == AttentionBackwardSums::kBulk && (16 % group == 0 || group % 16 == 0))
    method.accumulation = DqAccumulation::kBulk;
  method.staggered = variant<AttentionBackwardStart>() == AttentionBackwardStart::kStaggered;
  method.report_every = 1 << int(variant<AttentionBackwardReports>());
}

BackwardMethod choose_backward(const PackShape& s, bool deterministic, bool recompute_scores_for_dq,
                               const Device& gpu) {
  BackwardMethod method;
  if (s.total_q <= 0 || s.total_k <= 0) return method;  // nothing is multiplied
  // Places in the sums are 32-bit numbers.
  const int64_t sums = (s.total_q * s.num_heads + kWasteRows) * s.head_dim;
  method.fused = choose_arch(gpu, s.head_dim) == Arch::kSm90 && !recompute_scores_for_dq && sums <= kMaxInt32 &&
                 variant<AttentionBackwardSums>() != AttentionBackwardSums::kRecompute;
  if (method.fused && deterministic) {
    method.ordered = s.total_k / kBackwardKeys + s.num_sequences <= kMaxOrdered;
    method.fused = method.ordered;
  }
  if (method.fused) choose_accumulation(s, method);
  if (method.fused && s.num_sequences > 0 && s.num_kv_heads > 0) {
    const int64_t sequences = std::min<int64_t>(s.num_sequences, s.total_k);
    const int64_t items =
        s.num_kv_heads * ((s.total_k - sequences) / kBackwardKeys + sequences);  // the most there can be
    method.query_splits = int(std::clamp<int64_t>(gpu.sm_count / items, 1, method.ordered ? 2 : 8));
  }
  return method;
}

int64_t arrivals_bytes(const PackShape& s, const BackwardMethod& method) {
  return method.fused ? (s.total_q * s.num_kv_heads * int64_t(sizeof(uint32_t)) + 15) / 16 * 16 : 0;
}
// Floats of dq, and of dk and dv each.
int64_t dq_floats(const PackShape& s, const BackwardMethod& method) {
  return method.fused ? (s.total_q * s.num_heads + kWasteRows) * s.head_dim : 0;
}
int64_t key_gradient_floats(const PackShape& s, const BackwardMethod& method) {
  return method.query_splits > 1 ? s.total_k * s.num_kv_heads * s.head_dim : 0;
}

}  // namespace

ForwardTiling forward_tiling(const PackShape& s, int device_index) {
  constexpr const char* kOp = "varlen_attention";
  const Device& gpu = device(kOp, device_index);
  validate_shape(kOp, s, gpu, false);
  const Tiling tiling = choose_tiling(kOp, s, gpu);
  return {tiling.tile_tokens, tiling.cluster, tiling.key_tile, tiling.warps};
}

// python/illada/ops/attention/plan.py has the same sum for symbolic shapes; tests/cuda/test_attention_plan.py compares.
int64_t plan_rows(const PackShape& s) {
  return 1 + 2 * max_forward_items(s) + 2 * max_backward_items(s) + s.num_sequences;
}

void plan_cuda(const PlanParams& p) {
  constexpr const char* kOp = "attention_plan";
  const DeviceGuard guard(kOp, p.launch.device);
  const Device& gpu = device(kOp, p.launch.device);
  validate_shape(kOp, p.shape, gpu, false);
  ILLADA_CHECK(is_aligned(p.plan), kOp, "plan must be 16-byte aligned");
  const int64_t s = p.shape.num_sequences;
  check_regions(kOp, p.launch,
                {{"cu_seqlens", p.cu_seqlens, 4 * (s + 1)},
                 {"cu_seqlens_k", p.cu_seqlens_k, 4 * (s + 1), true},
                 {"seqused_k", p.seqused_k, 4 * s, true}},
                {{"plan", p.plan, 16 * plan_rows(p.shape)}});
  launch_plan(p, gpu, choose_tiling(kOp, p.shape, gpu));
}

int64_t forward_workspace(const PackShape& s) {
  return may_split(s)
             ? int64_t(kSplitSlots) * slot_rows(s) * (s.head_dim * int64_t(sizeof(float)) + int64_t(sizeof(SlotSum)))
             : 0;
}

void forward_cuda(const ForwardParams& given) {
  constexpr const char* kOp = "varlen_attention";
  ForwardParams p = given;
  const DeviceGuard guard(kOp, p.launch.device);
  const Device& gpu = device(kOp, p.launch.device);
  const PackShape& s = p.shape;
  validate_shape(kOp, s, gpu, true);
  validate_call(kOp, p.dtype, p.softmax_scale, gpu);
  PackShape forward_only = s;
  forward_only.total_k = -1;
  ILLADA_CHECK(p.plan_rows >= plan_rows(forward_only), kOp, "plan must have at least ", plan_rows(forward_only),
               " rows for this pack, got ", p.plan_rows);
  ILLADA_CHECK(p.workspace_bytes >= forward_workspace(s), kOp, "workspace must have ", forward_workspace(s),
               " bytes, got ", p.workspace_bytes);
  ILLADA_CHECK(is_aligned(p.plan, p.out, p.workspace), kOp, "plan, out and workspace must be 16-byte aligned");
  if (s.total_q == 0) return;
  const int64_t q_bytes = normalize_strides(kOp, "q", p.q, s.total_q, s.num_heads, s.head_dim);
  const int64_t k_bytes = normalize_strides(kOp, "k", p.k, s.total_k, s.num_kv_heads, s.head_dim);
  const int64_t v_bytes = normalize_strides(kOp, "v", p.v, s.total_k, s.num_kv_heads, s.head_dim);
  check_regions(kOp, p.launch,
                {{"q", p.q.data, q_bytes},
                 {"k", p.k.data, k_bytes},
                 {"v", p.v.data, v_bytes},
                 {"plan", p.plan, 16 * p.plan_rows}},
                {{"out", p.out, s.total_q * s.num_heads * s.head_dim * 2},
                 {"lse", p.lse, s.total_q * s.num_heads * 4},
                 {"workspace", p.workspace, forward_workspace(s)}});
  const Tiling tiling = choose_tiling(kOp, s, gpu);
  dispatch(kOp, gpu, s.head_dim, [&](auto traits) {
    using Tr = decltype(traits);
    if constexpr (Tr::kArch == Arch::kSm90)
      launch_forward_tile<Tr>(p, gpu, tiling, std::make_index_sequence<std::size(Tr::kForwardTiles)>());
    else
      launch_forward_sm80<Tr::kHeadDim>(p, gpu, tiling);
  });
  if (tiling.may_split) launch_combine(p, gpu);
}

BackwardScratch scratch_of(const BackwardParams& p, const BackwardMethod& method) {
  char* const start = static_cast<char*>(p.workspace);
  char* const arrivals = start + rows_bytes(p.shape);
  float* const sums = reinterpret_cast<float*>(arrivals + arrivals_bytes(p.shape, method));
  float* const dk = sums + dq_floats(p.shape, method);
  return {reinterpret_cast<RowStatistics*>(start), reinterpret_cast<uint32_t*>(arrivals), sums, dk,
          dk + key_gradient_floats(p.shape, method)};
}

int64_t backward_workspace(const PackShape& s, bool deterministic, bool recompute_scores_for_dq, int device_index) {
  const Device& gpu = device("varlen_attention_backward", device_index);
  const BackwardMethod method = choose_backward(s, deterministic, recompute_scores_for_dq, gpu);
  return rows_bytes(s) + arrivals_bytes(s, method) +
         (dq_floats(s, method) + 2 * key_gradient_floats(s, method)) * int64_t(sizeof(float));
}

void backward_cuda(const BackwardParams& given) {
  constexpr const char* kOp = "varlen_attention_backward";
  BackwardParams p = given;
  const DeviceGuard guard(kOp, p.launch.device);
  const Device& gpu = device(kOp, p.launch.device);
  const PackShape& s = p.shape;
  validate_shape(kOp, s, gpu, true);
  validate_call(kOp, p.dtype, p.softmax_scale, gpu);
  ILLADA_CHECK(p.plan_rows >= plan_rows(s), kOp, "plan must have at least ", plan_rows(s),
               " rows for the gradients of this pack, got ", p.plan_rows, "; was it made with total_k?");
  const int64_t workspace_bytes = backward_workspace(s, p.deterministic, p.recompute_scores_for_dq, p.launch.device);
  ILLADA_CHECK(p.workspace_bytes >= workspace_bytes, kOp, "workspace must have ", workspace_bytes, " bytes, got ",
               p.workspace_bytes);
  ILLADA_CHECK(is_aligned(p.plan, p.out, p.dq, p.dk, p.dv, p.workspace), kOp,
               "plan, out, dq, dk, dv and workspace must be 16-byte aligned");
  if (s.total_q == 0 && s.total_k == 0) return;
  const int64_t q_bytes = normalize_strides(kOp, "q", p.q, s.total_q, s.num_heads, s.head_dim);
  const int64_t dout_bytes = normalize_strides(kOp, "dout", p.dout, s.total_q, s.num_heads, s.head_dim);
  const int64_t k_bytes = normalize_strides(kOp, "k", p.k, s.total_k, s.num_kv_heads, s.head_dim);
  const int64_t v_bytes = normalize_strides(kOp, "v", p.v, s.total_k, s.num_kv_heads, s.head_dim);
  const int64_t rows_q = s.total_q * s.num_heads, rows_k = s.total_k * s.num_kv_heads;
  check_regions(kOp, p.launch,
                {{"dout", p.dout.data, dout_bytes},
                 {"q", p.q.data, q_bytes},
                 {"k", p.k.data, k_bytes},
                 {"v", p.v.data, v_bytes},
                 {"out", p.out, rows_q * s.head_dim * 2},
                 {"lse", p.lse, rows_q * 4},
                 {"dlse", p.dlse, rows_q * 4, true},
                 {"plan", p.plan, 16 * p.plan_rows}},
                {{"dq", p.dq, rows_q * s.head_dim * 2},
                 {"dk", p.dk, rows_k * s.head_dim * 2},
                 {"dv", p.dv, rows_k * s.head_dim * 2},
                 {"workspace", p.workspace, workspace_bytes}});
  // No query meets a key, and there may be no work list.
  if (s.total_q == 0 || s.total_k == 0 || s.num_sequences == 0) {
    fill_zeros(kOp, p.launch, p.dq, rows_q * s.head_dim * 2);
    fill_zeros(kOp, p.launch, p.dk, rows_k * s.head_dim * 2);
    return fill_zeros(kOp, p.launch, p.dv, rows_k * s.head_dim * 2);
  }
  const Tiling tiling = longest_tiling(kOp, s, gpu);
  const BackwardMethod method = choose_backward(s, p.deterministic, p.recompute_scores_for_dq, gpu);
  launch_backward_preprocess(p, gpu, method);
  dispatch(kOp, gpu, s.head_dim, [&](auto traits) {
    using Tr = decltype(traits);
    if constexpr (Tr::kArch == Arch::kSm90)
      launch_backward_sm90<Tr::kHeadDim>(p, gpu, tiling, method);
    else
      launch_backward_sm80<Tr::kHeadDim>(p, gpu, tiling);
  });
  if (method.query_splits > 1) launch_backward_finish(p, gpu, method);
}

}  // namespace illada::attention
