// Tiles of head dim 128 that only a measurement can choose; see docs/design-attention.md.
#include "attention/forward_sm90.cuh"

namespace illada::attention {

void launch_forward_d128_128x2x2_sm90(const ForwardParams& params, const Device& device, const Tiling& tiling) {
  launch_forward<128, 128, 2>(params, device, tiling);
}
void launch_forward_d128_176x2x2_sm90(const ForwardParams& params, const Device& device, const Tiling& tiling) {
  launch_forward<128, 176, 2>(params, device, tiling);
}

}  // namespace illada::attention
