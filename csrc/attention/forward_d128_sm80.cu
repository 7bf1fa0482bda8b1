#include "attention/forward_sm80.cuh"

namespace illada::attention {

void launch_forward_d128_sm80(const ForwardParams& params, const Device& device, const Tiling& tiling) {
  tiling.warps == 8 ? launch_forward<128, 8>(params, device) : launch_forward<128, 4>(params, device);
}

}  // namespace illada::attention
