#include "attention/forward_sm90.cuh"

namespace illada::attention {

void launch_forward_d64_sm90(const ForwardParams& params, const Device& device, const Tiling& tiling) {
  launch_forward<64, 96, 4>(params, device, tiling);
}

}  // namespace illada::attention
