#include "attention/forward_sm90.cuh"

namespace illada::attention {

void launch_forward_d128_sm90(const ForwardParams& params, const Device& device, const Tiling& tiling) {
  launch_forward<128, 128, 3>(params, device, tiling);
}

}  // namespace illada::attention
