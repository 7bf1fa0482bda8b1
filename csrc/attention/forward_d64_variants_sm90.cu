// Tiles of head dim 64 that only a measurement can choose; see docs/design-attention.md.
#include "attention/forward_sm90.cuh"

namespace illada::attention {

void launch_forward_d64_192x128_sm90(const ForwardParams& params, const Device& device, const Tiling& tiling) {
  launch_forward<64, 128, 4>(params, device, tiling);
}

}  // namespace illada::attention
