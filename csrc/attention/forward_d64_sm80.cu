#include "attention/forward_sm80.cuh"

namespace illada::attention {

void launch_forward_d64_sm80(const ForwardParams& params, const Device& device, const Tiling&) {
  launch_forward<64, 4>(params, device);
}

}  // namespace illada::attention
