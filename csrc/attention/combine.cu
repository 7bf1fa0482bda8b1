// Merges the key splits of tiles into out and lse. Split i of a row left values_i = sum_j p_j v_j and sum_i = sum_j p_j
// in its slot (plan.h), both relative to reference_i. With top = the largest reference of the row's splits and
// w_i = exp(scale (reference_i - top)):
//
//   sum = sum_i w_i sum_i,  out = sum_i w_i values_i / sum,  lse = log(sum) + scale top
//
//   for each unit of the CTA, in steps of the grid (a unit is some rows of an item):
//     continue unless the item is the first key split of several, and the thread's row is one of the item's
//     top = largest reference
//     for each key split, in a fixed order: add its weighted sum and values
//     store out and lse
//
// A thread has 8 columns of a row, a CTA kRows rows. Threads exchange nothing: each finds top and sum itself.
//
// Floor: bytes = rows x splits x (D + 2) x 4, which the forward has just left in the L2 cache.
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "attention/launch.h"
#include "attention/probabilities.cuh"
#include "attention/traits.h"
#include "common/dependent_launch.h"
#include "common/dtype.cuh"
#include "common/ptx.cuh"

namespace illada::attention {
namespace {

constexpr const char* kOp = "varlen_attention";
// Rows of a CTA at a time, a multiple of 4, with at most 128 threads. D / 8 threads share a row.
template <int kHeadDim>
constexpr int kRows = 128 / (kHeadDim / 8) / 4 * 4;
template <int kHeadDim>
constexpr int kThreads = kRows<kHeadDim> * (kHeadDim / 8);

struct CombineArguments {
  const int32_t* plan;
  Slots slots;
  void* out;
  float* lse;
  int32_t total_q, num_heads, group;
  int32_t row_steps;        // units of an item: steps of kRows rows through a slot
  float scale, scale_log2;  // softmax_scale, and times log2(e)
};

// Packs 8 columns of out: x / sum.
template <typename T>
__device__ __forceinline__ uint4 pack_quotients(const float (&x)[8], float sum) {
  const float inverse = 1 / sum;  // of scores of -inf alone, NaN
  uint4 words;
  words.x = pack2<T>(x[0] * inverse, x[1] * inverse);
  words.y = pack2<T>(x[2] * inverse, x[3] * inverse);
  words.z = pack2<T>(x[4] * inverse, x[5] * inverse);
  words.w = pack2<T>(x[6] * inverse, x[7] * inverse);
  return words;
}

template <typename T, int kHeadDim>
__global__ __launch_bounds__(kThreads<kHeadDim>) void illada_attention_combine_sm80(
    const __grid_constant__ CombineArguments a, const __grid_constant__ DependentLaunch launch) {
  constexpr int kColumns = kHeadDim / 8;
  wait_for_previous_kernel(launch);
  const int units = plan_header(a.plan).forward_items * a.row_steps;
  const int column = int(threadIdx.x) % kColumns * 8;
  for (int unit = int(blockIdx.x); unit < units; unit += int(gridDim.x)) {
    const int index = unit / a.row_steps;
    const WorkItem item = forward_items(a.plan)[index];
    const int row = (unit - index * a.row_steps) * kRows<kHeadDim> + int(threadIdx.x) / kColumns;
    if (item.splits == 1 || item.split > 0 || row >= item.q_count * a.group) continue;

    const SlotSum* const sums = a.slots.sums + int64_t(item.first_slot) * a.slots.rows + row;
    const float* const values = a.slots.values + (int64_t(item.first_slot) * a.slots.rows + row) * kHeadDim + column;
    float top = -FLT_MAX;  // what a key split of scores of -inf alone has
#pragma unroll 4
    for (int i = 0; i < item.splits; ++i) top = fmaxf(top, sums[int64_t(i) * a.slots.rows].reference);

    float x[8] = {}, sum = 0;
#pragma unroll 2
    for (int i = 0; i < item.splits; ++i) {
      const SlotSum its = sums[int64_t(i) * a.slots.rows];
      const float weight = ptx::exp2_approx((its.reference - top) * a.scale_log2);
      const float4* const part = reinterpret_cast<const float4*>(values + int64_t(i) * a.slots.rows * kHeadDim);
      const float4 low = part[0], high = part[1];
      const float y[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      sum = fmaf(weight, its.sum, sum);
#pragma unroll
      for (int j = 0; j < 8; ++j) x[j] = fmaf(weight, y[j], x[j]);
    }

    const int row_token = row / a.group;
    const int64_t token = item.q_start + row_token;
    const int head = item.kv_head * a.group + row - row_token * a.group;
    const uint4 words = pack_quotients<T>(x, sum);
    *reinterpret_cast<uint4*>(static_cast<T*>(a.out) + (token * a.num_heads + head) * kHeadDim + column) = words;
    if (column == 0) a.lse[int64_t(head) * a.total_q + token] = row_lse(top, sum, a.scale);
  }
}

template <typename T, int kHeadDim>
void launch(const ForwardParams& p, const Device& device) {
  const PackShape& s = p.shape;
  CombineArguments a{};
  a.plan = p.plan;
  a.slots = slots_of(p);
  a.out = p.out;
  a.lse = p.lse;
  a.scale = p.softmax_scale;
  a.scale_log2 = p.softmax_scale * float(M_LOG2E);
  a.total_q = int32_t(s.total_q);
  a.num_heads = s.num_heads;
  a.group = s.num_heads / s.num_kv_heads;
  a.row_steps = (a.slots.rows + kRows<kHeadDim> - 1) / kRows<kHeadDim>;
  LaunchShape shape;
  // Packs this small have few tiles with key splits. More CTAs than the GPU holds at once would start for nothing.
  shape.grid = dim3(unsigned(std::min<int64_t>(max_forward_items(s) * a.row_steps, int64_t(device.sm_count) * 8)));
  shape.block = dim3(kThreads<kHeadDim>);
  shape.dependent = true;
  launch_kernel(kOp, device, p.launch.stream, shape, illada_attention_combine_sm80<T, kHeadDim>, a);
}

template <typename T>
void launch(const ForwardParams& p, const Device& device) {
  dispatch_head_dim<Arch::kSm80>(kOp, p.shape.head_dim,
                                 [&](auto traits) { launch<T, decltype(traits)::kHeadDim>(p, device); });
}

}  // namespace

void launch_combine(const ForwardParams& p, const Device& device) {
  p.dtype == DType::kBFloat16 ? launch<BFloat16>(p, device) : launch<Half>(p, device);
}

}  // namespace illada::attention
