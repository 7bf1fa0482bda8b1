// Attention backward on sm_90a. One file per head dim includes this file. The keys kernel computes dk and dv, and
// dq if it is fused. Otherwise the queries kernel computes dq.
#pragma once

#include "attention/backward_keys_sm90.cuh"
#include "attention/backward_queries_sm90.cuh"

namespace illada::attention {
namespace {

template <typename T, int kHeadDim>
void launch_backward(const BackwardParams& p, const Device& device, const Tiling& tiling,
                     const BackwardMethod& method) {
  if (method.ordered) {
    launch_backward_keys<T, kHeadDim, DqAccumulation::kRed2, true>(p, device, method);
  } else if (method.accumulation == DqAccumulation::kRed2) {
    launch_backward_keys<T, kHeadDim, DqAccumulation::kRed2, false>(p, device, method);
  } else if (method.accumulation == DqAccumulation::kNone) {
    launch_backward_keys<T, kHeadDim, DqAccumulation::kNone, false>(p, device, method);
  } else {
    launch_backward_sums_sm90<kHeadDim>(p, device, method);
  }
  if (!method.fused) launch_backward_queries<T, kHeadDim>(p, device, tiling);
}

}  // namespace

template <int kHeadDim>
void launch_backward_sm90(const BackwardParams& p, const Device& device, const Tiling& tiling,
                          const BackwardMethod& method) {
  p.dtype == DType::kBFloat16 ? launch_backward<BFloat16, kHeadDim>(p, device, tiling, method)
                              : launch_backward<Half, kHeadDim>(p, device, tiling, method);
}

}  // namespace illada::attention
