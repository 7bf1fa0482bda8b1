#pragma once

#include "attention/backward_keys_sm90.cuh"

namespace illada::attention {
namespace {

template <typename T, int kHeadDim>
void launch_backward(const BackwardParams& p, const Device& device, const Tiling& tiling,
                     const BackwardMethod& method) {
  launch_backward_keys<T, kHeadDim, true>(p, device);
}

template <int kHeadDim>
void launch_backward(const BackwardParams& p, const Device& device, const Tiling& tiling,
                     const BackwardMethod& method) {
  p.dtype == DType::kBFloat16 ? launch_backward<BFloat16, kHeadDim>(p, device, tiling, method)
                              : launch_backward<Half, kHeadDim>(p, device, tiling, method);
}

}  // namespace
}  // namespace illada::attention
