// The last pass of the backward, where dk and dv are sums in fp32: converts them. One read and one write of memory.
//
// Floor: 12 Tk G D bytes.
#include "attention/launch.h"
#include "common/dependent_launch.h"
#include "common/dtype.cuh"

namespace illada::attention {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // loads in flight of a thread

// dk, dv and their sums.
struct FinishArguments {
  const float4* sums[2];
  uint2* gradients[2];
  int64_t count;  // of float4, each
  uint32_t ctas;
  float scales[2];
};

template <typename T>
__global__ __launch_bounds__(kThreads) void illada_attention_backward_finish_sm80(
    const __grid_constant__ FinishArguments a, const __grid_constant__ DependentLaunch launch) {
  wait_for_previous_kernel(launch);
  const int which = blockIdx.x < a.ctas ? 0 : 1;
  const uint32_t cta = blockIdx.x - (which ? a.ctas : 0);
  const int64_t first = int64_t(cta) * (kThreads * kUnroll) + threadIdx.x, count = a.count;
  const float scale = a.scales[which];
  float4 x[kUnroll];
#pragma unroll
  for (int i = 0; i < kUnroll; ++i)
    if (first + i * kThreads < count) x[i] = __ldcs(a.sums[which] + first + i * kThreads);
#pragma unroll
  for (int i = 0; i < kUnroll; ++i)
    if (first + i * kThreads < count)
      a.gradients[which][first + i * kThreads] =
          make_uint2(pack2<T>(x[i].x * scale, x[i].y * scale), pack2<T>(x[i].z * scale, x[i].w * scale));
}

template <typename T>
void launch_finish(const BackwardParams& p, const Device& device, const BackwardMethod& method) {
  const PackShape& s = p.shape;
  const BackwardScratch scratch = scratch_of(p, method);
  FinishArguments a{};
  a.sums[0] = reinterpret_cast<const float4*>(scratch.dk);
  a.sums[1] = reinterpret_cast<const float4*>(scratch.dv);
  a.gradients[0] = static_cast<uint2*>(p.dk);
  a.gradients[1] = static_cast<uint2*>(p.dv);
  a.count = s.total_k * s.num_kv_heads * (s.head_dim / 4);
  a.ctas = uint32_t((a.count + kThreads * kUnroll - 1) / (kThreads * kUnroll));
  a.scales[0] = p.softmax_scale;
  a.scales[1] = 1.0f;
  LaunchShape shape;
  shape.grid = dim3(2 * a.ctas);
  shape.block = dim3(kThreads);
  shape.dependent = true;
  launch_kernel("varlen_attention_backward", device, p.launch.stream, shape, illada_attention_backward_finish_sm80<T>,
                a);
}

}  // namespace

void launch_backward_finish(const BackwardParams& p, const Device& device, const BackwardMethod& method) {
  p.dtype == DType::kBFloat16 ? launch_finish<BFloat16>(p, device, method) : launch_finish<Half>(p, device, method);
}

}  // namespace illada::attention
