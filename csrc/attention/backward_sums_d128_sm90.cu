#include "attention/backward_sums_sm90.cuh"

namespace illada::attention {

template void launch_backward_sums_sm90<128>(const BackwardParams&, const Device&, const BackwardMethod&);

}  // namespace illada::attention
