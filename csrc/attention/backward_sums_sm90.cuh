// Keys kernel of the attention backward on sm_90a with the methods of adding dq that are not the default. One file per
// head dim includes this file.
#pragma once

#include "attention/backward_keys_sm90.cuh"

namespace illada::attention {
namespace {

// Launches the keys kernel with another method of adding dq than the default.
template <typename T, int kHeadDim>
void launch_backward_sums(const BackwardParams& p, const Device& device, const BackwardMethod& method) {
  switch (method.accumulation) {
    case DqAccumulation::kRed2Kept:
      return launch_backward_keys<T, kHeadDim, DqAccumulation::kRed2Kept, false>(p, device, method);
    case DqAccumulation::kRed4:
      return launch_backward_keys<T, kHeadDim, DqAccumulation::kRed4, false>(p, device, method);
    case DqAccumulation::kRed4Kept:
      return launch_backward_keys<T, kHeadDim, DqAccumulation::kRed4Kept, false>(p, device, method);
    case DqAccumulation::kBulk:
      return launch_backward_keys<T, kHeadDim, DqAccumulation::kBulk, false>(p, device, method);
    case DqAccumulation::kNone:
    case DqAccumulation::kRed2:
      break;  // launched elsewhere
  }
}

}  // namespace

template <int kHeadDim>
void launch_backward_sums_sm90(const BackwardParams& p, const Device& device, const BackwardMethod& method) {
  p.dtype == DType::kBFloat16 ? launch_backward_sums<BFloat16, kHeadDim>(p, device, method)
                              : launch_backward_sums<Half, kHeadDim>(p, device, method);
}

}  // namespace illada::attention
