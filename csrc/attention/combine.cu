// Puts together what the forward left of tiles whose keys were split: out = sum_i 2^(lse_i - lse) out_i, over the
// pieces in their order. A CTA looks at one item of the list and a part of its rows; only the first piece of a split
// tile has work.
#include <cmath>

#include "attention/launch.h"
#include "common/dtype.cuh"
#include "common/ptx.cuh"

namespace illada::attention {
namespace {

constexpr int kThreads = 128, kParts = 4;  // CTAs of an item

struct CombineArguments {
  const int32_t* plan;
  const float *slot_out, *slot_lse;
  void* out;
  float* lse;
  int32_t total_q, num_heads, group, slot_rows;
};

template <typename T, int kHeadDim>
__global__ __launch_bounds__(kThreads) void illada_attention_combine_sm80(const __grid_constant__ CombineArguments a) {
  constexpr int kLanes = kHeadDim / 8, kRows = kThreads / kLanes;  // eight columns a lane
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  if (int(blockIdx.x) >= plan_header(a.plan).forward_items) return;
  const WorkItem item = forward_items(a.plan)[blockIdx.x];
  if (item.pieces == 1 || item.piece > 0) return;
  const int lane = int(threadIdx.x) % kLanes;
  for (int row = int(blockIdx.y) * kRows + int(threadIdx.x) / kLanes; row < item.q_count * a.group;
       row += kParts * kRows) {
    const int64_t first = int64_t(item.first_slot) * a.slot_rows + row;
    float top = -INFINITY;
    for (int i = 0; i < item.pieces; ++i) top = fmaxf(top, a.slot_lse[first + int64_t(i) * a.slot_rows]);
    float sum = 0, x[8] = {};
    for (int i = 0; i < item.pieces; ++i) {
      const int64_t from = first + int64_t(i) * a.slot_rows;
      const float weight = ptx::exp2_approx(a.slot_lse[from] - top);
      const float4* values = reinterpret_cast<const float4*>(a.slot_out + from * kHeadDim + 8 * lane);
      const float4 low = values[0], high = values[1];
      const float y[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int n = 0; n < 8; ++n) x[n] = fmaf(weight, y[n], x[n]);
      sum += weight;
    }
    const float inverse = 1.0f / sum;
    const int64_t q = item.q_start + row / a.group, h = item.kv_head * a.group + row % a.group;
    const uint4 eight = make_uint4(pack2<T>(x[0] * inverse, x[1] * inverse), pack2<T>(x[2] * inverse, x[3] * inverse),
                                   pack2<T>(x[4] * inverse, x[5] * inverse), pack2<T>(x[6] * inverse, x[7] * inverse));
    *reinterpret_cast<uint4*>(static_cast<T*>(a.out) + (q * a.num_heads + h) * kHeadDim + 8 * lane) = eight;
    if (lane == 0) a.lse[h * a.total_q + q] = (top + log2f(sum)) * float(M_LN2);
  }
}

template <typename T, int kHeadDim>
void launch(const ForwardParams& p, const Device& device) {
  CombineArguments a{};
  a.plan = p.plan;
  a.slot_rows = slot_rows(p.shape);
  a.slot_out = static_cast<const float*>(p.workspace);
  a.slot_lse = a.slot_out + int64_t(kSplitSlots) * a.slot_rows * kHeadDim;
  a.out = p.out;
  a.lse = p.lse;
  a.total_q = int32_t(p.shape.total_q);
  a.num_heads = p.shape.num_heads;
  a.group = p.shape.num_heads / p.shape.num_kv_heads;
  LaunchShape shape;
  shape.grid = dim3(unsigned(max_forward_items(p.shape)), kParts);
  shape.block = dim3(kThreads);
  shape.dependent = true;
  launch_kernel("varlen_attention", device, p.launch.stream, shape, illada_attention_combine_sm80<T, kHeadDim>, a);
}

template <typename T>
void launch(const ForwardParams& p, const Device& device) {
  p.shape.head_dim == 64 ? launch<T, 64>(p, device) : launch<T, 128>(p, device);
}

}  // namespace

void launch_combine(const ForwardParams& p, const Device& device) {
  p.dtype == DType::kBFloat16 ? launch<BFloat16>(p, device) : launch<Half>(p, device);
}

}  // namespace illada::attention
