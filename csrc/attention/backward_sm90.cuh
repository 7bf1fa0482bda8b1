// Attention backward on sm_90a. One file per head dim includes this file, and one per head dim for the methods of
// adding dq that are not the default. The keys kernel computes dk and dv, and dq if it is fused. Otherwise the queries
// kernel computes dq.
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
  } else if (kHeadDim == 64) {
    launch_backward_sums_d64_sm90(p, device, method);
  } else {
    launch_backward_sums_d128_sm90(p, device, method);
  }
  if (!method.fused) launch_backward_queries<T, kHeadDim>(p, device, tiling);
}

template <int kHeadDim>
void launch_backward(const BackwardParams& p, const Device& device, const Tiling& tiling,
                     const BackwardMethod& method) {
  p.dtype == DType::kBFloat16 ? launch_backward<BFloat16, kHeadDim>(p, device, tiling, method)
                              : launch_backward<Half, kHeadDim>(p, device, tiling, method);
}

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

template <int kHeadDim>
void launch_backward_sums(const BackwardParams& p, const Device& device, const BackwardMethod& method) {
  p.dtype == DType::kBFloat16 ? launch_backward_sums<BFloat16, kHeadDim>(p, device, method)
                              : launch_backward_sums<Half, kHeadDim>(p, device, method);
}

}  // namespace
}  // namespace illada::attention
