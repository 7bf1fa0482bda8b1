// Validates a call, chooses how to carry it out, and enqueues it.
#include "attention/launch.h"

#include <cmath>
#include <limits>
#include <string>

#include "common/check.h"
#include "illada/illada.h"

namespace illada::attention {
namespace {

constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max();

bool has_sm90(const Device& gpu) {
#if defined(ILLADA_BUILT_SM90A)
  return gpu.compute_capability == 90;
#else
  return false && gpu.index;
#endif
}

// total_k has no part in it: a plan need not know it.
Tiling choose_tiling(const PackShape& s, const Device& gpu) {
  return has_sm90(gpu) ? tiling(s, forward_blocks_sm90(s.head_dim), forward_key_tile_sm90(s.head_dim), true)
                       : tiling(s, forward_blocks_sm80(), forward_key_tile_sm80(s.head_dim), false);
}

void validate_shape(const char* op, const PackShape& s, const Device& gpu, bool knows_keys) {
  ILLADA_CHECK(s.total_q >= 0 && s.total_q <= kMostRows, op, "total_q must be in [0, 2^31), got ", s.total_q);
  ILLADA_CHECK(s.total_k >= (knows_keys ? 0 : -1) && s.total_k <= kMostRows, op, "total_k must be in [0, 2^31), got ",
               s.total_k);
  ILLADA_CHECK(s.num_sequences >= 0, op, "negative number of sequences: ", s.num_sequences);
  ILLADA_CHECK(s.num_sequences > 0 || s.total_q == 0, op, "no sequences, but ", s.total_q, " queries");
  ILLADA_CHECK(s.num_kv_heads > 0 && s.num_heads > 0 && s.num_heads % s.num_kv_heads == 0, op, "num_heads ",
               s.num_heads, " must be a multiple of num_kv_heads ", s.num_kv_heads);
  if ((s.head_dim != 64 && s.head_dim != 128) || s.num_heads / s.num_kv_heads > kBlockRows)
    detail::fail<NotSupported>(op, "kernels were built for head dims 64 and 128 and up to ", kBlockRows,
                               " query heads of a key-value head; got head dim ", s.head_dim, " and ",
                               s.num_heads / s.num_kv_heads, " heads on ", gpu.name, ", built archs ",
                               build_info().cuda_archs);
  ILLADA_CHECK(plan_rows(s) <= kMostRows, op, "the pack is too large: ", s.total_q, " queries, ", s.num_sequences,
               " sequences, ", s.num_kv_heads, " key-value heads");
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

}  // namespace

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
  return may_split(s) ? int64_t(kSplitSlots) * slot_rows(s) * (s.head_dim + 1) * int64_t(sizeof(float)) : 0;
}

void forward_cuda(const ForwardParams& given) {
  constexpr const char* kOp = "varlen_attention";
  ForwardParams p = given;
  const DeviceGuard guard(kOp, p.launch.device);
  const Device& gpu = device(kOp, p.launch.device);
  const PackShape& s = p.shape;
  validate_shape(kOp, s, gpu, true);
  if (p.dtype != DType::kBFloat16 && p.dtype != DType::kFloat16)
    detail::fail<NotSupported>(kOp, "kernels were built for bfloat16 and float16; got ", name(p.dtype), " on ",
                               gpu.name, ", built archs ", build_info().cuda_archs);
  ILLADA_CHECK(p.softmax_scale > 0 && std::isfinite(p.softmax_scale), kOp, "softmax_scale must be finite and > 0, got ",
               p.softmax_scale);
  PackShape forward_only = s;
  forward_only.total_k = -1;
  ILLADA_CHECK(p.plan_rows >= plan_rows(forward_only), kOp, "plan must have at least ", plan_rows(forward_only),
               " rows for this pack, got ", p.plan_rows);
  ILLADA_CHECK(p.workspace_bytes >= forward_workspace(s), kOp, "workspace must have ", forward_workspace(s),
               " bytes, got ", p.workspace_bytes);
  ILLADA_CHECK(reinterpret_cast<uintptr_t>(p.plan) % 16 == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0 &&
                   reinterpret_cast<uintptr_t>(p.workspace) % 16 == 0,
               kOp, "plan, out and workspace must be 16-byte aligned");
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
    s.head_dim == 64 ? launch_forward_d64_sm90(p, gpu, cut) : launch_forward_d128_sm90(p, gpu, cut);
#endif
  } else {
    s.head_dim == 64 ? launch_forward_d64_sm80(p, gpu, cut) : launch_forward_d128_sm80(p, gpu, cut);
  }
  if (cut.may_split) launch_combine(p, gpu);
}

}  // namespace illada::attention
