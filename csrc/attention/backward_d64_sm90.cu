#include "attention/backward_sm90.cuh"

namespace illada::attention {

void launch_backward_d64_sm90(const BackwardParams& params, const Device& device, const Tiling& tiling,
                              const BackwardMethod& method) {
  launch_backward<64>(params, device, tiling, method);
}

}  // namespace illada::attention
