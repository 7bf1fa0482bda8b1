#include "attention/backward_sm90.cuh"

namespace illada::attention {

template void launch_backward_sm90<128>(const BackwardParams&, const Device&, const Tiling&, const BackwardMethod&);

}  // namespace illada::attention
