#include "attention/backward_sm90.cuh"

namespace illada::attention {

void launch_backward_sums_d128_sm90(const BackwardParams& params, const Device& device, const BackwardMethod& method) {
  launch_backward_sums<128>(params, device, method);
}

}  // namespace illada::attention
