// Validates a call, chooses how to carry it out, and enqueues it.
#include "attention/launch.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>

#include "common/check.h"
#include "common/ragged.h"
#include "common/variants.h"
#include "illada/illada.h"

namespace illada::attention {
namespace {

constexpr int64_t kMostInt32 = std::numeric_limits<int32_t>::max();
// Registers are few, so kernels count in 32 bits: heads, elements of all heads of a token, rows (tokens x heads), and
// pieces of a plan's items. They step behind the last row by a tile, which has at most 384 tokens of all heads, and cut
// an item into 8 pieces at most.
constexpr int64_t kMostHeads = 1 << 16;
constexpr int64_t kMostRows = (int64_t(1) << 31) - (1 << 25);
constexpr int64_t kMostPlanRows = 1 << 29;

bool has_sm90(const Device& gpu) {
#if defined(ILLADA_BUILT_SM90A)
  return gpu.compute_capability == 90;
#else
  return false && gpu.index;
#endif
}

// total_k has no part in it: a plan need not know it.
Tiling choose_tiling(const PackShape& s, const Device& gpu) {
  if (has_sm90(gpu)) {
    const bool pairs = variant<AttentionCluster>() == AttentionCluster::kAuto;
    return tiling(s, forward_blocks_sm90(s.head_dim), forward_key_tile_sm90(s.head_dim), pairs);
  }
  const int warps = forward_warps_sm80(s.head_dim, gpu);
  Tiling cut = tiling(s, forward_blocks_sm80(), forward_key_tile_sm80(s.head_dim, warps), false);
  cut.warps = warps;
  return cut;
}
// The longest items that a plan may have, whatever was chosen when it was made.
Tiling longest_tiling(const PackShape& s, const Device& gpu) {
  return has_sm90(gpu) ? tiling(s, forward_blocks_sm90(s.head_dim), forward_key_tile_sm90(s.head_dim), true)
                       : choose_tiling(s, gpu);
}

#if defined(ILLADA_BUILT_SM90A)
void launch_forward_sm90(const ForwardParams& p, const Device& gpu, const Tiling& cut) {
  if (p.shape.head_dim == 64) {
    switch (variant<AttentionForwardD64>()) {
      case AttentionForwardD64::k192x96:
        return launch_forward_d64_sm90(p, gpu, cut);
      case AttentionForwardD64::k192x128:
        return launch_forward_d64_192x128_sm90(p, gpu, cut);
    }
  }
  switch (variant<AttentionForwardD128>()) {
    case AttentionForwardD128::k128x2x3:
      return launch_forward_d128_sm90(p, gpu, cut);
    case AttentionForwardD128::k128x2x2:
      return launch_forward_d128_128x2x2_sm90(p, gpu, cut);
    case AttentionForwardD128::k176x2x2:
      return launch_forward_d128_176x2x2_sm90(p, gpu, cut);
  }
}
#endif

void validate_shape(const char* op, const PackShape& s, const Device& gpu, bool knows_keys) {
  ILLADA_CHECK(s.total_q >= 0 && s.total_q <= kMostInt32, op, "total_q must be in [0, 2^31), got ", s.total_q);
  ILLADA_CHECK(s.total_k >= (knows_keys ? 0 : -1) && s.total_k <= kMostInt32, op, "total_k must be in [0, 2^31), got ",
               s.total_k);
  if (has_sm90(gpu) && std::max(s.total_q, s.total_k) > kRaggedTokens)
    detail::fail<NotSupported>(op, "kernels of ", gpu.name, " take at most ", kRaggedTokens, " tokens; got ", s.total_q,
                               " queries, ", s.total_k, " keys");
  ILLADA_CHECK(s.num_sequences >= 0, op, "negative number of sequences: ", s.num_sequences);
  ILLADA_CHECK(s.num_kv_heads > 0 && s.num_heads > 0 && s.num_heads % s.num_kv_heads == 0, op, "num_heads ",
               s.num_heads, " must be a multiple of num_kv_heads ", s.num_kv_heads);
  ILLADA_CHECK(s.num_heads <= kMostHeads, op, "num_heads must be at most ", kMostHeads, ", got ", s.num_heads);
  if ((s.head_dim != 64 && s.head_dim != 128) || s.num_heads / s.num_kv_heads > kBlockRows)
    detail::fail<NotSupported>(op, "kernels were built for head dims 64 and 128 and up to ", kBlockRows,
                               " query heads of a key-value head; got head dim ", s.head_dim, " and ",
                               s.num_heads / s.num_kv_heads, " heads on ", gpu.name, ", built archs ",
                               build_info().cuda_archs);
  ILLADA_CHECK(s.total_q * s.num_heads <= kMostRows, op, "total_q x num_heads must be at most ", kMostRows, ", got ",
               s.total_q, " x ", s.num_heads);
  ILLADA_CHECK(s.total_k * s.num_kv_heads <= kMostRows, op, "total_k x num_kv_heads must be at most ", kMostRows,
               ", got ", s.total_k, " x ", s.num_kv_heads);
  ILLADA_CHECK(plan_rows(s) <= kMostPlanRows, op, "num_sequences x num_kv_heads is too large: a plan may have ",
               kMostPlanRows, " rows, and ", s.num_sequences, " sequences x ", s.num_kv_heads, " heads of ", s.total_q,
               " queries and ", s.total_k, " keys need ", plan_rows(s));
}

// The bytes that a packed tensor spans. Strides of dimensions of size 1 become legal ones, since nobody uses them.
int64_t settle(const char* op, const char* name, PackedView& x, int64_t tokens, int64_t heads, int head_dim) {
  if (heads <= 1) x.head_stride = head_dim;
  if (tokens <= 1) x.token_stride = heads * x.head_stride;
  if (tokens == 0) return 0;
  if (x.token_stride <= 0 || x.head_stride <= 0 || x.token_stride % 8 || x.head_stride % 8 ||
      reinterpret_cast<uintptr_t>(x.data) % 16)
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

bool is_aligned(std::initializer_list<const void*> pointers) {
  uintptr_t bits = 0;
  for (const void* pointer : pointers) bits |= reinterpret_cast<uintptr_t>(pointer);
  return bits % 16 == 0;
}

int64_t rows_bytes(const PackShape& s) {
  return (s.total_q * s.num_heads * int64_t(sizeof(RowStatistics)) + 15) / 16 * 16;
}

// What only a GPU can tell to be fast. In order there is one way.
void choose_sums(const PackShape& s, BackwardMethod& method) {
  const bool kept = variant<L2Hints>() == L2Hints::kOn && !method.ordered;
  method.sums = kept ? QuerySums::kRed2Kept : QuerySums::kRed2;
  if (method.ordered) return;
  const auto wanted = variant<AttentionBackwardSums>();
  const int group = group_of(s);
  if (wanted == AttentionBackwardSums::kRed4) method.sums = kept ? QuerySums::kRed4Kept : QuerySums::kRed4;
  // A warp's 16 rows must be whole tokens, or heads of one.
  if (wanted == AttentionBackwardSums::kBulk && (16 % group == 0 || group % 16 == 0)) method.sums = QuerySums::kBulk;
  method.staggered = variant<AttentionBackwardStart>() == AttentionBackwardStart::kStaggered;
  method.report_every = 1 << int(variant<AttentionBackwardReports>());
}

BackwardMethod choose_backward(const PackShape& s, bool deterministic, bool multiplies_twice, const Device& gpu) {
  BackwardMethod method;
  if (s.total_q <= 0 || s.total_k <= 0) return method;  // nothing is multiplied
  // Places in the sums are 32-bit numbers.
  const int64_t sums = (s.total_q * s.num_heads + kWasteRows) * s.head_dim;
  method.fused = has_sm90(gpu) && !multiplies_twice && sums <= kMostInt32 &&
                 variant<AttentionBackwardSums>() != AttentionBackwardSums::kTwice;
  if (method.fused && deterministic) {
    method.ordered = s.total_k / kBackwardKeys + s.num_sequences <= kMostOrdered;
    method.fused = method.ordered;
  }
  if (method.fused) choose_sums(s, method);
  if (method.fused && s.num_sequences > 0 && s.num_kv_heads > 0) {
    const int64_t sequences = std::min<int64_t>(s.num_sequences, s.total_k);
    const int64_t items =
        s.num_kv_heads * ((s.total_k - sequences) / kBackwardKeys + sequences);  // the most there can be
    method.pieces = int(std::clamp<int64_t>(gpu.sm_count / items, 1, method.ordered ? 2 : 8));
  }
  return method;
}

int64_t arrivals_bytes(const PackShape& s, const BackwardMethod& method) {
  return method.fused ? (s.total_q * s.num_kv_heads * int64_t(sizeof(uint32_t)) + 15) / 16 * 16 : 0;
}
// Floats of dq, and of dk and dv each.
int64_t query_sums(const PackShape& s, const BackwardMethod& method) {
  return method.fused ? (s.total_q * s.num_heads + kWasteRows) * s.head_dim : 0;
}
int64_t key_sums(const PackShape& s, const BackwardMethod& method) {
  return method.pieces > 1 ? s.total_k * s.num_kv_heads * s.head_dim : 0;
}

}  // namespace

int forward_key_tile_sm90(int head_dim) {
  if (head_dim == 64) return variant<AttentionForwardD64>() == AttentionForwardD64::k192x128 ? 128 : 96;
  return variant<AttentionForwardD128>() == AttentionForwardD128::k176x2x2 ? 176 : 128;
}

int forward_warps_sm80(int head_dim, const Device& gpu) {
  if (head_dim == 64) return 4;
  const auto wanted = variant<ForwardWarps>();
  if (wanted != ForwardWarps::kAuto) return wanted == ForwardWarps::kFour ? 4 : 8;
  const int two = 2 * (forward_smem_sm80(head_dim, 4) + gpu.reserved_smem_bytes + 1024);
  return two <= gpu.sm_smem_bytes ? 4 : 8;
}

ForwardTiling forward_tiling(const PackShape& s, int device_index) {
  constexpr const char* kOp = "varlen_attention";
  const Device& gpu = device(kOp, device_index);
  validate_shape(kOp, s, gpu, false);
  const Tiling cut = choose_tiling(s, gpu);
  return {cut.tile_tokens, cut.cluster, cut.key_tile, cut.warps};
}

int64_t plan_rows(const PackShape& s) {
  return 1 + 2 * max_forward_items(s) + 2 * max_backward_items(s) + s.num_sequences;
}

void plan_cuda(const PlanParams& p) {
  constexpr const char* kOp = "attention_plan";
  const DeviceGuard guard(kOp, p.launch.device);
  const Device& gpu = device(kOp, p.launch.device);
  validate_shape(kOp, p.shape, gpu, false);
  ILLADA_CHECK(reinterpret_cast<uintptr_t>(p.plan) % 16 == 0, kOp, "plan must be 16-byte aligned");
  const int64_t s = p.shape.num_sequences;
  check_regions(kOp, p.launch,
                {{"cu_seqlens", p.cu_seqlens, 4 * (s + 1)},
                 {"cu_seqlens_k", p.cu_seqlens_k, 4 * (s + 1), true},
                 {"seqused_k", p.seqused_k, 4 * s, true}},
                {{"plan", p.plan, 16 * plan_rows(p.shape)}});
  launch_plan(p, gpu, choose_tiling(p.shape, gpu));
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
  ILLADA_CHECK(is_aligned({p.plan, p.out, p.workspace}), kOp, "plan, out and workspace must be 16-byte aligned");
  if (s.total_q == 0) return;
  const int64_t q_bytes = settle(kOp, "q", p.q, s.total_q, s.num_heads, s.head_dim);
  const int64_t k_bytes = settle(kOp, "k", p.k, s.total_k, s.num_kv_heads, s.head_dim);
  const int64_t v_bytes = settle(kOp, "v", p.v, s.total_k, s.num_kv_heads, s.head_dim);
  check_regions(kOp, p.launch,
                {{"q", p.q.data, q_bytes},
                 {"k", p.k.data, k_bytes},
                 {"v", p.v.data, v_bytes},
                 {"plan", p.plan, 16 * p.plan_rows}},
                {{"out", p.out, s.total_q * s.num_heads * s.head_dim * 2},
                 {"lse", p.lse, s.total_q * s.num_heads * 4},
                 {"workspace", p.workspace, forward_workspace(s)}});
  const Tiling cut = choose_tiling(s, gpu);
  if (has_sm90(gpu)) {
#if defined(ILLADA_BUILT_SM90A)
    launch_forward_sm90(p, gpu, cut);
#endif
  } else {
    s.head_dim == 64 ? launch_forward_d64_sm80(p, gpu, cut) : launch_forward_d128_sm80(p, gpu, cut);
  }
  if (cut.may_split) launch_combine(p, gpu);
}

BackwardScratch scratch_of(const BackwardParams& p, const BackwardMethod& method) {
  char* const start = static_cast<char*>(p.workspace);
  char* const arrivals = start + rows_bytes(p.shape);
  float* const sums = reinterpret_cast<float*>(arrivals + arrivals_bytes(p.shape, method));
  float* const dk = sums + query_sums(p.shape, method);
  return {reinterpret_cast<RowStatistics*>(start), reinterpret_cast<uint32_t*>(arrivals), sums, dk,
          dk + key_sums(p.shape, method)};
}

int64_t backward_workspace(const PackShape& s, bool deterministic, bool multiplies_twice, int device_index) {
  const Device& gpu = device("varlen_attention_backward", device_index);
  const BackwardMethod method = choose_backward(s, deterministic, multiplies_twice, gpu);
  return rows_bytes(s) + arrivals_bytes(s, method) +
         (query_sums(s, method) + 2 * key_sums(s, method)) * int64_t(sizeof(float));
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
  const int64_t workspace_bytes = backward_workspace(s, p.deterministic, p.multiplies_twice, p.launch.device);
  ILLADA_CHECK(p.workspace_bytes >= workspace_bytes, kOp, "workspace must have ", workspace_bytes, " bytes, got ",
               p.workspace_bytes);
  ILLADA_CHECK(is_aligned({p.plan, p.out, p.dq, p.dk, p.dv, p.workspace}), kOp,
               "plan, out, dq, dk, dv and workspace must be 16-byte aligned");
  if (s.total_q == 0 && s.total_k == 0) return;
  const int64_t q_bytes = settle(kOp, "q", p.q, s.total_q, s.num_heads, s.head_dim);
  const int64_t dout_bytes = settle(kOp, "dout", p.dout, s.total_q, s.num_heads, s.head_dim);
  const int64_t k_bytes = settle(kOp, "k", p.k, s.total_k, s.num_kv_heads, s.head_dim);
  const int64_t v_bytes = settle(kOp, "v", p.v, s.total_k, s.num_kv_heads, s.head_dim);
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
  const Tiling cut = longest_tiling(s, gpu);
  const BackwardMethod method = choose_backward(s, p.deterministic, p.multiplies_twice, gpu);
  launch_backward_rows(p, gpu, method);
  if (has_sm90(gpu)) {
#if defined(ILLADA_BUILT_SM90A)
    s.head_dim == 64 ? launch_backward_d64_sm90(p, gpu, cut, method) : launch_backward_d128_sm90(p, gpu, cut, method);
#endif
  } else {
    s.head_dim == 64 ? launch_backward_d64_sm80(p, gpu, cut) : launch_backward_d128_sm80(p, gpu, cut);
  }
  if (method.pieces > 1) launch_backward_finish(p, gpu, method);
}

}  // namespace illada::attention
