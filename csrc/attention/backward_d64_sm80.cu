#include "attention/backward_sm80.cuh"

namespace illada::attention {

void launch_backward_d64_sm80(const BackwardParams& params, const Device& device, const Tiling& tiling) {
  launch_backward<64>(params, device, tiling);
}

}  // namespace illada::attention
