// The attention backward on sm_90a; included by one file per head dim.
#pragma once

#include "attention/backward_keys_sm90.cuh"
#include "attention/backward_queries_sm90.cuh"

namespace illada::attention {
namespace {

template <typename T, int kHeadDim>
void launch_backward(const BackwardParams& p, const Device& device, const Tiling& tiling,
                     const BackwardMethod& method) {
  if (p.shape.total_k)
    method.ordered ? launch_backward_keys<T, kHeadDim, true, true>(p, device, method)
    : method.fused ? launch_backward_keys<T, kHeadDim, true, false>(p, device, method)
                   : launch_backward_keys<T, kHeadDim, false, false>(p, device, method);
  if (!method.fused && p.shape.total_q) launch_backward_queries<T, kHeadDim>(p, device, tiling);
}

template <int kHeadDim>
void launch_backward(const BackwardParams& p, const Device& device, const Tiling& tiling,
                     const BackwardMethod& method) {
  p.dtype == DType::kBFloat16 ? launch_backward<BFloat16, kHeadDim>(p, device, tiling, method)
                              : launch_backward<Half, kHeadDim>(p, device, tiling, method);
}

}  // namespace
}  // namespace illada::attention
