// Kernels on scalars of the loss: the weighted sum of the tokens' nll, and the scaling of gradients by dloss.
//
//   sum, one CTA:          each thread adds every 1024th token's term; then lanes, then warps: always in the same order
//   scale, several CTAs:   end if the factor is 1
//                          multiply the vectors of 8 elements, then the elements after them
#include <algorithm>

#include "common/dependent_launch.h"
#include "common/dtype.cuh"
#include "common/reduce.cuh"
#include "loss/launch.h"

namespace illada::loss {
namespace {

constexpr const char* kOp = "masked_cross_entropy";
constexpr int kSumThreads = 1024;

// The kernel's part of WeightedSumParams.
struct WeightedSum {
  const float *nll, *token_weights, *normalizer;
  float* loss;
  int64_t num_rows;
  float scale;
};

__global__ __launch_bounds__(kSumThreads) void illada_masked_cross_entropy_sum_sm80(
    const __grid_constant__ WeightedSum p, const __grid_constant__ DependentLaunch launch) {
  __shared__ double shared[kSumThreads / 32];
  wait_for_previous_kernel(launch);
  const auto add = [](double a, double b) { return a + b; };
  double sum = 0;
  // The condition keeps an nll that no kernel has written, or that is NaN, out of the sum: 0 * NaN would be NaN.
  for (int64_t n = threadIdx.x; n < p.num_rows; n += kSumThreads)
    if (p.token_weights[n] != 0.0f) sum += double(p.token_weights[n]) * double(p.nll[n]);
  sum = warp_reduce(sum, add);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  sum = warp_reduce(shared[threadIdx.x], add);
  if (threadIdx.x == 0) *p.loss = float(sum * double(p.scale) / (p.normalizer ? double(*p.normalizer) : 1.0));
}

constexpr int kScaleThreads = 256, kVector = 8;

template <typename T>
__global__ __launch_bounds__(kScaleThreads) void illada_masked_cross_entropy_scale_sm80(
    const __grid_constant__ ScaleParams p, const __grid_constant__ DependentLaunch launch) {
  wait_for_previous_kernel(launch);
  const float factor = *p.factor;
  if (factor == 1.0f) return;  // the usual dloss; only the device knows it
  T* const data = static_cast<T*>(p.data);
  const int64_t first = int64_t(blockIdx.x) * kScaleThreads + threadIdx.x, stride = int64_t(gridDim.x) * kScaleThreads;
  // Data off a vector's boundary is scaled element by element.
  const int64_t vectors = reinterpret_cast<uintptr_t>(data) % 16 ? 0 : p.count / kVector;
  for (int64_t i = first; i < vectors; i += stride) {
    float x[kVector];
    unpack8(load8_if(true, data + i * kVector), x);
#pragma unroll
    for (int k = 0; k < kVector; ++k) x[k] *= factor;
    store8(data + i * kVector, pack8<T>(x));
  }
  for (int64_t i = vectors * kVector + first; i < p.count; i += stride)
    store_float(data + i, to_float(data[i]) * factor);
}

template <typename T>
void launch(const ScaleParams& p, const Device& device) {
  constexpr int64_t kCtasPerSm = 8;
  const int64_t ctas = (p.count + kScaleThreads * kVector - 1) / (kScaleThreads * kVector);
  LaunchShape shape;
  shape.grid = dim3(unsigned(std::min(ctas, kCtasPerSm * device.sm_count)));
  shape.block = dim3(kScaleThreads);
  shape.dependent = true;
  launch_kernel(kOp, device, p.launch.stream, shape, illada_masked_cross_entropy_scale_sm80<T>, p);
}

}  // namespace

void launch_weighted_sum(const WeightedSumParams& p, const Device& device) {
  LaunchShape shape;
  shape.grid = dim3(1);
  shape.block = dim3(kSumThreads);
  shape.dependent = true;
  launch_kernel(kOp, device, p.launch.stream, shape, illada_masked_cross_entropy_sum_sm80,
                WeightedSum{p.nll, p.token_weights, p.normalizer, p.loss, p.num_rows, float(p.scale)});
}

void launch_scale(const ScaleParams& p, const Device& device) {
  dispatch_dtype(p.dtype, [&](auto element) { launch<decltype(element)>(p, device); });
}

}  // namespace illada::loss
